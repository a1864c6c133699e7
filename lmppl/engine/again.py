"""Computing again in the backward pass what would take too much memory to keep."""

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
    """``compute(*args)``, of which the backward pass finds nothing but the arguments."""
    result: T = checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False)
    return result


def refuse_second_derivative() -> None:
    """RuntimeError in a backward pass of which there is to be a graph.

    (torch's ``once_differentiable`` says nothing where the gradient that comes in is a constant.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError("log-probabilities of language models have no second derivative: create_graph=True")


def kept_tokens(lm: LanguageModel) -> int:
    """Of how many tokens the activations are kept for the backward pass: the token budget, or less in a processor's
    memory, where those of a token take much.
    """
    if lm.device.type != "cpu" or is_sharded(lm):
        return lm.token_budget
    floats = TUNING.activations * lm.token_budget // TOKEN_BUDGET
    return max(1, min(lm.token_budget, floats // max(1, activations(lm))))


def activations(lm: LanguageModel) -> int:
    """How many floats the backward pass of this view keeps of a token below the output layer: looked up in one pass."""
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
        """Keep it here and not in the graph: an operation that held its own output would never be freed."""
        address = x.untyped_storage().data_ptr()
        if address not in weights:
            found[address] = x.detach()

    ids = torch.zeros(1, tokens, dtype=torch.long, device=lm.device)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        lm.forward(ids, tokens=0, use_cache=False, logits_to_keep=1)
    return sum(x.untyped_storage().nbytes() // 4 for x in found.values()) // tokens


def read_again(lm: LanguageModel, read: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """``again(read)`` for what the network makes of tokens, a function of this view's parameters alone, and an index.

    No graph is built at first: its nodes, small and many among activations that come and go, would have a processor's
    memory in pieces that are too small for the next ones.
    """
    parameters = lm.trainable_parameters()
    # Autograd knows sharded weights by what is gathered of them; a hook wants the whole gradient, not a part's.
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
        if not states.requires_grad:  # the output layer alone has parameters
            return None, *(None for _ in ctx.parameters)
        return None, *torch.autograd.grad(states, ctx.parameters, grad, allow_unused=True)
