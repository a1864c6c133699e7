"""Whether a constraint lets a text become as long as it must."""

from __future__ import annotations

import torch
from torch import Tensor

from .check import Check
from .masks import Constraint, PrefixConstraint

_AT_ONCE, _TRIED = 8, 512  # prefixes asked about; beyond these, one is taken to go on


def reaches(constraint: Constraint, tokens: int, stops: Tensor) -> bool:
    """Whether a text of so many tokens, none of them a stop, can be written, as far as a few hundred prefixes say.

    A function of the user's own and a `Check` are asked nothing: they may.
    """
    if isinstance(constraint, Tensor):
        return not tokens or bool(constraint.index_fill(0, stops, False).any())
    if not isinstance(constraint, PrefixConstraint) or isinstance(constraint, Check):
        return True
    left, asked = [stops.new_empty(1, 0)], 0  # prefixes (n, t) to ask about, the longest last
    while left and asked < _TRIED:
        prefixes = left.pop()
        if prefixes.shape[1] == tokens:
            return True
        if len(prefixes) > _AT_ONCE:
            left.append(prefixes[_AT_ONCE:])
        some = prefixes[:_AT_ONCE]
        asked += len(some)
        row, token = constraint(some).index_fill(-1, stops, False).nonzero().unbind(1)
        if len(row):
            left.append(torch.cat([some[row], token[:, None]], 1))
    return bool(left)
