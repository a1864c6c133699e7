"""The loop of a training run: batches, updates, evaluations, log, checkpoints, and the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any

from ....progress import Progress, progress
from ...core.query import Query
from ...processes import distributed
from .batches import Task
from .cost import Forecast, Spent
from .descent import Descent, mean
from .evaluation import Looks
from .rates import Rates
from .record import Record
from .saving import Saving, seeded
from .stopping import Stops
from .trackers import Trackers

UNINTERESTING = {"grad_norm", "skipped"}
MOST_SKIPPED = 10  # steps in a row whose loss or gradient is not finite
Update = Callable[[Query, int], dict[str, float]]

logger = logging.getLogger("lmppl")


@dataclass
class Loop:
    """The steps of one `fit`; each part of a step is an object of its own."""

    update: Update  # of a batch and the step: the metrics
    descent: Descent
    tasks: Sequence[Task]
    steps: int
    seed: int
    accumulate: int
    rates: Rates
    looks: Looks
    stops: Stops
    record: Record
    saving: Saving
    trackers: Trackers
    history: list[dict[str, Any]]
    checkpoint_every: int
    spent: Spent
    may_end: bool  # before its last step
    said: tuple[str, str] = field(default=("", ""), init=False)  # the last verdict, and why

    def run(self, start: int, name: str, shown: bool) -> None:
        """Makes all steps from ``start`` on."""
        turns = len(self.tasks) // gcd(len(self.tasks), self.accumulate)
        cost = Forecast(start, self.steps, self.spent, self.looks, self.checkpoint_every, turns, self.may_end)
        first = distributed.world().rank == 0
        bar = progress(name, self.steps, done=start, shown=shown and first)
        with bar as told, self.rates, self.descent.over(self.accumulate):
            for step in range(start, 0 if self.stops.ended else self.steps):
                before = self.spent.mark()
                stopped = self.step(step)
                told.update(self._figures())
                if stopped:
                    break
                if "skipped" not in self.history[-1]:  # a skipped step costs less
                    self.spent.add(before)
                _say(cost(step + 1), told)
        self.stops.finish()

    def step(self, step: int) -> bool:
        """Makes one step; returns whether training ends with it."""
        seeded(self.seed, step)
        self.rates.begin(step)
        metrics: dict[str, Any] = self._tried(step)
        self.rates.end(updated="skipped" not in metrics)
        if self.looks.at(step):
            with self.spent.on(self.spent.looks):
                metrics |= self.looks(step)
        self.history.append(metrics)
        stopped = False
        try:
            stopped = self.stops(step, metrics)
        finally:
            self.record.write(step, metrics)
        self.trackers.write(step, metrics)
        told = self.record.told()
        if told or stopped or (step + 1) % self.checkpoint_every == 0 or step + 1 == self.steps:
            self.rates.rest()
            with self.spent.on(self.spent.saves):
                self.saving.save(step + 1)
        if told:
            self.record.end(told)
        return stopped

    def _tried(self, step: int) -> dict[str, float]:
        """The metrics of a step, or those of a skipped step where nothing could be updated."""
        try:
            return mean([self._one(number, step) for number in self._numbers(step)])
        except FloatingPointError as error:
            before = ["skipped" in metrics for metrics in self.history[1 - MOST_SKIPPED :]]
            if len(before) == MOST_SKIPPED - 1 and all(before):
                raise FloatingPointError(
                    f"{MOST_SKIPPED} steps in a row, the last one {step}, updated nothing: {error}; lower the "
                    "learning rate, load the weights in float32, or look for factors that are NaN or infinite"
                ) from error
            if not (before and before[-1]):
                logger.warning("step %d is skipped: %s", step, error)
            return {"loss": math.nan, "skipped": 1.0}

    def _numbers(self, step: int) -> range:
        """The numbers of the batches that a step takes."""
        return range(step * self.accumulate, (step + 1) * self.accumulate)

    def _one(self, number: int, step: int) -> dict[str, float]:
        """The metrics of one batch; the last one of a step updates."""
        task = self.tasks[number % len(self.tasks)]
        found = self.update(task.query(number // len(self.tasks)), step)
        if self.accumulate > 1 and self.descent.done != (number + 1) % self.accumulate:
            raise ValueError("accumulate: an update has to call `descend` exactly once, and step in no other way")
        return found

    def _figures(self) -> str:
        """What progress says: the last verdict with log Z, the first metrics, and the reason of the verdict."""
        metrics = self.history[-1]
        if "verdict" in metrics:
            word, _, why = metrics["verdict"].partition(": ")
            evidence = [f"log Z {metrics['held_out_log_z']:.2f}"] if "held_out_log_z" in metrics else []
            self.said = ", ".join([word, *evidence]), f" ({why})" if why else ""
        verdict, why = self.said
        return ", ".join(filter(None, [verdict, figures(metrics)])) + why


def figures(metrics: Mapping[str, Any], most: int = 2) -> str:
    """The first numbers of the metrics: the loss, and what an algorithm names next.

    >>> figures({"loss": 0.5, "grad_norm": 3.0, "sd_u": 0.25, "impossible": 0.0})
    'loss 0.500, sd_u 0.250'
    """
    numbers = [(k, v) for k, v in metrics.items() if isinstance(v, int | float) and k not in UNINTERESTING]
    return ", ".join(f"{name} {value:.3f}" for name, value in numbers[:most])


def _say(line: str, told: Progress) -> None:
    """Beside the progress, and in the log of the program."""
    if line and distributed.world().rank == 0:
        logger.info(line)
        told.say(line)
