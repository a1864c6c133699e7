"""Attention over a packed tree of tokens: a root, its trunks, and each trunk's branches form one sequence.

One row of the batch holds, one after another,

    root (A tokens) | N trunks of S tokens | N x P branches of L tokens

A trunk continues the root. Branch p of trunk n continues the first ``visible[n, p]`` tokens of trunk n. A query attends
to the visible part of each of its ancestors and, causally, to its own segment, as far back as the layer's window
reaches. Keys are never copied: the queries of all descendants form one matrix product with their ancestor's keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from .again import again
from .tuning import TUNING

NAME = "lmppl_tree"


class UnsupportedAttention(RuntimeError):
    """The error that a model's attention has a feature (sinks, an additive mask) that tree attention lacks."""


@dataclass(frozen=True)
class Level:
    """One level of the tree: ``fanout`` segments below each of the ``B`` roots, each ``width`` tokens long.

    ``visible[j]``, shape (B, *fanout), is the number of tokens of the ancestor at level j that a segment sees.
    ``start``, of the same shape, is the position of a segment's first token in its text.
    """

    fanout: tuple[int, ...]
    width: int
    visible: tuple[Tensor, ...]
    start: Tensor
    read: bool = True  # False: its keys and values come from the cache, and it has no queries

    @property
    def tokens(self) -> int:
        """The number of tokens of the level below one root."""
        n = self.width
        for k in self.fanout:
            n *= k
        return n


_TREE: ContextVar[tuple[Level, ...]] = ContextVar("tree")
_WINDOWS: ContextVar[list[int | None] | None] = ContextVar("windows", default=None)


@contextmanager
def windows_seen() -> Iterator[list[int | None]]:
    """Yields a list of the layers' windows (None: no limit), filled when tree attention is called inside, in order."""
    seen: list[int | None] = []
    token = _WINDOWS.set(seen)
    try:
        yield seen
    finally:
        _WINDOWS.reset(token)


@contextmanager
def using(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """Inside, ``model``'s forward passes use the attention function of this name."""
    before = model.config._attn_implementation
    model.config._attn_implementation = attention
    try:
        yield
    finally:
        model.config._attn_implementation = before


@contextmanager
def tree(model: PreTrainedModel, levels: tuple[Level, ...]) -> Iterator[None]:
    """Inside, ``model``'s forward passes use tree attention over ``levels``."""
    token = _TREE.set(levels)
    try:
        with using(model, NAME):
            yield
    finally:
        _TREE.reset(token)


def _attend(
    levels: tuple[Level, ...],
    query: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Returns the attention of the last level's queries (B, H, *fanout, L, D) to its ancestors and itself.

    If there are many scores, a block of the L queries is computed at a time, and the backward pass computes its scores
    again.
    """
    width = levels[-1].width
    scores = query.numel() // query.shape[-1] * sum(key.shape[-2] for key in keys)
    blocks = min(width, -(-scores // TUNING.scores))
    if blocks <= 1:
        return _attend_from(0, width, levels, window, softcap, query, *keys, *values)
    ends = [width * (i + 1) // blocks for i in range(blocks)]
    attend = partial(again, _attend_from) if torch.is_grad_enabled() else _attend_from
    # Tensors are passed one by one: those in a tuple would be kept, even if a layer around this is computed again.
    parts = [attend(a, b, levels, window, softcap, query, *keys, *values) for a, b in pairwise([0, *ends])]
    return torch.cat(parts, -2)


def _attend_from(
    first: int,
    end: int,
    levels: tuple[Level, ...],
    window: int | None,
    softcap: float | None,
    query: Tensor,
    *known: Tensor,
) -> Tensor:
    """`_attend` for the queries from ``first`` to ``end`` of every segment.

    They see no later key of their own segment. ``known`` are the keys and then the values.
    """
    own, query = levels[-1], query[..., first:end, :]
    keys, values = ((*each[:-1], each[-1][..., :end, :]) for each in (known[: len(levels)], known[len(levels) :]))
    scores, folded = [], []
    asking = torch.arange(first, end, device=query.device)
    at = own.start[..., None] + asking  # (B, *fanout, L)
    for j, (level, key) in enumerate(zip(levels, keys, strict=True)):
        depth = key.dim() - 4  # the ancestor's number of fanout axes
        q = query.flatten(2 + depth, -2)  # (B, H, *fanout_j, descendants' tokens, D)
        score = (q @ key.transpose(-1, -2)).unflatten(-2, query.shape[2 + depth : -1])
        folded.append(depth)
        if softcap is not None:
            score = softcap * (score / softcap).tanh()
        position = torch.arange(key.shape[-2], device=key.device)
        # For an ancestor (B, *fanout, 1, L_j); for the level itself (L, L_j), causal.
        hidden = position >= own.visible[j][..., None, None] if j < len(own.visible) else position > asking[:, None]
        if window is not None:
            start = level.start.view(*level.start.shape, *[1] * (at.dim() - level.start.dim()), 1)
            hidden = hidden | (at[..., None] - start - position >= window)  # (B, *fanout, L, L_j)
        hidden = hidden if hidden.dim() == 2 else hidden[:, None]
        scores.append(score.masked_fill(hidden, -torch.inf))  # (B, H, *fanout, L, L_j)
    precision = torch.promote_types(query.dtype, torch.float32)
    weights = torch.cat(scores, -1).softmax(-1, dtype=precision).to(query.dtype)
    out: Tensor | float = 0.0
    for depth, weight, value in zip(folded, weights.split([k.shape[-2] for k in keys], -1), values, strict=True):
        out = out + (weight.flatten(2 + depth, -2) @ value).view_as(query)
    assert isinstance(out, Tensor)
    return out


def tree_attention(
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
    """The attention function that transformers calls: query (B, H, T, D), result (B, T, H, D)."""
    if kwargs.get("s_aux") is not None:
        raise UnsupportedAttention("sinks")
    if attention_mask is not None:
        raise UnsupportedAttention("an additive mask")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if key.shape[1] != query.shape[1]:  # grouped-query attention
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if (seen := _WINDOWS.get()) is not None:
        seen.append(sliding_window)
    levels = _TREE.get()
    asking = [level.tokens if level.read else 0 for level in levels]
    known = [level.tokens for level in levels]
    query = query * scaling
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    outputs = []
    parts = zip(levels, query.split(asking, 2), key.split(known, 2), value.split(known, 2), strict=True)
    for i, (level, q, k, v) in enumerate(parts):
        shape = (*level.fanout, level.width)
        keys, values = (*keys, k.unflatten(2, shape)), (*values, v.unflatten(2, shape))
        if level.read:
            out = _attend(levels[: i + 1], q.unflatten(2, shape), keys, values, sliding_window, softcap)
            outputs.append(out.flatten(2, -2))
    return torch.cat(outputs, 2).transpose(1, 2), None


AttentionInterface.register(NAME, tree_attention)
