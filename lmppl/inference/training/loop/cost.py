r"""What a run will cost, predicted after its first steps.

.. math:: T = T_k + (n - k)\, c + L\, \ell + S\, s

after k of n steps in the time :math:`T_k`: c seconds for a step, :math:`\ell` for an evaluation on held-out
observations, s for a checkpoint.  Tokens are those of the steps only, as ``training_tokens`` counts them.

The first step of each task includes work that is done once, such as reading prompts for the first time.  So the second
round of the tasks (with one task, the second step) gives the prediction.  The time of an evaluation is predicted from
two small ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from .evaluation import LOOK, Looks

TRIALS = 4, 16  # draws of two small evaluations
AGAIN = 0.1  # share of the steps after which the prediction is checked
OFF = 0.2  # relative error from which on the prediction is printed again
UNITS = ("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)


@dataclass(frozen=True)
class Cost:
    """What is left of a run (steps, evaluations, checkpoints, and what each takes) and what has been spent already."""

    steps: int
    tokens: float  # a step
    seconds: float  # a step
    looks: float = 0.0
    look: float = 0.0  # seconds of one
    saves: int = 0
    save: float = 0.0  # seconds of one
    spent_tokens: float = 0.0
    spent_seconds: float = 0.0

    @property
    def total_tokens(self) -> float:
        return self.spent_tokens + self.steps * self.tokens

    @property
    def total_seconds(self) -> float:
        beside = self.looks * self.look + self.saves * self.save
        return self.spent_seconds + self.steps * self.seconds + beside


@dataclass
class Spent:
    """What a run has taken: tokens and seconds of its steps, seconds of its evaluations and checkpoints."""

    counted: Callable[[], int]  # the tokens of all steps so far
    clock: Callable[[], float] = time.perf_counter
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    looks: list[float] = field(default_factory=list)
    saves: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = self.clock()

    def mark(self) -> tuple[int, float]:
        """What `add` needs to know about the beginning of a step."""
        return self.counted(), self.clock() - self._beside

    def add(self, mark: tuple[int, float]) -> None:
        """Adds the step since ``mark``."""
        tokens, seconds = self.mark()
        self.tokens.append(tokens - mark[0])
        self.seconds.append(seconds - mark[1])

    @contextmanager
    def on(self, kind: list[float]) -> Iterator[None]:
        """Times an evaluation or a checkpoint; ``kind`` is ``looks`` or ``saves``."""
        began = self.clock()
        yield
        kind.append(self.clock() - began)

    @property
    def _beside(self) -> float:
        return sum(self.looks) + sum(self.saves)


class Forecast:
    """Predicts the cost of one `fit`: once every task has had two turns, and again if the prediction proves wrong.

    :param start: the first step of this `fit`; later than 0 where a checkpoint is resumed.
    :param turns: steps in which every task has a turn.
    :param most: whether the run may end before its last step.
    """

    def __init__(
        self, start: int, steps: int, spent: Spent, looks: Looks, checkpoint_every: int, turns: int, most: bool
    ):
        self.start, self.steps, self.spent, self.looks = start, steps, spent, looks
        self.checkpoint_every, self.turns, self.most = checkpoint_every, turns, most
        self.said: float | None = None  # seconds, as predicted
        self.tried: float | None = None  # seconds of an evaluation, predicted from small ones

    def __call__(self, done: int) -> str:
        """The line to print after so many steps; mostly empty."""
        known = len(self.spent.seconds)
        if done >= self.steps or known < 2 * self.turns:
            return ""
        if self.said is None:
            cost = self.cost(done, self.turns)
            self.said = cost.total_seconds
            return self.line(cost)
        first_look = self.looks.every if self.looks.count(self.start) else 0
        after, whole = max(10, first_look, int(AGAIN * self.steps)), self.steps - self.start
        if done - self.start != after or 2 * after > whole:
            return ""
        cost = self.cost(done, known - self.turns)
        wrong = abs(cost.total_seconds / max(self.said, 1e-9) - 1) > OFF
        return self.line(cost, now="now ") if wrong else ""

    def cost(self, done: int, last: int) -> Cost:
        """The cost of this `fit`, predicted from its ``last`` steps."""
        spent, every = self.spent, self.checkpoint_every
        if self.looks.count(done) and not spent.looks and self.tried is None:
            self.tried = self._try_looks()
        return Cost(
            self.steps - done,
            sum(spent.tokens[-last:]) / last,
            sum(spent.seconds[-last:]) / last,
            self.looks.due(done),
            sum(spent.looks) / len(spent.looks) if spent.looks else self.tried or 0.0,
            self.steps // every - done // every + bool(self.steps % every),
            spent.saves[-1] if spent.saves else 0.0,
            sum(spent.tokens),
            spent.clock() - spent.began,
        )

    def line(self, cost: Cost, now: str = "") -> str:
        """The cost in words."""
        steps = f"{self.steps:,} steps"
        if self.start:
            steps = f"{self.steps - self.start:,} of {self.steps:,} steps left"
        looks = self.looks.count(self.start)
        each = "one look at held_out, " if looks == 1 else f"{looks:,} looks at held_out, each "
        beside = f"; {each}{duration(cost.look)}" if looks and cost.look else ""
        return (
            f"{'at most ' * self.most}{steps}: {now}about {amount(cost.total_tokens)} tokens, "
            f"{duration(cost.total_seconds)} ({cost.tokens:,.0f} tokens and {duration(cost.seconds)} a step{beside})"
        )

    def _try_looks(self) -> float:
        """Seconds of an evaluation: those of a small one, plus the time of its further draws."""
        taken: list[float] = []
        for draws in TRIALS:
            with self.spent.on(taken):
                whole = not self.looks.trial(draws)
            if whole:
                return taken[-1]
        few, some = taken
        return some + max(0.0, some - few) * (LOOK - TRIALS[1]) / (TRIALS[1] - TRIALS[0])


def amount(count: float) -> str:
    """A number of three digits, as a string.

    >>> [amount(n) for n in (960, 12_410, 345_678, 12_412_000, 1_240_000_000)]
    ['960', '12,400', '346,000', '12.4 M', '1,240 M']
    """
    rounded = float(f"{count:.3g}")
    if rounded < 1e6:
        return f"{rounded:,.0f}"
    return f"{rounded / 1e6:,.3g} M" if rounded < 1e9 else f"{rounded / 1e6:,.0f} M"


def duration(seconds: float) -> str:
    """A time as a string.

    >>> [duration(s) for s in (0.0042, 0.153, 29.41, 60, 490, 29_400, 200_000)]
    ['0.0042 s', '0.15 s', '29.4 s', '1 min', '8 min 10 s', '8 h 10 min', '2 d 8 h']
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{float(f'{seconds:.2g}'):g} s"
    (large, size), (small, unit) = next(pair for pair in pairwise(UNITS) if round(seconds) >= pair[0][1])
    whole, rest = divmod(round(seconds / unit), size // unit)
    return f"{whole} {large}" + (f" {rest} {small}" if rest else "")
