"""`Trainer`: what every algorithm that trains a guide shares; each says only how to make one update."""

from __future__ import annotations

import copy
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim import Optimizer

from ...randomness import Part, forked
from .. import distributed, programs
from ..algorithm import OnPrograms
from ..arguments import at_least, is_integer, is_path, is_program, steps_by_itself
from ..importance import Importance
from ..posterior.posterior import Posterior, effective_sample_size
from ..programs import Program
from ..query import Query
from ..sharded import plate_of
from ..sites import text_of
from ..weights import weigh
from . import checkpoint as checkpoints
from .batches import arguments, is_task, readable
from .identity import digest, fingerprint, name_of, settings
from .ownership import Owners
from .record import Record
from .schedules import warmed
from .verdict import REMEDY, judge, reasons

Arguments: TypeAlias = Callable[[tuple[Any, ...]], tuple[Any, ...]]  # of a batch, what programs are called with
Batches: TypeAlias = Iterable[tuple[Any, ...]] | Callable[[int], tuple[Any, ...]]
MOST_SKIPPED = 10  # steps in a row whose loss or gradient is not finite

logger = logging.getLogger("lmppl")


class StopTraining(StopIteration):
    """Raised by a callback of `Trainer.fit`: training ends after this step, as if it had been the last one."""


class Task(NamedTuple):
    """One of several problems that share an adapter: their steps take turns."""

    model: Program
    guide: Program
    batches: Batches

    def batch(self, step: int) -> tuple[Any, ...]:
        batches: Any = self.batches
        return arguments(batches(step) if callable(batches) else batches[step % len(batches)])


class Trainer(OnPrograms, ABC):
    """Updates a guide's parameters; owns the loop, the clipping, the log, the checkpoints and the count of tokens.

    :param model: a Pyro program.
    :param guide: a Pyro program with the model's latent sites, whose trainable parameters the optimiser holds.
    :param optimizer: a torch optimiser over all of them, and nothing of the model; what is not to train is frozen,
        ``parameter.requires_grad_(False)``.
    :param clip: the largest gradient norm.
    :param max_plate_nesting: guessed where not given.

    ``training_tokens`` counts the tokens that its steps have sent through the network; ``history`` has the metrics of
    every step of the last `fit`, also of one that an exception has ended.
    """

    guide: Program
    draws = 64  # particles of an answer, see `sized`

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        optimizer: Optimizer,
        clip: float = 1.0,
        max_plate_nesting: int | None = None,
    ):
        steps_by_itself(optimizer=optimizer)
        is_program(model=model, guide=guide)
        if not clip > 0:
            raise ValueError(f"clip: must be positive, got {clip}")
        self.model, self.guide, self.optimizer, self.clip = model, guide, optimizer, clip
        self.max_plate_nesting = max_plate_nesting
        self.training_tokens = 0
        self.history: list[dict[str, float]] = []
        self._steps = 0  # taken by `step`, one by one: what schedules are asked about
        self._networks: dict[tuple[Program, Program], list[Any]] = {}
        self._dims: dict[tuple[Program, Program], int] = {}
        self._unchecked: Owners | None = None  # until the optimiser is seen to hold what a loss reaches
        self._watched: dict[tuple[Program, Program], frozenset[int]] = {}  # with which of Pyro's parameters
        self._alike = False  # whether all processes are known to have the same parameters

    @abstractmethod
    def update(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], step: int
    ) -> dict[str, float]:
        """One update of the parameters; its metrics, "loss" among them."""

    def arguments(self, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Of a batch, what model and guide are called with."""
        return batch

    def descend(self, loss: Tensor) -> float:
        """One step of the optimiser down this loss; the norm of its gradient before clipping.

        :raises FloatingPointError: where the loss or its gradient is not finite; the parameters are then as before.
        :raises ValueError: where the optimiser does not hold what the loss reaches.
        """
        if self._unchecked is not None:
            self._unchecked.check_loss(loss, self.parameters)
            self._unchecked = None
        self.optimizer.zero_grad(set_to_none=True)
        loss = distributed.share() * loss
        if not math.isfinite(value := distributed.total(loss.item())):
            raise FloatingPointError(f"the loss is {value}; nothing was updated")
        loss.backward()
        distributed.sum_gradients(self.parameters)
        norm = distributed.whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)).item()
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(f"the loss is {value}, its gradient's norm {norm}; nothing was updated")
        self.optimizer.step()
        return norm

    def watch(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        optimizer: str = "optimizer",
    ) -> None:
        """Refuse an optimiser that holds parameters of the model, or not all of the guide's; the next loss tells more.

        Of another task's guide than the trainer's own, a warning says what is not held.

        ``args``: what model and guide are called with; ``optimizer``: what a message calls it.

        :raises ValueError: with their names.
        """
        owners = Owners.of(model, guide, args, kwargs)
        owners.check_target(self.parameters, optimizer)
        self._unchecked = None
        try:
            owners.check_guide(self.parameters, optimizer)
        except ValueError as error:
            if guide == self.guide:
                raise
            logger.warning("a task does not train: %s", error)
            return
        sharded = any(distributed.is_sharded(p) for p in self.parameters)  # autograd knows these by what is gathered
        self._unchecked = None if sharded else owners

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimiser holds."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def optimizers(self) -> list[Optimizer]:
        """All whose learning rates `fit` schedules and whose state it saves."""
        return [self.optimizer]

    @property
    def density(self) -> Program:
        """The program whose density approximates the posterior."""
        return self.guide

    def step(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """One update on the observations ``args``; what there is to know of it.

        On several processes each has its part of them, as in `fit`.

        :raises FloatingPointError: where the loss or its gradient is not finite; the parameters are then as before.
        :raises ValueError: where the optimiser holds parameters of the model, or not all of the guide's.
        """
        self._steps += 1
        return self._counted(Task(self.model, self.guide, [args]), args, kwargs, self._steps - 1)

    def _counted(self, task: Task, args: tuple[Any, ...], kwargs: dict[str, Any], step: int) -> dict[str, float]:
        model, guide = task.model, task.guide
        dim = self._plate(model, guide, args, kwargs, lambda batch: self.arguments(batch, kwargs))
        with distributed.shard(args, dim) as args:
            if not self._alike:
                distributed.broadcast([p for o in self.optimizers for g in o.param_groups for p in g["params"]])
                self._alike = True
            if (model, guide) not in self._networks:
                given = self.arguments(args, kwargs)
                both = [n for p in (model, guide) for n in programs.networks(p, given, kwargs)]
                self._networks[model, guide] = list({id(n): n for n in both}.values())
            if self._watched.get((model, guide)) != frozenset(map(id, programs.stored())):
                self.watch(model, guide, self.arguments(args, kwargs), kwargs)
                self._watched[model, guide] = frozenset(map(id, programs.stored()))
            networks = self._networks[model, guide]
            before = sum(network.tokens_scored for network in networks)
            metrics = self.update(model, guide, args, kwargs, step)
            self.training_tokens += distributed.total(sum(network.tokens_scored for network in networks) - before)
            return distributed.average(metrics)

    def _held_out(self, args: tuple[Any, ...]) -> dict[str, float]:
        """`evaluate`, each process on its part."""
        dim = self._plate(self.model, self.guide, args, {}, lambda batch: batch)
        with distributed.shard(args, dim, few=True) as own:
            return distributed.average(self.evaluate(*own))

    def _plate(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Arguments
    ) -> Callable[[tuple[Any, ...], Part], int]:
        """What finds the axis of the observations' plate, once for each pair of programs."""

        def dim(own: tuple[Any, ...], part: Part) -> int:
            if (model, guide) not in self._dims:
                both = (lambda: arguments(args)), (lambda: arguments(own))
                self._dims[model, guide] = plate_of(model, guide, both, kwargs, part, self.max_plate_nesting)
            return self._dims[model, guide]

        return dim

    def fit(
        self,
        batches: Batches | Sequence[Task],
        steps: int,
        *,
        seed: int = 0,
        warmup: int = 20,
        held_out: tuple[Any, ...] | None = None,
        evaluate_every: int = 50,
        log: str | Path | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 100,
        progress: bool = True,
        callback: Callable[[int, dict[str, float]], None] | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> list[dict[str, float]]:
        """``steps`` updates: the learning rate rises to what was set in ``warmup`` steps, then falls on a line to zero.

        A step whose loss or gradient is not finite updates nothing: its metrics are the loss, NaN, and "skipped", 1
        (in the log null and 1), and a warning says why.  `MOST_SKIPPED` of them in a row end the training.

        Started by `torchrun`, every process is given the same batches and takes its part of each one's observations,
        the first axis of every argument; metrics and gradients are those of the whole batch, and the first process
        alone writes and shows progress (``callback`` is called on all). See docs/scale.md.

        :param batches: tuples of arguments, taken in turn; a `DataLoader` or anything else to iterate over, read again
            when it ends (an iterator cannot be); or a function of the step.  Or several ``(model, guide, batches)``
            that share the parameters, whose steps take turns.
        :param warmup: at most half of the steps.
        :param seed: each step draws from a generator seeded by (seed, step), so that a resumed run repeats an
            uninterrupted one; the caller's generator is left as it was.
        :param held_out: arguments on which on-policy sd(u), zero at the posterior, ESS/N, lengths and stop
            probabilities are measured.
        :param log: a file that gets a JSON line every step; a resumed run cuts off what was not saved, so that its log
            is that of an uninterrupted run.
        :param checkpoint: a directory, written every ``checkpoint_every`` steps, at the beginning, at the end and on
            SIGINT or SIGTERM (which then end the program; a second one does so at once), and resumed from where it
            exists: with everything that the optimisers keep.  Other files in it are left alone.
        :param callback: called with the step and its metrics before they are logged; what it adds to them (numbers,
            strings, what JSON can hold) is logged too.  It ends the training by raising `StopTraining` (or
            StopIteration): the step counts, its checkpoint is written, and `fit` returns.  After any other exception
            the guide is as the step left it, and the metrics so far are in the log and in ``history``.
        :param identity: what else the run is of, {"model": "infilling", ...}, numbers and strings.  A checkpoint is
            taken up by a run of the same identity, trainer and settings, programs by their names, seed, data, language
            model (base weights that do not train) and optimisers; by any other number of steps.
        :returns: the metrics of every step run by this call.

        At the end a warning says where the guide is not the posterior (most of the last training draws were impossible;
        on ``held_out`` a small ESS, a large k-hat, or mass that the guide misses, all in the log's last line), and what
        to try.

        :raises ValueError: where checkpoint or log are of another run, damaged, or no such files (nothing is changed);
            where there are no batches; where the optimiser holds parameters of the model, or not all of the guide's.
        :raises FloatingPointError: where nothing was updated in `MOST_SKIPPED` steps in a row.
        :raises LockedError: an OSError, where another process trains into them.
        """
        is_integer(seed=seed)
        at_least(1, steps=steps, evaluate_every=evaluate_every, checkpoint_every=checkpoint_every)
        at_least(0, warmup=warmup)
        is_path(**{name: path for name, path in (("log", log), ("checkpoint", checkpoint)) if path is not None})
        if callback is not None and not callable(callback):
            raise ValueError(f"callback: expected a function of the step and its metrics, got {callback!r}")
        if held_out is not None and not isinstance(held_out, tuple | list):
            raise ValueError(f"held_out: expected the arguments of model and guide, a tuple (x, y), got {held_out!r}")
        for name, value in (identity or {}).items():
            if not isinstance(value, bool | int | float | str | None):
                raise ValueError(f"identity: expected numbers and strings, got {value!r} for {name!r}")
        tasks = self._tasks(readable(batches, seed))
        self.history = []
        if checkpoint is not None:
            self._refuse(tasks, seed)
        with Record(log, checkpoint) as record:
            of = self._identity(tasks, seed, identity) if record.where is not None else {}
            start = self._take_up(record, of)
            groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
            rates = [group.get("initial_lr", group["lr"]) for group in groups]
            first = distributed.world().rank == 0
            bar = Progress(
                TextColumn(type(self).__name__), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
                TimeRemainingColumn(), disable=not (progress and first),
            )  # fmt: skip
            with bar, forked(), _kept(groups, rates):
                shown = bar.add_task("", total=steps, completed=start)
                for step in range(start, steps):
                    torch.manual_seed(seed * 1_000_003 + step)
                    for group, rate in zip(groups, rates, strict=True):
                        group["lr"] = rate * warmed(step, steps, warmup)
                    task = tasks[step % len(tasks)]
                    metrics = self._tried(task, task.batch(step // len(tasks)), step)
                    if held_out is not None and ((step + 1) % evaluate_every == 0 or step + 1 == steps):
                        metrics |= self._held_out(held_out)
                        if step + 1 == steps:
                            metrics |= self._judged(held_out)
                    self.history.append(metrics)
                    stopped = False
                    try:
                        stopped = callback is not None and _stops(callback, step, metrics)
                    finally:
                        record.write(step, metrics)
                    told = record.told()
                    if told or stopped or (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                        for group, rate in zip(groups, rates, strict=True):
                            group["lr"] = rate
                        self._save(record, step + 1, of)
                    if told:
                        record.end(told)
                    bar.update(shown, advance=1, description=_shown(metrics))
                    if stopped:
                        break
            if self.history:
                self._say(self.history)
            return self.history

    def _identity(self, tasks: list[Task], seed: int, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """What a run is of."""
        of = {**(given or {}), **settings(self), "seed": seed}
        data: list[Any] = []
        networks: list[Any] = []
        with forked():
            for i, task in enumerate(tasks):
                torch.manual_seed(seed * 1_000_003)
                batch = task.batch(0)
                data.append(batch if callable(task.batches) else list(task.batches))
                of |= {f"program {i}": name_of(task.model), f"guide {i}": name_of(task.guide)}
                networks += programs.networks(task.model, self.arguments(batch, {}), {})
                networks += programs.networks(task.guide, self.arguments(batch, {}), {})
        distinct = {id(network): network for network in networks}.values()
        trained = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        return of | {"data": digest(data), "language model": fingerprint(distinct, trained)}

    def _take_up(self, record: Record, of: dict[str, Any]) -> int:
        """The step to go on from: that of the checkpoint, if there is one."""
        start, saved = 0, None
        if record.where is not None and checkpoints.exists(record.where):
            saved, tensors = checkpoints.load(record.where, self.optimizers, of)
            start, self.training_tokens = saved["step"], saved["training_tokens"]
            self.restore(tensors, saved.get("own", {}))
        if not distributed.agree(start):
            raise ValueError("checkpoint: not all processes find the same one; they need a file system in common")
        record.begin(saved)
        if saved is None:
            self._save(record, 0, of)  # from now on the directory is this run's
        return start

    def _save(self, record: Record, step: int, of: dict[str, Any]) -> None:
        if record.where is not None:
            tensors, own = self.state()
            extra = {"of": of, "training_tokens": self.training_tokens, "own": own, "log": record.log}
            checkpoints.save(record.where, self.optimizers, step, extra, tensors)

    def _say(self, history: list[dict[str, float]]) -> None:
        """A warning where training has not found the posterior."""
        recent = [metrics["impossible"] for metrics in history[-10:] if "impossible" in metrics]
        found = history[-1] | ({"impossible": sum(recent) / len(recent)} if recent else {})
        if why := reasons(found):
            logger.warning("%s: the guide is not the posterior: %s. %s", type(self).__name__, ", ".join(why), REMEDY)

    def _judged(self, args: tuple[Any, ...]) -> dict[str, float]:
        """`judge`, by one process alone: a verdict is about draws of all observations."""
        return self.judge(*args) if distributed.world().size == 1 else {}

    def judge(self, *args: Any) -> dict[str, float]:
        """How near the guide is to the posterior of these observations, see `verdict.judge`."""
        return judge(self.model, self.guide, args, self.max_plate_nesting)

    def _refuse(self, tasks: list[Task], seed: int) -> None:
        """Refuse a wrong optimiser before anything is written."""
        with forked():
            for task in tasks:
                torch.manual_seed(seed * 1_000_003)
                self.watch(task.model, task.guide, self.arguments(task.batch(0), {}), {})

    def _tried(self, task: Task, batch: tuple[Any, ...], step: int) -> dict[str, float]:
        """The metrics of a step, also of one that could update nothing."""
        try:
            return self._counted(task, batch, {}, step)
        except FloatingPointError as error:
            before = ["skipped" in metrics for metrics in self.history[1 - MOST_SKIPPED :]]
            if len(before) == MOST_SKIPPED - 1 and all(before):
                raise FloatingPointError(
                    f"{MOST_SKIPPED} steps in a row, the last one {step}, could update nothing: {error}; lower the "
                    "learning rate, load the weights in float32, and look for factors that are NaN or infinite"
                ) from error
            if not (before and before[-1]):
                logger.warning("step %d is skipped: %s", step, error)
            return {"loss": math.nan, "skipped": 1.0}

    def _tasks(self, batches: Any) -> list[Task]:
        if callable(batches):
            return [Task(self.model, self.guide, batches)]
        if len(batches) and all(map(is_task, batches)):
            return [Task(*b) for b in batches]
        return [Task(self.model, self.guide, batches)]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold beside the optimiser and its parameters."""
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], own: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        return None

    @torch.no_grad()
    def evaluate(self, *args: Any, num_particles: int = 64, **kwargs: Any) -> dict[str, float]:
        """On-policy draws of the guide on these observations: sd(u), ESS/N, impossible ones, and how its texts end.

        ``held_out_length`` is the mean number of tokens before the stop, ``held_out_stop`` the guide's mean probability
        of stopping where its texts did stop; both over all texts, and absent where no latent text has a stop.
        """
        weighted = weigh(Query(self.model, self.guide, args, kwargs, self.max_plate_nesting), num_particles)
        u = weighted.u
        metrics = {
            "held_out_sd_u": standard_deviation(u).mean().item(),
            "held_out_ess": (effective_sample_size(u) / len(u)).mean().item(),
            "held_out_impossible": (u == -torch.inf).double().mean().item(),
        }
        length, stop = [], []
        for node in programs.latents(weighted.guide).values():
            site = text_of(node["fn"])
            if site is not None and site.terminable:
                end = site.ending(node["value"]).at
                log_stop = site.prefix_scores(node["value"]).stop_log_probs
                length.append(end.double().mean())
                stop.append(log_stop.gather(-1, end[..., None]).exp().double().mean())
        if length:
            metrics |= {
                "held_out_length": torch.stack(length).mean().item(),
                "held_out_stop": torch.stack(stop).mean().item(),
            }
        return metrics

    def sized(self, num_particles: int) -> Self:
        """The same trainer, whose answers have this many particles where `run` is not told otherwise."""
        at_least(1, num_particles=num_particles)
        other = copy.copy(self)
        other.draws = num_particles
        return other

    def run(self, *args: Any, num_particles: int | None = None, **kwargs: Any) -> Posterior:
        """The posterior given ``args``, by importance sampling from the guide as it now is; 64 particles by default."""
        n, nesting = self.draws if num_particles is None else num_particles, self.max_plate_nesting
        return Importance(self.model, self.guide, n, max_plate_nesting=nesting).run(*args, **kwargs)


def standard_deviation(u: Tensor) -> Tensor:
    """Of u over axis 0, of the finite entries."""
    keep = u.isfinite()
    n = keep.sum(0).clamp(min=1)
    mean = u.where(keep, torch.zeros_like(u)).sum(0) / n
    return (((u - mean) ** 2).where(keep, torch.zeros_like(u)).sum(0) / n).sqrt()


def _stops(callback: Callable[[int, dict[str, float]], None], step: int, metrics: dict[str, float]) -> bool:
    """Whether the callback ends the training; on several processes all end when one of them does."""
    try:
        callback(step, metrics)
        stopped = False
    except StopIteration:
        stopped = True
    return not distributed.agree(stopped) or stopped


def _shown(metrics: Mapping[str, Any]) -> str:
    """What the progress bar says: numbers, not what else a callback has added."""
    return "  ".join(f"{k} {v:.3f}" for k, v in metrics.items() if isinstance(v, int | float))[:60]


@contextmanager
def _kept(groups: list[dict[str, Any]], rates: list[float]) -> Iterator[None]:
    """The learning rates afterwards as they were."""
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
