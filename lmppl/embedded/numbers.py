"""Pairs of bounds for a random number, in splits for training and tests."""

from functools import cache
from itertools import product
from random import Random
from typing import NamedTuple

PROMPT = "The following is a random integer drawn uniformly between {a} and {b}: "
LARGEST, NARROWEST = 100, 10  # bounds lie in 0..100, with ten numbers or more between them
MAX_TOKENS = 3  # of an answer, before its stop
SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}


class Bounds(NamedTuple):
    """Two bounds, both included."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        """The prompt that asks for a number."""
        return PROMPT.format(a=self.a, b=self.b)


FIXED = Bounds(0, 100)  # the paper's; in no split


@cache
def bounds(split: str) -> list[Bounds]:
    """The pairs of a split, in random order; no pair is in two splits."""
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
