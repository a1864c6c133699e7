"""Computing again in the backward pass what would take too much memory to keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..language_model import LanguageModel
from .chunks import is_sharded

T = TypeVar("T")


def again(compute: Callable[..., T], *args: Any) -> T:
    """``compute(*args)``, of which the backward pass finds nothing but the arguments."""
    result: T = checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False)
    return result


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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            states, _ = ctx.read()
        if not states.requires_grad:  # the output layer alone has parameters
            return None, *(None for _ in ctx.parameters)
        return None, *torch.autograd.grad(states, ctx.parameters, grad, allow_unused=True)
