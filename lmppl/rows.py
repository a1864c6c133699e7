"""Finds equal rows of numbers. torch compares rows one by one, which is slow, so most are compared by a hash first."""

from __future__ import annotations

import torch
from torch import Tensor

_FEW = 64  # fewer rows than this are compared one by one


def first_equal(rows: Tensor) -> Tensor:
    """Returns for each row of numbers (R, W) the first row that is equal to it, (R,).

    Rows are compared by a sum of their numbers with fixed weights, modulo 2^64, and then one by one.
    """
    weights = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=torch.Generator().manual_seed(0))
    found = _first((rows * weights.to(rows.device)).sum(-1).unique(return_inverse=True)[1])
    if torch.equal(rows[found], rows):
        return found
    return _first(torch.unique(rows, dim=0, return_inverse=True)[1])


def _first(kind: Tensor) -> Tensor:
    row = torch.arange(len(kind), device=kind.device)
    return torch.full_like(row, len(row)).scatter_reduce(0, kind, row, "amin")[kind]


def covering(rows: Tensor) -> Tensor:
    """Returns for each text (R, W) the longest text that begins with it, the first of these, (R,).

    A text that no longer text begins with covers itself. Prefixes are compared as `first_equal` compares rows: by sums,
    and then token by token.

    >>> covering(torch.tensor([[5, -1], [5, 1], [2, 7], [5, 1]])).tolist()
    [1, 1, 2, 1]
    """
    number, width = rows.shape
    weights = torch.randint(-(2**62), 2**62, (width,), generator=torch.Generator().manual_seed(0))
    sums = ((rows + 1) * weights.to(rows.device)).cumsum(1)  # of every prefix; padding adds 0
    length = (rows >= 0).sum(1)
    whole, order = sums[:, -1].sort(stable=True)
    ends = length.unique()
    ends = ends[ends > 0] - 1
    first = torch.searchsorted(whole, sums[:, ends].contiguous()).clamp(max=number - 1)  # (R, E)
    begins = (whole[first] == sums[:, ends]) & (ends < length[:, None])
    row = torch.arange(number, device=rows.device)
    longest = (length * number + number - 1 - row)[:, None].expand_as(first)[begins]
    best = torch.zeros_like(row).scatter_reduce(0, first[begins], longest, "amax")
    found = number - 1 - best[torch.searchsorted(whole, sums[:, -1].contiguous())] % number
    found = found.where(length > 0, row)
    agrees = (rows[found] == rows) | (rows < 0)
    return found if bool(agrees.all()) else first_equal(rows)


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distinct rows of numbers in lexicographic order, and the number of each row among them.

    ``rows`` (R, W) -> (K, W) and (R,).

    >>> rows, kind = distinct_rows(torch.tensor([[5, 1], [2, 7], [5, 1]]))
    >>> rows.tolist(), kind.tolist()
    ([[2, 7], [5, 1]], [1, 0, 1])
    """
    if len(rows) < _FEW:
        return torch.unique(rows, dim=0, return_inverse=True)
    once, kind = first_equal(rows).unique(return_inverse=True)
    found, place = torch.unique(rows[once], dim=0, return_inverse=True)
    return found, place[kind]
