"""Decoding attention to prompts that many rows continue: all of them use one copy of a prompt's keys and values.

Row r attends to its prompt's keys, which are the same for all rows with that prompt, and to its own, those of the
tokens drawn so far. The prompt's part of the scores is one matrix product for all of its rows, while a cache that
repeats the prompt for every row reads as many copies of it. Resampling moves only what was drawn.

Source: Juravsky et al. 2024 (Hydragen); Athiwaratkun et al. 2024 (bifurcated attention).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .tree_attention import UnsupportedAttention, using

NAME = "lmppl_shared_prompts"


class SharedPrompts:
    """The keys and values of U prompts (U, H, A, D) in each layer, and the prompt that each of R rows continues.

    ``index`` (R,) is the number of each row's prompt. ``mask`` (U, A) marks the columns of a prompt that are text, at
    the right end (None: all). A layer with a window may keep only its last columns.
    """

    def __init__(self, cache: DynamicCache, index: Tensor, mask: Tensor | None):
        if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
            raise UnsupportedAttention("a cache that is more than keys and values")
        self.layers = [(layer.keys, layer.values) for layer in cache.layers]
        self.padding = None if mask is None else mask == 0
        self._arrange(index)

    def _arrange(self, index: Tensor) -> None:
        """Makes the rows continue the prompts ``index``, and drops prompts that no row continues."""
        used, self.index = torch.unique(index, return_inverse=True)
        if len(used) < len(self.layers[0][0]):
            self.layers = [(keys[used], values[used]) for keys, values in self.layers]
            self.padding = None if self.padding is None else self.padding[used]
        count = torch.bincount(self.index)  # (U,)
        most, order = int(count.max()), self.index.argsort(stable=True)  # rows with one prompt stand together
        first = count.cumsum(0) - count  # (U,): the place in that order at which each prompt's rows begin
        slot = first[:, None] + torch.arange(most, device=index.device)
        self.slots = order[slot.clamp(max=len(order) - 1)]  # (U, N): each prompt's rows; any row beyond their number
        prompt = self.index[order]
        place = prompt * most + torch.arange(len(order), device=index.device) - first[prompt]
        self.place = torch.empty_like(order).scatter_(0, order, place)  # (R,): a row's place in the flattened slots

    def select(self, rows: Tensor) -> None:
        """Replaces row r by row ``rows[r]``."""
        self._arrange(self.index[rows])

    def group(self, x: Tensor) -> Tensor:
        """Groups by prompt: (R, H, G, T, D) -> (U, H, N, G, T, D)."""
        return x[self.slots].transpose(1, 2)

    def ungroup(self, x: Tensor) -> Tensor:
        """The inverse of `group`."""
        return x.transpose(1, 2).flatten(0, 1)[self.place]


_PROMPTS: ContextVar[SharedPrompts] = ContextVar("prompts")


@contextmanager
def behind(model: PreTrainedModel, prompts: SharedPrompts) -> Iterator[None]:
    """Inside, the keys of ``model``'s forward passes follow those of these prompts."""
    token = _PROMPTS.set(prompts)
    try:
        with using(model, NAME):
            yield
    finally:
        _PROMPTS.reset(token)


def shared_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: query (R, H G, T, D), key (R, H, t, D), result (R, T, H G, D)."""
    if kwargs.get("s_aux") is not None or attention_mask is not None:
        raise UnsupportedAttention("sinks or an additive mask")
    prompts = _PROMPTS.get()
    layer: Any = module
    keys, values = prompts.layers[layer.layer_idx]  # (U, H, A, D)
    H, A, T, t = key.shape[1], keys.shape[2], query.shape[2], key.shape[2]
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    query = query.unflatten(1, (H, -1))  # (R, H, G, T, D)
    grouped = prompts.group(query)  # (U, H, N, G, T, D)
    before = prompts.ungroup((grouped.flatten(2, 4) @ keys.transpose(-1, -2)).unflatten(2, grouped.shape[2:5]))
    own = (query.flatten(2, 3) @ key.transpose(-1, -2)).unflatten(2, query.shape[2:4])
    scores = torch.cat([before, own], -1)  # (R, H, G, T, A + t)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if prompts.padding is not None:
        padding = prompts.padding[prompts.index, -A:]  # (R, A)
        scores[..., :A].masked_fill_(padding[:, None, None, None], -torch.inf)
    if T > 1 or sliding_window is not None:
        column = torch.arange(A + t, device=key.device)
        back = column[-T:, None] - column  # (T, A + t): the distance back from a token
        scores.masked_fill_((back < 0) | (back >= (sliding_window or A + t)), -torch.inf)
    precision = torch.promote_types(query.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=precision).to(query.dtype)
    before, own = weights.split([A, t], -1)
    read = (prompts.group(before).flatten(2, 4) @ values).unflatten(2, grouped.shape[2:5])
    out = prompts.ungroup(read) + (own.flatten(2, 3) @ value).unflatten(2, query.shape[2:4])
    return out.flatten(1, 2).transpose(1, 2), None


AttentionInterface.register(NAME, shared_attention)
