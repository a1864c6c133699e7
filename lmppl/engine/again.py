"""Computes again in the backward pass what would take too much memory to keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..language_model import LanguageModel
from ..view import TOKEN_BUDGET
from .chunks import is_sharded
from .tuning import TUNING

T = TypeVar("T")


def again(compute: Callable[..., T], *args: Any) -> T:
    """Returns ``compute(*args)``, for which the backward pass keeps only the arguments and computes the rest again."""
    result: T = checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False)
    return result


def refuse_second_derivative() -> None:
    """Raises RuntimeError in a backward pass that is to build a graph itself.

    (torch's ``once_differentiable`` does not raise if the incoming gradient is a constant.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "log-probabilities of language models have no second derivative; do not pass create_graph=True"
        )


def kept_tokens(lm: LanguageModel) -> int:
    """Returns for how many tokens activations are kept for the backward pass.

    It is the token budget, or less on a processor if the activations of a token take much memory.
    """
    if lm.device.type != "cpu" or is_sharded(lm):
        return lm.token_budget
    floats = TUNING.activations * lm.token_budget // TOKEN_BUDGET
    return max(1, min(lm.token_budget, floats // max(1, activations(lm))))


def activations(lm: LanguageModel) -> int:
    """Returns how many floats the backward pass keeps for each token below the output layer; measured in one pass."""
    with lm.network.lock:
        lm.network.follow()
        known: Any = lm.network.kept.setdefault("activations", {})
        key = lm.network.changes, lm.adapter_name, any(m.gradient_checkpointing for m in lm.network.checkpointing)
        if key not in known:
            known[key] = _activations(lm)
        return int(known[key])


def _activations(lm: LanguageModel) -> int:
    tokens = min(8, lm.max_length or 8)
    weights = {w.untyped_storage().data_ptr() for w in lm.model.parameters()}
    found: dict[int, Tensor] = {}

    def note(x: Tensor) -> None:
        """Stores it here and not in the graph: an operation that held its own output would never be freed."""
        address = x.untyped_storage().data_ptr()
        if address not in weights:
            found[address] = x.detach()

    ids = torch.zeros(1, tokens, dtype=torch.long, device=lm.device)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        lm.forward(ids, tokens=0, use_cache=False, logits_to_keep=1)
    return sum(x.untyped_storage().nbytes() // 4 for x in found.values()) // tokens


def read_again(lm: LanguageModel, read: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Returns ``again(read)`` for a ``read`` that depends on this view's parameters only.

    ``read`` returns hidden states and an index. The first pass builds no graph: its many small nodes, allocated between
    activations, would fragment a processor's memory.
    """
    parameters = lm.trainable_parameters()
    # For autograd, sharded weights are the gathered copies; and a hook expects the whole gradient, not one part's.
    special = is_sharded(lm) or any(p._backward_hooks for p in parameters)
    if special or torch.is_autocast_enabled(lm.device.type):
        return again(read)
    states, index = _ReadAgain.apply(read, *parameters)
    return states, index


class _ReadAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, read: Callable[[], tuple[Tensor, Tensor]], *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.read, ctx.parameters = read, parameters
        states, index = read()
        ctx.mark_non_differentiable(index)
        return states, index

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        with torch.enable_grad():
            states, _ = ctx.read()
        if not states.requires_grad:  # only the output layer has parameters
            return None, *(None for _ in ctx.parameters)
        return None, *torch.autograd.grad(states, ctx.parameters, grad, allow_unused=True)
