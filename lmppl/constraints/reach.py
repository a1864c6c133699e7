"""Whether a constraint allows a text of a required length."""

from __future__ import annotations

import torch
from torch import Tensor

from .check import Check
from .masks import Constraint, PrefixConstraint

_AT_ONCE, _TRIED = 8, 512  # prefixes tried at once, and in all


def reaches(constraint: Constraint, tokens: int, stops: Tensor) -> bool:
    """Returns whether the constraint allows a text of so many tokens, none of them a stop.

    Up to a few hundred prefixes are tried; beyond them the answer is True. A function of the user's own and a `Check`
    are not called: the answer is True.

    :param constraint: a mask (V,) or a function of the prefix.
    :param tokens: the number of tokens.
    :param stops: LongTensor (S,) of stop tokens.
    :returns: a bool.

    >>> reaches(Slots(lm, [["a"], ["c"]]), 3, lm.stop_ids("eos"))
    False
    """
    if isinstance(constraint, Tensor):
        return not tokens or bool(constraint.index_fill(0, stops, False).any())
    if not isinstance(constraint, PrefixConstraint) or isinstance(constraint, Check):
        return True
    left, asked = [stops.new_empty(1, 0)], 0  # prefixes (n, t) to try, the longest last
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
