"""What `fit` takes as batches, in one form: the batch of each step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ...core.arguments import at_least
from ...core.programs import Program
from ...core.query import Query

Batches: TypeAlias = Iterable[tuple[Any, ...]] | Callable[[int], tuple[Any, ...]] | Dataset[Any]
BATCH_SIZE = 8  # of a Dataset
EXPECTED = "a list of tuples of arguments, [(x, y), ...], a DataLoader, a Dataset, or a function of the step"


class Task(NamedTuple):
    """One of several problems whose steps take turns in one `Trainer.fit`, training the same parameters.

    :param model: a Pyro program.
    :param guide: a Pyro program with the model's latent sites.
    :param batches: a list of tuples of arguments, or a function of the step that returns one.

    Example::

        tasks = [Task(model, guide, [(x, y)]), Task(model, guide, [(other_questions, y)])]
        gflownet.fit(tasks, steps=100)
    """

    model: Program
    guide: Program
    batches: Batches

    def batch(self, step: int) -> tuple[Any, ...]:
        """The arguments of model and guide at a step.

        :param step: the number of the step of this task, from 0.
        :returns: a tuple.
        """
        batches: Any = self.batches
        return arguments(batches(step) if callable(batches) else batches[step % len(batches)])

    def query(self, step: int) -> Query:
        """The query of a step: model, guide and a batch.

        :param step: the number of the step of this task, from 0.
        """
        return Query(self.model, self.guide, self.batch(step))


def readable(batches: Any, seed: int = 0, batch_size: int | None = None) -> Any:
    """A sequence of batches, or a function of the step that returns one, for anything that `fit` accepts.

    Several tasks, ``(model, guide, batches)`` each, are converted one by one.  ``batch_size`` is that of a `Dataset`.

    :raises ValueError: with what to write instead, where no batches can be found.
    """
    if isinstance(batches, type) or batches is None or isinstance(batches, Tensor | Mapping | str | bytes):
        raise ValueError(f"batches: expected {EXPECTED}, got {_name(batches)}")
    if batch_size is not None:
        at_least(1, batch_size=batch_size)
    if isinstance(batches, Dataset):
        return Stream(loader(batches, batch_size or BATCH_SIZE), seed)
    if batch_size is not None and not _has_a_dataset(batches):
        raise ValueError(f"batch_size: it is for a Dataset only; {_name(batches)} has batches already")
    if callable(batches):
        _takes_a_step(batches)
        return batches
    if hasattr(batches, "__getitem__") and hasattr(batches, "__len__"):
        if len(batches) and all(map(is_task, batches)):
            return [
                (model, guide, readable(own, seed, batch_size if isinstance(own, Dataset) else None))
                for model, guide, own in batches
            ]
        _hold_arguments(batches)
        return batches
    if not isinstance(batches, Iterable):
        raise ValueError(f"batches: expected {EXPECTED}, got {batches!r}")
    return Stream(batches, seed)


def loader(dataset: Dataset[Any], batch_size: int) -> DataLoader[Any]:
    """An ordinary DataLoader with shuffled observations (if they can be shuffled) and torch's ``default_collate``.

    :raises ValueError: where there are no observations; when it is read, where they cannot be collated.
    """
    if isinstance(dataset, Sized) and not len(dataset):
        raise ValueError(f"batches: there is nothing in {_name(dataset)}")
    shuffle = not isinstance(dataset, IterableDataset)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, collate_fn=_collated)


def _collated(observations: list[Any]) -> Any:
    try:
        return default_collate(observations)
    except (RuntimeError, TypeError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"batches: the observations of a Dataset cannot be put together ({said}); pad texts to one length, "
            "lmppl.text.pad, or give DataLoader(dataset, collate_fn=...) with a function of your own"
        ) from error


def _has_a_dataset(batches: Any) -> bool:
    """Whether one of several tasks has its observations in a Dataset."""
    found: Any = batches if isinstance(batches, list | tuple) and all(map(is_task, batches)) else ()
    return any(isinstance(own, Dataset) for _, _, own in found)


def is_task(found: Any) -> bool:
    """Whether this is (model, guide, batches) and not the arguments of one step."""
    return isinstance(found, tuple | list) and len(found) == 3 and callable(found[0]) and callable(found[1])


def arguments(batch: Any) -> tuple[Any, ...]:
    """The arguments of model and guide in a batch."""
    if not isinstance(batch, tuple | list):
        raise ValueError(f"batches: each is a tuple of arguments of model and guide, [(x, y), ...]; got {_name(batch)}")
    return tuple(batch)


class Stream:
    """The batches of an iterable, as a function of the step; after its end it is read again from the beginning.

    Every read draws from a generator seeded by (seed, step), the shuffling of a `DataLoader` included.  So a resumed
    run meets the batches of an uninterrupted one (it reads the batches before its first step and drops them).  An
    iterator, such as a generator, can be read once only.
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
        read = f"it ended after {self._next} batches, before the last step" if self._next else "there is no batch in it"
        raise ValueError(f"batches: {read}; give {EXPECTED}")


def _hold_arguments(batches: Any) -> None:
    """Checks that each item of a list or tuple is the arguments of one step."""
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
    except ValueError:  # a builtin without a signature
        return


def _name(x: Any) -> str:
    kind = x.__name__ if isinstance(x, type) else type(x).__name__
    if isinstance(x, type):
        return f"the class {kind}"
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"
