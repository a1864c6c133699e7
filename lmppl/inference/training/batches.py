"""What `fit` takes as batches: whatever it is, found by the step."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

EXPECTED = "a list of tuples of arguments, [(x, y), ...], a DataLoader, or a function of the step"


def readable(batches: Any, seed: int = 0) -> Any:
    """A sequence, or a function of the step, that gives the batches of whatever ``batches`` is.

    Several tasks, ``(model, guide, batches)`` each, are read one by one.

    :raises ValueError: saying what to write instead, where no batches can be found.
    """
    if isinstance(batches, type) or batches is None or isinstance(batches, Tensor | Mapping | str | bytes):
        raise ValueError(f"batches: expected {EXPECTED}, got {_name(batches)}")
    if isinstance(batches, Dataset):
        raise ValueError(
            f"batches: {_name(batches)} holds single observations; put them together, DataLoader(dataset, batch_size=8)"
        )
    if callable(batches):
        _takes_a_step(batches)
        return batches
    if hasattr(batches, "__getitem__") and hasattr(batches, "__len__"):
        if len(batches) and all(map(is_task, batches)):
            return [(model, guide, readable(own, seed)) for model, guide, own in batches]
        _hold_arguments(batches)
        return batches
    if not isinstance(batches, Iterable):
        raise ValueError(f"batches: expected {EXPECTED}, got {batches!r}")
    return Stream(batches, seed)


def is_task(found: Any) -> bool:
    """Whether it is (model, guide, batches) rather than the arguments of one step."""
    return isinstance(found, tuple | list) and len(found) == 3 and callable(found[0]) and callable(found[1])


def arguments(batch: Any) -> tuple[Any, ...]:
    """One batch, as the arguments of model and guide."""
    if not isinstance(batch, tuple | list):
        raise ValueError(f"batches: each is a tuple of arguments of model and guide, [(x, y), ...]; got {_name(batch)}")
    return tuple(batch)


class Stream:
    """The batches of an iterable, as a function of the step; after its end it is read anew.

    Every read draws from a generator seeded by (seed, step), a `DataLoader`'s shuffling too, so that a resumed run
    meets the batches of an uninterrupted one (it reads past those that it does not use).  An iterator, a generator for
    instance, can be read once only.
    """

    def __init__(self, batches: Iterable[Any], seed: int = 0):
        self.batches, self.seed = batches, seed
        self._iterator: Iterator[Any] | None = None
        self._next, self._last = 0, ()

    def __call__(self, step: int) -> tuple[Any, ...]:
        if step < self._next - 1:
            self._iterator, self._next = None, 0
        while self._next <= step:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed * 1_000_003 + self._next)
                self._last = self._read()
            self._next += 1
        return self._last

    def _read(self) -> tuple[Any, ...]:
        fresh = self._iterator is None
        for _ in range(2):
            self._iterator = iter(self.batches) if self._iterator is None else self._iterator
            for batch in self._iterator:
                return (batch,) if isinstance(batch, Tensor) else arguments(batch)
            if fresh or self._iterator is self.batches:
                break
            self._iterator, fresh = None, True
        read = f"it ended after {self._next} batches, and training goes on" if self._next else "there is no batch in it"
        raise ValueError(f"batches: {read}; give {EXPECTED}")


def _hold_arguments(batches: Any) -> None:
    """Of a list or tuple: each item is the arguments of one step."""
    if not isinstance(batches, list | tuple):
        return
    if not batches:
        raise ValueError("batches: there is no batch to train on")
    wrong = next((b for b in batches if not isinstance(b, list | tuple)), None)
    if wrong is None:
        return
    if isinstance(batches, tuple):
        raise ValueError(f"batches: a tuple that holds {_name(wrong)} is one batch; write a list of them, [(x, y)]")
    arguments(wrong)


def _takes_a_step(function: Any) -> None:
    try:
        inspect.signature(function).bind(0)
    except TypeError as error:
        raise ValueError(f"batches: a function is called with the step alone, {_name(function)}: {error}") from error
    except ValueError:  # built in, without a signature
        return


def _name(x: Any) -> str:
    kind = x.__name__ if isinstance(x, type) else type(x).__name__
    if isinstance(x, type):
        return f"the class {kind}"
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"
