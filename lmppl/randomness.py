"""Random numbers that do not depend on how a batch is shared out over processes.

Every process draws the numbers of the whole batch from the same generator and keeps those of its own observations, so
that an observation's draws are the same on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Observations ``start`` up to ``stop`` of the ``total`` along the plate whose axis is ``dim``, from the right."""

    start: int
    stop: int
    total: int
    dim: int
    rank: int

    @property
    def share(self) -> float:
        """Which fraction of the observations these are."""
        return (self.stop - self.start) / self.total


_PART: ContextVar[Part | None] = ContextVar("part", default=None)


def part() -> Part | None:
    """This process's part of the batch at hand; None where it has all of it."""
    return _PART.get()


@contextmanager
def partly(own: Part) -> Iterator[None]:
    """Inside, this process has ``own`` part of the batch."""
    token = _PART.set(own)
    try:
        yield
    finally:
        _PART.reset(token)


def uniform(
    shape: Sequence[int],
    *,
    right: int = 0,
    axis: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Numbers from [0, 1), of this shape: those of this process's observations.

    :param right: how many axes there are to the right of the plates' axes, which are the last ones otherwise.
    :param axis: the axis of the observations, where the shape has no plate axes of its own.
    """
    own, shape = _PART.get(), list(shape)
    if own is None:
        return torch.rand(shape, dtype=dtype, device=device)
    axis = len(shape) + own.dim - right if axis is None else axis
    count = own.stop - own.start
    if not 0 <= axis < len(shape) or shape[axis] != count:
        return torch.rand(shape, dtype=dtype, device=device)  # what all observations share
    shape[axis] = own.total
    return torch.rand(shape, dtype=dtype, device=device).narrow(axis, own.start, count)


@contextmanager
def apart() -> Iterator[None]:
    """Inside, a process that has a part of the batch draws from a generator of its own.

    For distributions that draw by themselves: how many random numbers they take is theirs to know.
    """
    own = _PART.get()
    if own is None:
        yield
        return
    seed = int(torch.randint(2**62, ()))
    with forked():
        torch.manual_seed(seed + own.rank)
        yield


@contextmanager
def forked() -> Iterator[None]:
    """Leaves the generators of the CPU and of the accelerator in use as they were."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
