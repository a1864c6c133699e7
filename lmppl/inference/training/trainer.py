"""`Trainer`: what every algorithm that trains a guide shares; each says only how to make one update."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim import Optimizer

from ...randomness import Part, forked
from .. import distributed, programs
from ..arguments import at_least, is_integer, is_program
from ..importance import Importance
from ..posterior.posterior import Posterior, effective_sample_size
from ..programs import Program
from ..sharded import plate_of
from ..weights import weigh
from . import checkpoint as checkpoints

Arguments: TypeAlias = Callable[[tuple[Any, ...]], tuple[Any, ...]]  # of a batch, what programs are called with
Batches: TypeAlias = Sequence[tuple[Any, ...]] | Callable[[int], tuple[Any, ...]]


class Task(NamedTuple):
    """One of several problems that share an adapter: their steps take turns."""

    model: Program
    guide: Program
    batches: Batches

    def batch(self, step: int) -> tuple[Any, ...]:
        found = self.batches(step) if callable(self.batches) else self.batches[step % len(self.batches)]
        if not isinstance(found, tuple | list):
            raise ValueError(
                f"batches: each is a tuple of arguments of model and guide, [(x, y), ...]; got a {type(found).__name__}"
            )
        return tuple(found)


class Trainer(ABC):
    """Updates a guide's parameters; owns the loop, the clipping, the log, the checkpoints and the count of tokens.

    :param model: a Pyro program.
    :param guide: a Pyro program with the model's latent sites, whose trainable parameters the optimiser holds.
    :param optimizer: a torch optimiser over them.
    :param clip: the largest gradient norm.
    :param max_plate_nesting: guessed where not given.

    ``training_tokens`` counts the tokens that its steps have sent through the network.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        optimizer: Optimizer,
        clip: float = 1.0,
        max_plate_nesting: int | None = None,
    ):
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"optimizer: expected a torch.optim.Optimizer instance, got {type(optimizer).__name__}")
        is_program(model=model, guide=guide)
        if not clip > 0:
            raise ValueError(f"clip: must be positive, got {clip}")
        self.model, self.guide, self.optimizer, self.clip = model, guide, optimizer, clip
        self.max_plate_nesting = max_plate_nesting
        self.training_tokens = 0
        self._steps = 0  # taken by `step`, one by one: what schedules are asked about
        self._networks: dict[tuple[Program, Program], list[Any]] = {}
        self._dims: dict[tuple[Program, Program], int] = {}
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

        :raises FloatingPointError: where the loss is not finite; the parameters are then as before.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = distributed.share() * loss
        if not math.isfinite(value := distributed.total(loss.item())):
            raise FloatingPointError(f"the loss is {value}; nothing was updated")
        loss.backward()
        distributed.sum_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        return distributed.whole(norm).item()

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

        :raises FloatingPointError: where the loss is not finite; the parameters are then as before.
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
    ) -> list[dict[str, float]]:
        """``steps`` updates: ``warmup`` steps of rising learning rate, then linear decay to zero.

        Started by `torchrun`, every process is given the same batches and takes its part of each one's observations,
        the first axis of every argument; metrics and gradients are those of the whole batch, and the first process
        alone writes and shows progress (``callback`` is called on all). See docs/scale.md.

        :param batches: tuples of arguments, taken in turn, or a function of the step; or several
            ``(model, guide, batches)`` that share the parameters, whose steps take turns.
        :param seed: each step draws from a generator seeded by (seed, step), so that a resumed run repeats an
            uninterrupted one; the caller's generator is left as it was.
        :param held_out: arguments on which on-policy sd(u), zero at the posterior, ESS/N, lengths and stop
            probabilities are measured.
        :param log: a file that gets a JSON line every step; a resumed run takes out what was not saved.
        :param checkpoint: a directory, written every ``checkpoint_every`` steps and resumed from where it exists.
        :returns: the metrics of every step run by this call.
        """
        is_integer(seed=seed)
        at_least(1, steps=steps, evaluate_every=evaluate_every, checkpoint_every=checkpoint_every)
        at_least(0, warmup=warmup)
        tasks = self._tasks(batches)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        rates = [group.get("initial_lr", group["lr"]) for group in groups]
        start, history = 0, []
        where = Path(checkpoint) if checkpoint is not None else None
        if where is not None and (where / checkpoints.STATE).exists():
            saved, tensors = checkpoints.load(where, self.optimizers)
            start, self.training_tokens = saved["step"], saved["training_tokens"]
            self.restore(tensors, saved.get("own", {}))
        if not distributed.agree(start):
            raise ValueError("checkpoint: not all processes find the same one; they need a file system in common")
        first = distributed.world().rank == 0
        log_file = Path(log) if log is not None and first else None
        if log_file is not None:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            if where is not None and log_file.exists():
                kept = [line for line in log_file.read_text().splitlines() if json.loads(line)["step"] < start]
                log_file.write_text("".join(line + "\n" for line in kept))
        bar = Progress(
            TextColumn(type(self).__name__), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
            TimeRemainingColumn(), disable=not (progress and first),
        )  # fmt: skip
        with bar, forked():
            shown = bar.add_task("", total=steps, completed=start)
            for step in range(start, steps):
                torch.manual_seed(seed * 1_000_003 + step)
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * _decay(step, steps, warmup)
                task = tasks[step % len(tasks)]
                metrics = self._counted(task, task.batch(step // len(tasks)), {}, step)
                if held_out is not None and ((step + 1) % evaluate_every == 0 or step + 1 == steps):
                    metrics |= self._held_out(held_out)
                history.append(metrics)
                if callback is not None:
                    callback(step, metrics)
                if log_file is not None:
                    with log_file.open("a") as file:
                        file.write(json.dumps({"step": step, **metrics}) + "\n")
                if where is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                    for group, rate in zip(groups, rates, strict=True):
                        group["lr"] = rate
                    tensors, own = self.state()
                    extra = {"seed": seed, "training_tokens": self.training_tokens, "own": own}
                    checkpoints.save(where, self.optimizers, step + 1, extra, tensors)
                bar.update(shown, advance=1, description="  ".join(f"{k} {v:.3f}" for k, v in metrics.items())[:60])
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        return history

    def _tasks(self, batches: Batches | Sequence[Any]) -> list[Task]:
        if callable(batches):
            return [Task(self.model, self.guide, batches)]
        if not len(batches):
            raise ValueError("batches: there is no batch to train on")
        if all(isinstance(b, tuple | list) and len(b) == 3 and callable(b[0]) and callable(b[1]) for b in batches):
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
        """On-policy draws of the guide on these observations: sd(u), ESS/N, and how its texts end.

        ``held_out_length`` is the mean number of tokens before the stop, ``held_out_stop`` the guide's mean probability
        of stopping where its texts did stop; both over all texts, and absent where no latent text has a stop.
        """
        weighted = weigh(self.model, self.guide, args, kwargs, num_particles, self.max_plate_nesting)
        u = weighted.u
        metrics = {
            "held_out_sd_u": standard_deviation(u).mean().item(),
            "held_out_ess": (effective_sample_size(u) / len(u)).mean().item(),
        }
        length, stop = [], []
        for node in programs.latents(weighted.guide).values():
            if programs.is_terminable(node):
                end = programs.all_stops(node["fn"]).ending(node["value"]).at
                log_stop = node["fn"].prefix_scores(node["value"]).stop_log_probs
                length.append(end.double().mean())
                stop.append(log_stop.gather(-1, end[..., None]).exp().double().mean())
        if length:
            metrics |= {
                "held_out_length": torch.stack(length).mean().item(),
                "held_out_stop": torch.stack(stop).mean().item(),
            }
        return metrics

    def run(self, *args: Any, num_particles: int = 64, **kwargs: Any) -> Posterior:
        """The posterior given ``args``, by importance sampling from the guide as it now is."""
        nesting = self.max_plate_nesting
        return Importance(self.model, self.guide, num_particles, max_plate_nesting=nesting).run(*args, **kwargs)


def standard_deviation(u: Tensor) -> Tensor:
    """Of u over axis 0, of the finite entries."""
    keep = u.isfinite()
    n = keep.sum(0).clamp(min=1)
    mean = u.where(keep, torch.zeros_like(u)).sum(0) / n
    return (((u - mean) ** 2).where(keep, torch.zeros_like(u)).sum(0) / n).sqrt()


def _decay(step: int, steps: int, warmup: int) -> float:
    return min(1.0, (step + 1) / max(1, warmup)) * (1 - step / steps)
