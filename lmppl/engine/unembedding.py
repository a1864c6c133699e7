"""A network in two parts, hidden states and head: logits only for the tokens that need them, a few rows at a time.

The head is whatever the model does with its decoder's output (norms, the output layer and its adapters, scaling, soft
caps). To compute it, the model itself is run with a decoder that returns the given hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..language_model import LanguageModel
from .again import again, refuse_second_derivative
from .chunks import fitting, is_sharded
from .trials import agree, precise, verified
from .tuning import TUNING


def decoder(model: Any) -> nn.Module:
    """Returns the network below the head."""
    found = model.get_decoder()
    below: nn.Module = model.model if found is model else found  # Llama 4's text model returns itself as its decoder
    return below


def hidden_states(lm: LanguageModel, input_ids: Tensor, first: int = 0, **kwargs: Any) -> Tensor:
    """Returns the decoder's output for ``input_ids`` (B, W) from position ``first`` on, (B, W - first, D)."""
    found: list[Any] = []
    with lm.network.lock:
        hook = decoder(lm.model).register_forward_hook(lambda module, args, out: found.append(out))
        try:
            lm.forward(input_ids, logits_to_keep=1, **kwargs)
        finally:
            hook.remove()
    states: Tensor = found[0].last_hidden_state
    return states[:, first:]


def unembed(lm: LanguageModel, states: Tensor) -> Tensor:
    """Returns the logits (n, V) of hidden states (n, D)."""
    with lm.network.lock, _answering(decoder(lm.model), states[None]):
        logits: Tensor = lm.forward(
            states.new_zeros(1, len(states), dtype=torch.long), tokens=0, use_cache=False
        ).logits
    return logits[0]


def unembed_each(
    lm: LanguageModel, states: Tensor, index: Tensor, rows: Tensor, head: Any, all_again: bool = False
) -> Tensor:
    """Returns ``head(logits (r, T, V), rows (r,))`` for the states (M, D) at ``index`` (R, T).

    It works in chunks, to limit memory. With gradient, the backward pass computes the logits of all chunks but the last
    again (``all_again``: of the last too). Where possible, `selected` gives result and gradient without keeping any.
    """
    if torch.is_grad_enabled() and (runs := getattr(head, "runs", None)) and (weight := plain_weight(lm)) is not None:
        tokens = head.tokens[rows]
        found = [selected(states, weight, index[:, a:b], tokens[:, a:b], barrier) for a, b, barrier in runs]
        return torch.cat(found, 1)

    def part(states: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        wanted, inverse = torch.unique(index, return_inverse=True)
        if len(wanted) < TUNING.distinct * index.numel() or index.numel() > len(states):
            return head(precise(unembed(lm, states[wanted]))[inverse], rows)
        return head(precise(unembed(lm, states[index.flatten()])).unflatten(0, index.shape), rows)

    most = TUNING.logits_at_once // lm.vocab_size
    if not torch.is_grad_enabled():
        most = fitting(lm, lm.vocab_size, most)
    number = -(-len(rows) // max(1, most // index.shape[1]))
    chunks = list(zip(index.tensor_split(number), rows.tensor_split(number), strict=True))
    kept = number if not torch.is_grad_enabled() else 0 if all_again else 1
    results = [
        part(states, *chunk) if number - i <= kept else again(part, states, *chunk) for i, chunk in enumerate(chunks)
    ]
    return torch.cat(results) if number > 1 else results[0]


def plain_weight(lm: LanguageModel) -> Tensor | None:
    """Returns the weight W (V, D) of an output layer that is only a product with it, without gradient; else None."""
    head, base = lm.model.get_output_embeddings(), set(lm.network.base_parameters)
    if not lm.has_adapter or not isinstance(head, nn.Linear) or head.weight not in base or is_sharded(lm):
        return None
    if head.weight.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(lm.device.type):
        return None
    weight: Tensor = head.weight.detach()
    return weight if verified(lm, "plain_head", _plain_trial) else None


def _plain_trial(lm: LanguageModel) -> bool:
    """Returns whether the output layer is only a product; logits go from 1 to 1,000, so that a cap would show."""
    weight = lm.model.get_output_embeddings().weight
    states = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(lm.device, lm.dtype)
    states = states / linear(states, weight).abs().amax(-1, keepdim=True)
    scale = torch.tensor([1.0, 10.0, 100.0, 1000.0], device=lm.device, dtype=lm.dtype)[:, None]
    return agree(lm, linear(states, weight), unembed(lm, scale * states) / scale, 1e-5)


def selected(states: Tensor, weight: Tensor, index: Tensor, tokens: Tensor, barrier: Tensor | None) -> Tensor:
    r"""Returns the log-probabilities (R, T, k) of ``tokens`` after the states (M, D) at ``index`` (R, T).

    .. math:: \log p_i = w_i \cdot h + b_i - \log \sum_v e^{w_v \cdot h + b_v}, \qquad
              \nabla_h \log p_i = w_i - \sum_v p_v w_v

    Both need only a few logits at a time. For each state, the mean weight is kept for the backward pass.
    """
    result: Tensor = _Selected.apply(states[index.flatten()], weight, tokens.flatten(0, 1), barrier)
    return result.view(tokens.shape)


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, tokens: Tensor, barrier: Tensor | None) -> Tensor:
        result, means = [], []
        at_once = max(1, TUNING.unembedded // len(weight))
        room = states.new_empty(min(at_once, len(states)), len(weight))
        for some, chosen in zip(states.split(at_once), tokens.split(at_once), strict=True):
            logits = torch.mm(some, weight.T, out=room[: len(some)])
            logits = logits if barrier is None else logits.add_(barrier)
            largest = logits.amax(-1, keepdim=True)
            picked = logits.gather(-1, chosen) - largest
            odds = logits.sub_(largest).exp_()
            total = odds.sum(-1, keepdim=True)
            result.append(picked - total.log())
            means.append((odds @ weight) / total)
        ctx.save_for_backward(weight, tokens, torch.cat(means))
        return torch.cat(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        weight, tokens, means = ctx.saved_tensors
        return (grad[..., None] * weight[tokens]).sum(1) - grad.sum(-1, keepdim=True) * means, None, None, None


def splits(lm: LanguageModel) -> bool:
    """Returns whether the two parts together give this network's own logits."""
    return verified(lm, "split_head", _trial)


def _trial(lm: LanguageModel) -> bool:
    ids = torch.randint(lm.vocab_size, (2, 5), generator=torch.Generator().manual_seed(0)).to(lm.device)
    whole = lm.forward(ids, use_cache=False).logits
    parts = unembed(lm, hidden_states(lm, ids, use_cache=False).flatten(0, 1))
    return agree(lm, parts, whole.flatten(0, 1), 1e-5)


class _Answer(tuple[Tensor]):
    """A decoder's output that has only the last hidden state."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _answering(decoder: nn.Module, states: Tensor) -> Iterator[None]:
    decoder.__dict__["forward"] = lambda *args, **kwargs: _Answer((states,))
    try:
        yield
    finally:
        del decoder.__dict__["forward"]
