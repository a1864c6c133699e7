"""A batch laid out so that each of its different rows is there once."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import text


def grid(same: Tensor, length: Tensor) -> Tensor:
    """The rows (P', N', B') that a batch (P, N, B) has to read, each once; -1 where there is none.

    ``same``: the first row of the flattened batch that is equal to each; ``length`` (R,): its tokens.  Rows stay beside
    those of their axes, with which they share most: per b those n come first that have a row to read, per (n, b) the
    longest of its rows, and every b has one.
    """
    rows = torch.arange(same.numel(), device=same.device).view(same.shape)
    there = same == rows
    if bool(there.all()):
        return rows
    rows = rows.where(there, -1)[..., there.flatten(0, 1).any(0)]
    count = (rows >= 0).sum(0)  # (N, B)
    columns = (count == 0).int().argsort(dim=0, stable=True)[: int((count > 0).sum(0).max())]
    rows = rows.gather(1, columns.expand(len(rows), *columns.shape))
    by_length = torch.where(rows >= 0, length[rows], -1).argsort(dim=0, descending=True, stable=True)
    return rows.gather(0, by_length[: int(count.max())])


def at(rows: Tensor, grid: Tensor) -> Tensor:
    """The tokens (P, N, B, W) of a grid's rows; where there is none, those of the longest beside it, or none."""
    filled = torch.where(grid >= 0, grid, grid[:1])
    return rows[filled].masked_fill((filled < 0)[..., None], text.PAD)
