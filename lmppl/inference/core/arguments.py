"""Checks of arguments: a ValueError names the argument, its value, and what was expected."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

import torch


def at_least(least: int, **counts: Any) -> None:
    """Each is an integer of at least ``least``."""
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: must be at least {least}, an integer, got {value!r}")


def instance_of(kind: type, **given: Any) -> None:
    """Each is an instance of ``kind``; a common mistake is to give the class itself, or its name."""
    for name, value in given.items():
        if not isinstance(value, kind):
            found = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
            raise ValueError(f"{name}: expected an instance of {kind.__name__}, got {found}")


def is_integer(**given: Any) -> None:
    """Each is an integer that can be combined with a step number into a generator's seed."""
    for name, value in given.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{name}: expected an integer, got {value!r}")
        if not -(2**43) < int(value) < 2**43:
            raise ValueError(f"{name}: expected an integer of at most 43 bits, got {value}")


def is_number(expected: str, holds: Callable[[Any], bool], **given: Any) -> None:
    """Each is a real number that satisfies ``holds``; NaN does not."""
    for name, value in given.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not holds(value):
            raise ValueError(f"{name}: must be {expected}, got {value!r}")


def is_path(**given: Any) -> None:
    """Each is a path, a string or `os.PathLike`."""
    for name, value in given.items():
        if not isinstance(value, str | os.PathLike):
            raise ValueError(f"{name}: expected a path, got {value!r}")


def one_of(choices: Iterable[str], **given: Any) -> None:
    """Each is one of the strings in ``choices``."""
    for name, value in given.items():
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def is_program(**given: Any) -> None:
    """Each is a Pyro program, so it can be called."""
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            shape = tuple(value.shape)
            raise ValueError(f"{name}: expected a Pyro program, got a tensor {shape}; data are arguments of .run(...)")
        if not callable(value):
            raise ValueError(f"{name}: expected a Pyro program, a function or a module, got {value!r}")


def steps_by_itself(**given: Any) -> None:
    """Each is a torch optimiser whose ``step()`` uses the gradients that are there and needs no closure."""
    for name, optimizer in given.items():
        if not isinstance(optimizer, torch.optim.Optimizer):
            kind = type(optimizer).__name__
            raise ValueError(f"{name}: expected an instance of torch.optim.Optimizer, got {kind}")
        try:
            inspect.signature(type(optimizer).step).bind(optimizer)  # a scheduler has wrapped optimizer.step
        except TypeError as error:
            raise ValueError(
                f"{name}: {type(optimizer).__name__} computes the loss again within a step, with new draws; use an "
                "optimiser whose step() needs no closure, for instance AdamW"
            ) from error


def plate_element(index: Any, plates: torch.Size) -> tuple[int, ...]:
    """The element of plates of these sizes that ``index`` names; None names the only one."""
    if index is None:
        if plates.numel() > 1:
            first = 0 if len(plates) == 1 else (0,) * len(plates)
            shape = tuple(plates)
            raise ValueError(f"index: name one element of the plates of shape {shape}, for instance index={first}")
        return (0,) * len(plates)
    found = index if isinstance(index, tuple | list) else (index,)
    if len(found) != len(plates) or not all(
        isinstance(i, Integral) and -n <= int(i) < n for i, n in zip(found, plates, strict=True)
    ):
        raise ValueError(f"index: expected {len(plates)} numbers within plates of shape {tuple(plates)}, got {index!r}")
    return tuple(int(i) for i in found)


def all_particles(element: tuple[int, ...]) -> tuple[Any, ...]:
    """The index of an element of the kept plates in a tensor (N, *plates, ...)."""
    return (slice(None), *element)
