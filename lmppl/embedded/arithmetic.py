"""Sums and their chains of thought, in splits for training and tests.

    Question: 6 - 0 - 4 = ? Answer: 6 - 0 = 6, 6 - 4 = 2. The answer is 2.

`worlds/arithmetic.py` makes the texts that the language model was trained on, in which few sums are worked out
correctly.
"""

from __future__ import annotations

from functools import cache
from random import Random
from typing import NamedTuple

ANSWER = " The answer is"
MOST_OPERANDS = 5
MAX_TOKENS = 6 * (MOST_OPERANDS - 1) - 1  # of a chain, before its stop
SPLITS = {  # of each number of operands, how many questions
    "rationales": {3: 25, 4: 25},
    "train": {3: 500, 4: 500},
    "validation": {3: 100, 4: 100},
    "test_3": {3: 1000},
    "test_4": {4: 1000},
    "test_5": {5: 1000},
}


class Question(NamedTuple):
    """A sum: the first operand is positive, and each other one has a sign before it."""

    operands: tuple[int, ...]
    signs: str  # "+" or "-" before each operand but the first

    @property
    def x(self) -> str:
        """ "Question: 6 - 0 - 4 = ? Answer:" """
        rest = "".join(f" {s} {n}" for s, n in zip(self.signs, self.operands[1:], strict=True))
        return f"Question: {self.operands[0]}{rest} = ? Answer:"

    @property
    def chain(self) -> str:
        """ " 6 - 0 = 6, 6 - 4 = 2.": the correct chain, with its stop."""
        return written(self.operands[0], list(zip(self.signs, self.operands[1:], strict=True)))

    @property
    def answer(self) -> int:
        """The value of the sum."""
        return total(self.operands[0], list(zip(self.signs, self.operands[1:], strict=True)))

    @property
    def y(self) -> str:
        """ " The answer is 2." """
        return f"{ANSWER} {self.answer}."


Steps = list[tuple[str, int]]  # signs and operands


def total(value: int, steps: Steps) -> int:
    return value + sum(n if sign == "+" else -n for sign, n in steps)


def written(value: int, steps: Steps) -> str:
    """The chain of these steps from a value on."""
    lines = []
    for sign, n in steps:
        lines.append(f" {value} {sign} {n} = {total(value, [(sign, n)])}")
        value = total(value, [(sign, n)])
    return ",".join(lines) + "."


def draw(random: Random, operands: int) -> Question:
    """A question with so many operands, drawn uniformly."""
    numbers = tuple(random.randrange(10) for _ in range(operands))
    return Question(numbers, "".join(random.choice("+-") for _ in numbers[1:]))


@cache
def questions(split: str) -> list[Question]:
    """The questions of a split, in random order; none is in two splits, or twice in one."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(map(repr, SPLITS))}")
    random, met = Random("questions"), set()
    for name, counts in SPLITS.items():
        found: list[Question] = []
        for operands, count in counts.items():
            while count:
                one = draw(random, operands)
                if one not in met:
                    met.add(one)
                    found.append(one)
                    count -= 1
        random.shuffle(found)
        if name == split:
            return found
    raise AssertionError("unreachable")
