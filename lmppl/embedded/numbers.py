"""Pairs of bounds between which a random number is asked for, and which of them are trained on and which are tests."""

from functools import cache
from itertools import product
from random import Random
from typing import NamedTuple

PROMPT = "The following is a random integer drawn uniformly between {a} and {b}: "
LARGEST, NARROWEST = 100, 10  # bounds lie in 0..100, ten numbers or more between them
MAX_TOKENS = 3  # of an answer, before its stop
SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}


class Bounds(NamedTuple):
    """Two bounds, both included."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return PROMPT.format(a=self.a, b=self.b)


FIXED = Bounds(0, 100)  # the paper's; in no split


@cache
def bounds(split: str) -> list[Bounds]:
    """The pairs of a split, in an order without meaning; no pair is in two."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(map(repr, SPLITS))}")
    numbers = range(LARGEST + 1)
    pairs = [Bounds(a, b) for a, b in product(numbers, numbers) if b - a >= NARROWEST - 1 and (a, b) != FIXED]
    Random(0).shuffle(pairs)
    names, start = list(SPLITS), 0
    for name in names:
        end = len(pairs) if name == names[-1] else start + round(SPLITS[name] * len(pairs))
        if name == split:
            break
        start = end
    return pairs[start:end]
