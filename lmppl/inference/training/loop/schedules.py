"""Numbers that change during training: a schedule is a number, or a function of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Schedule: TypeAlias = float | Callable[[int], float]


def at(schedule: Schedule, step: int) -> float:
    """The schedule's value at a step."""
    return schedule(step) if callable(schedule) else schedule


def linear(start: float, end: float, steps: int) -> Callable[[int], float]:
    """A schedule from ``start`` to ``end`` in ``steps`` steps, constant afterwards.

    >>> [linear(2.0, 1.0, 4)(t) for t in (0, 2, 4, 9)]
    [2.0, 1.5, 1.0, 1.0]
    """
    if steps < 1:
        raise ValueError(f"steps: must be at least 1, got {steps}")
    return lambda step: end if step >= steps else start + (end - start) * step / steps


def warmed(step: int, steps: int, warmup: int) -> float:
    """The factor of the learning rate: up to 1 in ``warmup`` steps, at most half of all, then down towards 0.

    >>> [round(warmed(t, 5, 20), 2) for t in range(5)]
    [0.33, 0.67, 1.0, 0.67, 0.33]
    """
    top = max(1, min(warmup, (steps + 1) // 2))  # steps that rise, the last one to 1
    return min((step + 1) / top, (steps - step) / (steps - top + 1))


def checked(schedule: Schedule, name: str, holds: Callable[[float], bool], otherwise: str) -> Schedule:
    """The schedule, if its value satisfies ``holds``; a function is checked at every call."""
    if not callable(schedule):
        if not isinstance(schedule, int | float) or not holds(schedule):
            raise ValueError(f"{name}: {otherwise}, got {schedule!r}")
        return schedule

    def function(step: int) -> float:
        value = schedule(step)
        if not holds(value):
            raise ValueError(f"{name}: {otherwise}, got {value} at step {step}")
        return value

    return function
