"""Where a run goes on from, and what its checkpoints hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ....randomness import forked
from ...core.packed import pack, unpack
from ...processes import distributed
from . import checkpoint as checkpoints
from .batches import Task
from .identity import digest, fingerprint, name_of
from .record import Record

SEEDS = 1_000_003  # apart are the generators of one run's steps and another's


def seeded(seed: int, step: int) -> None:
    """Let every step draw from a generator of its own."""
    torch.manual_seed(seed * SEEDS + step)


class Part(Protocol):
    """Something that changes while a run lasts: what it was is saved, nested lists and dicts of numbers and tensors."""

    def state(self) -> Any:
        """None where there is nothing to keep."""

    def restore(self, state: Any) -> None:
        """Take up what `state` gave."""


class Saving:
    """The checkpoints of one run of a trainer.

    :param of: what the run is of, see `identity`.
    :param parts: what is saved beside the trainer and its optimisers, by name.
    """

    def __init__(self, trainer: Any, record: Record, of: Mapping[str, Any], parts: Mapping[str, Part]):
        self.trainer, self.record, self.of, self.parts = trainer, record, of, parts

    def take_up(self) -> int:
        """The step to go on from: that of the checkpoint, if there is one; else one is written."""
        start, saved, record, trainer = 0, None, self.record, self.trainer
        if record.where is not None and checkpoints.exists(record.where):
            saved, tensors = checkpoints.load(record.where, trainer.optimizers, self.of)
            start, trainer.training_tokens = saved["step"], saved["training_tokens"]
            trainer.restore(tensors, saved.get("own", {}))
            for name, state in saved.get("parts", {}).items():
                if name in self.parts:
                    self.parts[name].restore(unpack(state, tensors))
        if not distributed.agree(start):
            raise ValueError("checkpoint: not all processes find the same one; they need a file system in common")
        record.begin(saved)
        if saved is None:
            self.save(0)  # from now on the directory is this run's
        return start

    def save(self, step: int) -> None:
        """Write a checkpoint after so many steps, where there is a place for it."""
        if self.record.where is None:
            return
        tensors, own = self.trainer.state()
        extra = {"of": self.of, "training_tokens": self.trainer.training_tokens, "own": own, "log": self.record.log}
        kept: dict[str, Tensor] = {}
        packed = {}
        for name, part in self.parts.items():
            try:
                if (state := part.state()) is not None:
                    packed[name] = pack(state, f"parts.{name}", kept)
            except TypeError as error:
                raise ValueError(f"{name}: it keeps {error}, which no checkpoint can hold") from error
        if packed:
            extra["parts"] = packed
        checkpoints.save(self.record.where, self.trainer.optimizers, step, extra, {**tensors, **kept})


def data_and_networks(trainer: Any, tasks: Sequence[Task], seed: int) -> dict[str, Any]:
    """The programs, the data and the language models that a run is of."""
    of: dict[str, Any] = {}
    data: list[Any] = []
    networks: list[Any] = []
    batches: Any
    with forked():
        for i, task in enumerate(tasks):
            seeded(seed, 0)
            query, batches = task.query(0), task.batches
            data.append(query.args if callable(batches) else list(batches))
            of |= {f"program {i}": name_of(task.model), f"guide {i}": name_of(task.guide)}
            networks += replace(query, args=trainer.arguments(query.args, {})).networks
    distinct = {id(network): network for network in networks}.values()
    trained = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
    return of | {"data": digest(data), "language model": fingerprint(distinct, trained)}
