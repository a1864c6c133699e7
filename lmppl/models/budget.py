r"""A training for so many minutes: how many observations, particles and steps it takes.

A step on m observations with n particles each takes about :math:`c(m, n) = a + b\,m n` seconds.  In R seconds there are
:math:`S = R / c` steps with :math:`S\,m\,n` draws.  Many steps of few draws teach more than few steps of many, as long
as a step has several observations, and several draws of each to compare.  So

1. sizes (m, n) go from `LEAST` to the recipe's, each with twice the draws of the one before; 2. the largest size is
taken for which the recipe's number of steps fits, the smallest where none does; 3. as many steps of it are made as fit.

More time gives first more steps, up to the recipe's number, then more draws, then more steps again.  Since :math:`m n /
c(m, n)` grows with m n, the total number of draws, :math:`S\,m\,n`, never falls.

The time of a step is measured for each size, as long as larger ones may fit.  `STEPS` of the time is for steps, at most
`LOOKS` for evaluations on held-out observations; the rest is a reserve, because texts may become longer in training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, NamedTuple

import torch

from ..inference import Trainer
from ..inference.core.arguments import is_number
from ..inference.processes.distributed import first_alone, world
from ..inference.training.loop.cost import duration
from ..inference.training.loop.evaluation import JUDGED
from ..randomness import forked
from .experiment import Experiment

STEPS, LOOKS = 0.75, 0.15  # of the time
ENOUGH = 100  # steps; fewer seldom teach a guide
FEW_LOOKS = 5  # evaluations at least; observations are dropped first
EVERY = 50  # steps between two evaluations, at least


class Size(NamedTuple):
    """The size of a step: observations, and particles for each."""

    observations: int
    particles: int

    @property
    def draws(self) -> int:
        return self.observations * self.particles

    def __str__(self) -> str:
        return f"{self.observations} x {self.particles}"


LEAST = Size(2, 4)


@dataclass(frozen=True)
class Plan:
    """The sizes of a training that lasts so many minutes; `plan` finds them.

    :param minutes: how long the training lasts.
    :param observations: observations in a step.
    :param particles: draws of the guide for each observation.
    :param steps: how many updates.
    :param held_out: how many of the held-out observations are evaluated; 0: none.
    :param evaluate_every: steps between two evaluations.
    :param seconds: the measured time of a step.
    :param why: why these sizes, in words.

    >>> found = Plan(5.0, 4, 8, 800, 4, 50, 0.3, "the most draws that fit")
    >>> found.steps * found.observations * found.particles  # draws in all
    25600
    >>> Plan.saved(found.identity) == found
    True
    """

    minutes: float
    observations: int
    particles: int
    steps: int
    held_out: int
    evaluate_every: int
    seconds: float
    why: str

    def of(self, experiment: Experiment) -> Experiment:
        """The experiment with these observations and particles in a step.

        :param experiment: an experiment.
        """
        return experiment.sized(self.observations, self.particles)

    def looks(self, experiment: Experiment) -> dict[str, Any]:
        """The arguments of `Trainer.fit` for the evaluations: ``held_out`` and ``evaluate_every``.

        :param experiment: an experiment.
        :returns: a dict; empty where nothing is evaluated.
        """
        some = tuple(x[: self.held_out] for x in experiment.held_out)
        return {"held_out": some, "evaluate_every": self.evaluate_every} if self.held_out else {}

    @property
    def identity(self) -> dict[str, Any]:
        """The plan as a part of a checkpoint's identity, from which a resumed run restores it."""
        return {f"budget {name}": value for name, value in asdict(self).items()}

    @classmethod
    def saved(cls, identity: Mapping[str, Any]) -> Plan | None:
        """The plan in an identity.

        :param identity: the identity of a checkpoint.
        :returns: a plan; None where the run had none.
        """
        found: dict[str, Any] = {f.name: identity.get(f"budget {f.name}") for f in fields(cls)}
        return None if None in found.values() else cls(**found)

    def __str__(self) -> str:
        size = Size(self.observations, self.particles)
        looks = f"looks at {self.held_out} of held_out every {self.evaluate_every:,} steps"
        return (
            f"{self.minutes:.3g} minutes: {self.steps:,} steps of {size} draws (observations x particles), "
            f"{duration(self.seconds)} each: {self.why}; {looks if self.held_out else 'no looks at held_out'}"
        )


def plan(
    experiment: Experiment,
    minutes: float,
    make: Callable[[Experiment], Trainer] = Experiment.gflownet,
    clock: Callable[[], float] = time.perf_counter,
) -> Plan:
    """Finds the observations, particles and steps with which training an experiment's guide takes so many minutes.

    It measures a few steps, whose time counts; afterwards guide and generator are unchanged.  The time is not a strict
    limit: a tenth is kept in reserve, and texts that become much longer take more than was measured.

    :param experiment: an experiment.
    :param minutes: how long training may take, > 0.
    :param make: makes the trainer of an experiment; by default its `GFlowNet`.
    :param clock: returns the time in seconds.
    :returns: a `Plan`.
    :raises ValueError: where not even one step fits; the message gives the minutes that would do.

    Example::

        from lmppl.models import EXPERIMENTS

        experiment = EXPERIMENTS["infilling"]()
        found = plan(experiment, minutes=0.5)
        experiment = found.of(experiment)
        experiment.gflownet().fit(experiment.batches, found.steps, **found.looks(experiment))
    """
    is_number("a positive number", lambda x: 0 < 60 * x < math.inf, minutes=minutes)
    began, recipe = clock(), experiment.recipe
    rows = min(len(task.batch(0)[0]) for task in experiment.tasks)
    least = Size(max(LEAST.observations, world().size), max(LEAST.particles, recipe.objective().least_particles))
    to_try = sizes(Size(min(rows, recipe.observations), recipe.particles), least)
    with as_it_was(experiment):

        @cache
        def cost(size: Size) -> float:
            seconds = _step(experiment.sized(*size), make, clock)
            return first_alone(lambda: seconds)  # the first process measures for all

        cost(to_try[0])
        own = _look(experiment, make, clock)
        look = first_alone(lambda: own)
        left = first_alone(lambda: 60 * minutes - (clock() - began))
        size, steps = choose(STEPS * left, cost, to_try, recipe.steps)
    held_out, every = looks(LOOKS * left, look, len(experiment.held_out[0]), steps)
    if steps < 1:
        raise ValueError(
            f"minutes: {minutes:g} are too few: a step of {size} draws takes {duration(cost(size))}, and measuring "
            f"that took {duration(60 * minutes - left)}; {ENOUGH} steps need about "
            f"{math.ceil(minutes - left / 60 + ENOUGH * cost(size) / STEPS / 60)} minutes"
        )
    return Plan(minutes, *size, steps, held_out, every, cost(size), _why(size, steps, to_try, recipe.steps))


def choose(seconds: float, cost: Callable[[Size], float], to_try: Sequence[Size], wanted: int) -> tuple[Size, int]:
    """The largest size for which the wanted number of steps fits, and how many steps of it fit.

    :param cost: a function from a size to the seconds of a step; called as long as larger sizes may fit.
    :param to_try: sizes, from the smallest on.
    """
    chosen = to_try[0]
    for size in to_try:
        if wanted * cost(size) > seconds:
            break
        chosen = size
    return chosen, max(0, math.floor(seconds / cost(chosen)))


def sizes(most: Size, least: Size = LEAST) -> list[Size]:
    """The sizes from the smallest to ``most``: each has half of the draws of the next.

    >>> [str(size) for size in sizes(Size(8, 16))]
    ['2 x 4', '2 x 8', '4 x 8', '4 x 16', '8 x 16']
    """
    found = [most]
    while True:
        m, n = found[0]
        fewer, each = m // 2 >= least.observations, n // 2 >= least.particles
        if not fewer and not each:
            return found
        more = m * least.particles >= n * least.observations  # more observations, relative to the least
        found.insert(0, Size(m // 2, n) if fewer and (more or not each) else Size(m, n // 2))


def looks(seconds: float, one: float, observations: int, steps: int) -> tuple[int, int]:
    """How many held-out observations to evaluate, and after how many steps each time, within so many seconds.

    :param one: seconds of the evaluation of one observation.
    """
    some = min(observations, math.floor(seconds / max(one, 1e-9) / (FEW_LOOKS + JUDGED)))
    if some < 1:
        return 0, max(1, steps)
    times = math.floor(seconds / max(one, 1e-9) / some) - JUDGED
    return some, max(EVERY, math.ceil(steps / times))


@contextmanager
def as_it_was(experiment: Experiment) -> Iterator[None]:
    """Restores the guide's parameters and the generator afterwards."""
    parameters = experiment.guide_lm.trainable_parameters()
    before = [p.detach().clone() for p in parameters]
    try:
        with forked():
            torch.manual_seed(0)
            yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
                p.grad = None


def _step(experiment: Experiment, make: Callable[[Experiment], Trainer], clock: Callable[[], float]) -> float:
    """Seconds of a step, the mean over tasks: the shorter of two, because the first may include work done once."""
    trainer, taken = make(experiment), []
    for task in experiment.tasks:
        own, both = trainer.on(task.model, task.guide), []
        for step in range(2):
            batch, began = task.batch(step), clock()
            own.step(*batch)
            both.append(clock() - began)
        taken.append(min(both))
    return sum(taken) / len(taken)


def _look(experiment: Experiment, make: Callable[[Experiment], Trainer], clock: Callable[[], float]) -> float:
    """Seconds of the evaluation of one held-out observation; several at once take at most as long each."""
    trainer, one, began = make(experiment), [x[:1] for x in experiment.held_out], clock()
    trainer.evaluate(*one)
    return clock() - began


def _why(size: Size, steps: int, to_try: Sequence[Size], wanted: int) -> str:
    if steps < min(ENOUGH, wanted):
        return f"the fewest draws, and still fewer than {min(ENOUGH, wanted)} steps, which seldom suffice"
    if steps < wanted:
        return f"the fewest draws, since the recipe's {wanted:,} steps do not fit"
    if size != to_try[-1]:
        return f"the most draws with which the recipe's {wanted:,} steps fit"
    return f"the recipe's size, with which {wanted:,} steps fit"
