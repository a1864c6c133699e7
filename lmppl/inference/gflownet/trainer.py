"""`GFlowNet`: amortised inference by training the guide until u is constant."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.optim import Optimizer

from .. import programs
from ..importance import Importance
from ..posterior import Posterior, effective_sample_size
from ..programs import Program
from ..weights import Balance, weigh
from . import checkpoint as checkpoints
from .exploration import Exploration, Tempered
from .objective import Objective
from .var_grad import VarGrad

Batches = Sequence[tuple[Any, ...]] | Callable[[int], tuple[Any, ...]]
DEFAULT_EXPLORATION = Tempered(temperature=1.5, fraction=0.25)


class GFlowNet:
    r"""Fine-tunes a guide into a sampler of the posterior (Hu et al. 2024), and samples from it.

    :param model: a Pyro program; its parameters are left alone.
    :param guide: a Pyro program with the model's latent sites, whose trainable parameters the optimiser holds.
    :param objective: a variance of u, see `Objective`; default `VarGrad`.
    :param optimizer: a torch optimiser over the guide's parameters, e.g.
        ``torch.optim.AdamW(q.trainable_parameters(), lr=1e-3)``.
    :param num_particles: samples per observation; default the objective's.
    :param replay: reserved for a replay buffer; None.
    :param exploration: what to draw training samples from; default a quarter of the particles at temperature 1.5,
        unless the objective brings its own. None: the guide itself.
    :param reward_temperature: T in the target p(z, observed)^(1/T); default the objective's.
    :param clip: the largest gradient norm.
    :param max_plate_nesting: guessed where not given.

    ``training_tokens`` counts the tokens that its steps have sent through the network.

    Example::

        gflownet = GFlowNet(model, guide, optimizer=torch.optim.AdamW(q.trainable_parameters(), lr=1e-3))
        gflownet.fit(batches, steps=500)
        posterior = gflownet.run(x, y, num_particles=64)
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: Objective | None = None,
        *,
        optimizer: Optimizer,
        num_particles: int | None = None,
        replay: None = None,
        exploration: Exploration | str | None = "default",
        reward_temperature: float | None = None,
        clip: float = 1.0,
        max_plate_nesting: int | None = None,
    ):
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"optimizer: expected a torch.optim.Optimizer instance, got {type(optimizer).__name__}")
        if replay is not None:
            raise ValueError("replay: this version has no replay buffer; leave it at None")
        self.model, self.guide, self.optimizer, self.clip = model, guide, optimizer, clip
        self.objective = copy.copy(objective) if objective is not None else VarGrad()
        if max_plate_nesting is not None:
            self.objective.max_plate_nesting = max_plate_nesting
        if num_particles is not None:
            self.objective.num_particles = num_particles
        if reward_temperature is not None:
            self.objective.reward_temperature = reward_temperature
        if exploration != "default":
            self.objective.exploration = exploration  # type: ignore[assignment]
        elif self.objective.exploration is None:
            self.objective.exploration = DEFAULT_EXPLORATION
        self.max_plate_nesting = max_plate_nesting
        self.training_tokens = 0
        self._networks: list[Any] | None = None
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """One update on the observations ``args``; returns the loss and what there is to know of u.

        :raises FloatingPointError: where the loss is not finite; the parameters are then as before.
        """
        if self._networks is None:
            self._networks = programs.networks(self.model, args, kwargs)
        before = self._tokens()
        self.optimizer.zero_grad(set_to_none=True)
        loss, balances = self.objective.loss_and_balances(self.model, self.guide, *args, **kwargs)
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"the loss is {loss.item()}; nothing was updated")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.training_tokens += self._tokens() - before
        return {"loss": loss.item(), "grad_norm": norm.item(), **_summary(balances)}

    def _tokens(self) -> int:
        return sum(network.tokens_scored for network in self._networks or ())

    @property
    def density(self) -> Program:
        """The program whose density approximates the posterior."""
        return self.guide

    def fit(
        self,
        batches: Batches,
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

        :param batches: tuples of arguments, taken in turn, or a function of the step.
        :param seed: each step draws from a generator seeded by (seed, step), so that a resumed run repeats an
            uninterrupted one; the caller's generator is left as it was.
        :param held_out: arguments on which on-policy sd(u), zero at the posterior, ESS/N, lengths and stop
            probabilities are measured.
        :param log: a file that gets a JSON line every step; a resumed run takes out what was not saved.
        :param checkpoint: a directory, written every ``checkpoint_every`` steps and resumed from where it exists.
        :returns: the metrics of every step run by this call.
        """
        if steps < 1:
            raise ValueError(f"steps: must be at least 1, got {steps}")
        if not callable(batches) and not len(batches):
            raise ValueError("batches: there is no batch to train on")
        take = batches if callable(batches) else lambda step: batches[step % len(batches)]
        rates = [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        start, history = 0, []
        where = Path(checkpoint) if checkpoint is not None else None
        if where is not None and (where / checkpoints.STATE).exists():
            saved = checkpoints.load(where, self.optimizer)
            start, self.training_tokens = saved["step"], saved["training_tokens"]
        log_file = Path(log) if log is not None else None
        if log_file is not None:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            if where is not None and log_file.exists():
                kept = [line for line in log_file.read_text().splitlines() if json.loads(line)["step"] < start]
                log_file.write_text("".join(line + "\n" for line in kept))
        bar = Progress(
            TextColumn("GFlowNet"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
            TimeRemainingColumn(), disable=not progress,
        )  # fmt: skip
        with bar, torch.random.fork_rng(devices=[]):
            task = bar.add_task("", total=steps, completed=start)
            for step in range(start, steps):
                torch.manual_seed(seed * 1_000_003 + step)
                for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * _schedule(step, steps, warmup)
                metrics = self.step(*take(step))
                if held_out is not None and ((step + 1) % evaluate_every == 0 or step + 1 == steps):
                    metrics |= self.evaluate(*held_out)
                history.append(metrics)
                if callback is not None:
                    callback(step, metrics)
                if log_file is not None:
                    with log_file.open("a") as file:
                        file.write(json.dumps({"step": step, **metrics}) + "\n")
                if where is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                    for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate
                    checkpoints.save(
                        where, self.optimizer, step + 1, {"seed": seed, "training_tokens": self.training_tokens}
                    )
                bar.update(task, advance=1, description=f"loss {metrics['loss']:.3f}  sd(u) {metrics['sd_u']:.3f}")
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return history

    @torch.no_grad()
    def evaluate(self, *args: Any, num_particles: int = 64, **kwargs: Any) -> dict[str, float]:
        """On-policy draws of the guide on these observations: sd(u), ESS/N, and how its texts end.

        ``held_out_length`` is the mean number of tokens before the stop, ``held_out_stop`` the guide's mean probability
        of stopping where its texts did stop; both over all texts, and absent where no latent text has a stop.
        """
        weighted = weigh(self.model, self.guide, args, kwargs, num_particles, self.max_plate_nesting)
        u = weighted.u
        metrics = {
            "held_out_sd_u": _sd(u).mean().item(),
            "held_out_ess": (effective_sample_size(u) / len(u)).mean().item(),
        }
        length, stop = [], []
        for node in programs.latents(weighted.guide).values():
            if programs.is_terminable(node):
                end = torch.isin(node["value"], node["fn"].stop).long().argmax(-1)
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


def _schedule(step: int, steps: int, warmup: int) -> float:
    return min(1.0, (step + 1) / max(1, warmup)) * (1 - step / steps)


def _sd(u: torch.Tensor) -> torch.Tensor:
    """Standard deviation over axis 0, of the finite entries."""
    keep = u.isfinite()
    n = keep.sum(0).clamp(min=1)
    mean = u.where(keep, torch.zeros_like(u)).sum(0) / n
    return (((u - mean) ** 2).where(keep, torch.zeros_like(u)).sum(0) / n).sqrt()


def _summary(balances: list[Balance]) -> dict[str, float]:
    """sd(u) over the whole training draws."""
    whole = [b.u.detach().masked_fill(~b.last, -torch.inf).amax(0) for b in balances]  # (particle, *kept)
    return {"sd_u": sum(_sd(u).mean().item() for u in whole) / len(whole)}
