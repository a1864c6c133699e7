"""Where a run resumes, and what its checkpoints hold."""

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

SEEDS = 1_000_003  # distance between the seeds of two runs, so that their steps' seeds differ


def seeded(seed: int, step: int) -> None:
    """Seeds the generator by (seed, step)."""
    torch.manual_seed(seed * SEEDS + step)


class Part(Protocol):
    """Something that changes during a run and is saved: as nested lists and dicts of numbers and tensors."""

    def state(self) -> Any:
        """What to save; None where there is nothing."""

    def restore(self, state: Any) -> None:
        """Restores what `state` returned."""


class Saving:
    """The checkpoints of one run of a trainer.

    :param of: the identity of the run, see `loop.identity`.
    :param parts: what is saved beside the trainer and its optimisers, by name.
    """

    def __init__(self, trainer: Any, record: Record, of: Mapping[str, Any], parts: Mapping[str, Part]):
        self.trainer, self.record, self.of, self.parts = trainer, record, of, parts

    def take_up(self) -> int:
        """The step to begin with: that of the checkpoint; where there is none, 0, and a checkpoint is written."""
        start, saved, record, trainer = 0, None, self.record, self.trainer
        if record.where is not None and checkpoints.exists(record.where):
            saved, tensors = checkpoints.load(record.where, trainer.optimizers, self.of)
            start, trainer.training_tokens = saved["step"], saved["training_tokens"]
            trainer.restore(tensors, saved.get("own", {}))
            for name, state in saved.get("parts", {}).items():
                if name in self.parts:
                    self.parts[name].restore(unpack(state, tensors))
        if not distributed.agree(start):
            raise ValueError("checkpoint: the processes find different ones; they need a shared file system")
        record.begin(saved)
        if saved is None:
            self.save(0)  # the directory belongs to this run now
        return start

    def save(self, step: int) -> None:
        """Writes a checkpoint after so many steps, where a directory is given."""
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
    """The part of a run's identity that is not settings: programs, data and language models."""
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
