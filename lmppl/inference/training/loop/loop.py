"""The loop of a training run: batches, updates, evaluations, log, checkpoints, and the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import gcd
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

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
    said: str = field(default="", init=False)  # the last verdict

    def run(self, start: int, name: str, progress: bool) -> None:
        """Makes all steps from ``start`` on."""
        turns = len(self.tasks) // gcd(len(self.tasks), self.accumulate)
        cost = Forecast(start, self.steps, self.spent, self.looks, self.checkpoint_every, turns, self.may_end)
        with _bar(name, progress) as bar, self.rates, self.descent.over(self.accumulate):
            shown = bar.add_task("", total=self.steps, completed=start)
            for step in range(start, 0 if self.stops.ended else self.steps):
                before = self.spent.mark()
                stopped = self.step(step)
                bar.update(shown, advance=1, description=self._description())
                if stopped:
                    break
                if "skipped" not in self.history[-1]:  # a skipped step costs less
                    self.spent.add(before)
                _say(cost(step + 1), bar)
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

    def _description(self) -> str:
        """What the progress bar says: the last verdict, and numbers, not what else a callback has added."""
        metrics = self.history[-1]
        if "verdict" in metrics:
            evidence = f", log Z {metrics['held_out_log_z']:.2f}" if "held_out_log_z" in metrics else ""
            self.said = f"{metrics['verdict']}{evidence}  "
        return self.said + shown(metrics)


def shown(metrics: Mapping[str, Any]) -> str:
    """The first metrics, in a line."""
    return "  ".join(f"{k} {v:.3f}" for k, v in metrics.items() if isinstance(v, int | float))[:60]


def _say(line: str, bar: Progress) -> None:
    """Above the bar, and in the log of the program."""
    if line and distributed.world().rank == 0:
        logger.info(line)
        if not bar.disable:
            bar.console.print(Text(line), soft_wrap=True)


@contextmanager
def _bar(name: str, progress: bool) -> Iterator[Progress]:
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    first = distributed.world().rank == 0
    with Progress(*columns, TimeRemainingColumn(), disable=not (progress and first)) as bar:
        yield bar
