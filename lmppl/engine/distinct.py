"""Layouts of a batch in which each distinct row appears once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import text


def grids(batches: list[Tensor], length: Tensor, cost: Callable[[Tensor], int]) -> list[Tensor]:
    """Returns grids (P, N, B) in which each row of several batches appears once.

    ``batches`` (*batch) are the numbers of the rows to read, -1 for none; ``length`` (R,) is the number of tokens of
    each row. Each batch gets a grid of its own, unless a common grid of several batches has a lower ``cost``.
    """
    batches = [batch for batch in batches if bool((batch >= 0).any())]
    if len(batches) == 1:
        return [grid(axes(batches[0]), length)]
    found: list[tuple[list[Tensor], int, Tensor]] = []
    for batch in batches:
        own = grid(axes(batch), length)
        best = [batch], cost(own), own
        for i, (others, least, _) in enumerate(found):
            group = [*others, batch]
            both = [grid(axes(x), length) for x in beside(group)]
            spent, shared = min(((cost(x), x) for x in both), key=lambda pair: pair[0])
            if spent < least + best[1]:
                found[i] = group, spent, shared
                break
        else:
            found.append(best)
    return [each for *_, each in found]


def axes(batch: Tensor) -> Tensor:
    """Returns a batch as (P, N, B).

    Rows along axis 0 (prefixes or particles) share most tokens, then those along axis 1; the rest are observations.
    """
    P, N = (*batch.shape, 1, 1)[:2]
    return batch.reshape(P, N, -1)


def beside(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns batches combined in two ways: stacked along a new axis, and concatenated along their first axis.

    -1 where there is no row.
    """
    dims = max(1, *(batch.dim() for batch in batches))
    batches = [batch.reshape(*[1] * (dims - batch.dim()), *batch.shape) for batch in batches]
    sizes = [max(n) for n in zip(*(batch.shape for batch in batches), strict=True)]
    padded = []
    for batch in batches:
        room = [(0, n - m) for n, m in zip(sizes, batch.shape, strict=True)]
        padded.append(torch.nn.functional.pad(batch, [x for pair in reversed(room) for x in pair], value=-1))
    return torch.stack(padded), torch.cat(padded)


def grid(rows: Tensor, length: Tensor) -> Tensor:
    """Returns the rows of a batch (P, N, B), -1 for none to read, packed more closely: (P', N', B').

    Rows stay with the rows of their axes, with which they share most tokens. For each b, those n that have a row to
    read come first; for each (n, b), the longest rows; and every b has a row.
    """
    there = rows >= 0
    if bool(there.all()):
        return rows
    rows = rows[..., there.flatten(0, 1).any(0)]
    count = (rows >= 0).sum(0)  # (N, B)
    columns = (count == 0).int().argsort(dim=0, stable=True)[: int((count > 0).sum(0).max())]
    rows = rows.gather(1, columns.expand(len(rows), *columns.shape))
    by_length = torch.where(rows >= 0, length[rows], -1).argsort(dim=0, descending=True, stable=True)
    return rows.gather(0, by_length[: int(count.max())])


def at(rows: Tensor, grid: Tensor) -> Tensor:
    """Returns the tokens (P, N, B, W) of a grid's rows.

    Where there is no row, they are those of the longest row beside it, or none.
    """
    filled = torch.where(grid >= 0, grid, grid[:1])
    width = int(text.length(rows[grid[grid >= 0]]).max())
    return rows[filled, :width].masked_fill((filled < 0)[..., None], text.PAD)
