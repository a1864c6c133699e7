"""Random numbers that do not depend on how a batch is divided among processes.

Every process draws the numbers of the whole batch from the same generator and keeps those of its own observations. So
an observation's draws are the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Observations ``start`` up to ``stop`` of ``total``, along the plate axis ``dim``, counted from the right."""

    start: int
    stop: int
    total: int
    dim: int
    rank: int

    @property
    def share(self) -> float:
        """The fraction of the observations in this part."""
        return (self.stop - self.start) / self.total


_PART: ContextVar[Part | None] = ContextVar("part", default=None)


def part() -> Part | None:
    """Returns this process's part of the current batch; None if it has the whole batch."""
    return _PART.get()


@contextmanager
def partly(own: Part) -> Iterator[None]:
    """Inside, this process has the part ``own`` of the batch."""
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
    """Returns numbers from [0, 1) of this shape, for this process's observations.

    :param shape: the shape of the result.
    :param right: the number of axes to the right of the plates' axes.
    :param axis: the axis of the observations, if the shape has no plate axes of its own.
    :param dtype: as of `torch.rand`.
    :param device: likewise.
    """
    own, shape = _PART.get(), list(shape)
    if own is None:
        return torch.rand(shape, dtype=dtype, device=device)
    axis = len(shape) + own.dim - right if axis is None else axis
    count = own.stop - own.start
    if not 0 <= axis < len(shape) or shape[axis] != count:
        return torch.rand(shape, dtype=dtype, device=device)  # shared by all observations
    shape[axis] = own.total
    return torch.rand(shape, dtype=dtype, device=device).narrow(axis, own.start, count)


@contextmanager
def apart() -> Iterator[None]:
    """Inside, a process that has a part of the batch draws from a generator of its own.

    It is for distributions that draw by themselves: nobody else knows how many random numbers they take.
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
    """Restores the generators of the CPU and of the current accelerator at the end."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
