"""`GFlowNet`: amortised inference by training the guide until u is constant."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...core import programs
from ...core.arguments import at_least, instance_of
from ...core.observations import Observations
from ...core.programs import Program
from ...core.query import Query
from ...core.weights import Balance
from ..loop.schedules import Schedule, checked
from ..trainer import Task, Trainer, standard_deviation
from .exploration import Exploration, Memory, Tempered
from .hard_var_grad import HardVarGrad
from .objective import Objective, whole
from .replay import Replay, demonstrations
from .search import Searched

DEFAULT_EXPLORATION = Searched(Tempered(temperature=1.5, fraction=0.25))


class GFlowNet(Trainer):
    r"""Fine-tunes a guide into a sampler of the posterior (Hu et al. 2024), and samples from it.

    :param model: a Pyro program; its parameters are left alone.
    :param guide: a Pyro program with the model's latent sites, whose trainable parameters the optimiser holds.
    :param objective: which u are compared, and how, see `Objective`; default `HardVarGrad`: `VarGrad`, and `Linex` for
        a batch in which some draw has reward zero.
    :param optimizer: a torch optimiser over the guide's parameters, e.g.
        ``torch.optim.AdamW(q.trainable_parameters(), lr=1e-3)``.  What the objective has to learn, such as log Z,
        joins it: `Objective.param_groups`.
    :param num_particles: samples per observation; default the objective's.
    :param replay: a `Replay` buffer, from which a part of the samples is drawn; None: all are drawn afresh.
    :param exploration: what to draw training samples from; None: the guide itself.  "default": the objective's own, or
        where it has none, a quarter of the particles at temperature 1.5, and once draws are impossible half of the
        particles found by the model itself (`Searched`).
    :param reward_temperature: T in the target p(z, observed)^(1/T), a number or a function of the step; default the
        objective's.
    :param clip: the largest gradient norm.
    :param max_plate_nesting: guessed where not given.

    ``training_tokens`` counts the tokens that its steps have sent through the network.  The metric ``impossible`` is
    the share of the training draws whose reward is zero.

    *Hard conditions.*  Observations of which every draw has reward zero teach nothing: their loss is zero and without
    a gradient.  The default exploration searches for possible draws among 16 of the model's own for each particle.
    Where a condition is too rare for that, let the draws satisfy it: by an ``exploration`` that
    draws a part of them from a program masked token by token, or by a buffer of values that another algorithm found::

        GFlowNet(model, guide, optimizer=optimizer, exploration=Mixture((Tempered(), 0.5), (Proposal(masked), 0.5)))
        gflownet = GFlowNet(model, guide, optimizer=optimizer, replay=Replay(fraction=0.5))
        found = SMC(model, masked, num_particles=64).run(x, y).resample(16)
        gflownet.demonstrate(x, y, values={"z": found.samples["z"]})

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
        replay: Replay | None = None,
        exploration: Exploration | Literal["default"] | None = "default",
        reward_temperature: Schedule | None = None,
        clip: float = 1.0,
        max_plate_nesting: int | None = None,
    ):
        super().__init__(model, guide, optimizer=optimizer, clip=clip, max_plate_nesting=max_plate_nesting)
        if replay is not None:
            instance_of(Replay, replay=replay)
        if objective is not None:
            instance_of(Objective, objective=objective)
        if exploration == "default":
            exploration = getattr(objective, "exploration", None) or DEFAULT_EXPLORATION
        elif exploration is not None:
            instance_of(Exploration, exploration=exploration)
        self.replay = replay
        self._of_fit: list[Task] = []
        self.objective = copy.copy(objective) if objective is not None else HardVarGrad()
        self.objective.memory = Memory()
        if max_plate_nesting is not None:
            self.objective.max_plate_nesting = max_plate_nesting
        if num_particles is not None:
            at_least(self.objective.least_particles, num_particles=num_particles)
            self.objective.num_particles = num_particles
        if reward_temperature is not None:
            name = "reward_temperature"
            self.objective.reward_temperature = checked(reward_temperature, name, lambda t: t > 0, "must be positive")
        self.objective.exploration = exploration
        held = {id(p) for p in self.parameters}
        for group in self.objective.param_groups():
            fresh = [p for p in group["params"] if id(p) not in held]
            if fresh:
                optimizer.add_param_group(group | {"params": fresh})

    def update(self, query: Query, step: int) -> dict[str, float]:
        self.objective.training_step = step
        if self.replay is None:
            values = self.objective.draw(*query.given)
            loss, balances = self.objective.loss_at(*query.given, values)
            return {"loss": loss.item(), "grad_norm": self.descend(loss), **_summary(balances)}
        seen = self._observations(query)
        n = self.objective.num_particles
        again = self.replay.available(seen, n, step)
        values = self.objective.draw(*query.given, n - again, seen.subsamples)
        if again:
            fresh = {name: values[name] for name in seen.sites}
            stored = self.replay.draw(seen, again, step)
            stored = {name: v.to(fresh[name].device) for name, v in stored.items()}
            values |= programs.cat_particles([fresh, stored])
        loss, balances = self.objective.loss_at(*query.given, values)
        self.replay.add(seen, values, whole(balances[0]), balances[0].guide)
        metrics = {"loss": loss.item(), "grad_norm": self.descend(loss), **_summary(balances)}
        return metrics | {"replayed": float(again)}

    def _observations(self, query: Query, task: int | None = None) -> Observations:
        assert self.replay is not None
        if task is None:
            of_fit, own = [(t.model, t.guide) for t in self._of_fit], (query.model, query.guide)
            task = of_fit.index(own) if own in of_fit else len(of_fit)
        return self.replay.observations(*query.given, self.objective.nesting(*query.given), task)

    def _tasks(self, batches: Any) -> list[Task]:
        self._of_fit = super()._tasks(batches)
        return self._of_fit

    def demonstrate(
        self, *args: Any, values: Mapping[str, Any], task: int = 0, of: tuple[Program, Program] | None = None
    ) -> None:
        """Put values of latent sites, known to be good for the observations ``args``, into the replay buffer.

        :param values: by site, a tensor (n, *plates, *event) or (*plates, *event), texts also as nested lists of
            strings of these shapes (the site's stop is appended where it is missing).  Sites that are not given are
            drawn from the guide.
        :param task: which of the tasks of `fit` they belong to, where there are several; ``of``: its (model, guide).
        :raises ValueError: without a replay buffer, for a site that is no latent, a shape that does not fit, and values
            that the model says are impossible.
        """
        if self.replay is None:
            raise ValueError("replay: there is no buffer to put demonstrations into; pass replay=Replay(...)")
        query = Query(*(of or (self.model, self.guide)), args)
        demonstrations(self.replay, self._observations(query, task), query, values)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The replay buffer, and what the next draws are to know of the last ones."""
        memory = {"memory": asdict(self.objective.memory)}
        if self.replay is None:
            return {}, memory
        tensors, own = self.replay.state()
        return tensors, memory | {"replay": own}

    def restore(self, tensors: dict[str, Tensor], own: dict[str, Any]) -> None:
        self.objective.memory = Memory(**own.get("memory", {}))
        if self.replay is not None and "replay" in own:
            self.replay.restore(tensors, own["replay"])


def _summary(balances: list[Balance]) -> dict[str, float]:
    """Of the whole training draws sd(u), and the share of reward zero."""
    us = [b.u.detach().masked_fill(~b.last, -float("inf")).amax(0) for b in balances]  # (particle, *kept)
    return {
        "sd_u": sum(standard_deviation(u).mean().item() for u in us) / len(us),
        "impossible": sum((whole(b) == -torch.inf).double().mean().item() for b in balances) / len(balances),
    }
