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
    r"""Trains a guide until it samples from the posterior: the fine-tuning of Hu et al. 2024, for any Pyro model.

    .. math:: q = p(z \mid observed) \iff u(z) = \log p(z, observed) - \log q(z) = \log Z \text{ for every } z

    Every step draws latents, computes u and lowers a variance of u, the objective.  After `fit`, `run` returns the
    posterior by importance sampling from the guide.

    :param model: a Pyro program; its parameters are not changed.
    :param guide: a Pyro program with the model's latent sites, whose trainable parameters the optimiser holds.
    :param objective: which u are compared and how, see `Objective`.  None: `HardVarGrad`, which is `VarGrad`, and
        `Linex` for a batch in which some draw has reward zero.
    :param optimizer: a torch optimiser over the guide's parameters, such as AdamW over ``q.trainable_parameters()``.
        Parameters of the objective, such as those of log Z, are added to it.
    :param num_particles: samples for each observation; None: the objective's number, 16 by default.
    :param replay: a `Replay` buffer, from which a part of the samples is drawn; None: all are drawn afresh.
    :param exploration: what draws the training samples, an `Exploration`; None: the guide itself.  "default": the
        objective's own; if it has none, a quarter of the particles is drawn at temperature 1.5, and once draws are
        impossible, half of the particles is found by a search of the model (`Searched`).
    :param reward_temperature: T in the target p(z, observed)^(1/T), a number or a function of the step; None: the
        objective's, 1 by default.
    :param clip: the largest norm of the gradient.
    :param max_plate_nesting: how many axes the plates of model and guide take; None: found from a run of both that
        calls no network.

    Metrics of a step: "loss"; "sd_u", the standard deviation of u in nats, zero at the posterior; "impossible", the
    share of training draws whose reward is zero; "grad_norm"; with a buffer "replayed", the number of replayed
    particles.  ``training_tokens`` counts the tokens that all steps have sent through the network.

    *Hard conditions.*  An observation of which every draw has reward zero has the loss zero, without gradient.  The
    default exploration then searches for possible draws: 16 tries of the model for each particle.  If the condition is
    too rare for that, give draws that satisfy it: from a program masked token by token, or from another algorithm by a
    buffer::

        GFlowNet(model, guide, optimizer=optimizer, exploration=Mixture((Tempered(), 0.5), (Proposal(masked), 0.5)))
        gflownet = GFlowNet(model, guide, optimizer=optimizer, replay=Replay(fraction=0.5))
        found = SMC(model, masked, num_particles=64).run(x, y).resample(16)
        gflownet.demonstrate(x, y, values={"z": found.samples["z"]})

    :raises ValueError: naming the argument that is out of its range; in `step` and `fit`, where the optimiser holds
        parameters of the model, or not all of the guide's.
    :raises FloatingPointError: in `step`, where the loss or its gradient is not finite; nothing is then updated.

    Source: Hu et al. 2024, "Amortizing intractable inference in large language models".

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
        """Makes one update; `step` and `fit` call it.

        :param query: model, guide and a batch.
        :param step: the number of the update, from 0, for schedules.
        :returns: the metrics of the step.
        """
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
        """Puts values of latent sites, known to be good for these observations, into the replay buffer.

        :param args: the arguments of model and guide.
        :param values: by site, a tensor (n, *plates, *event) or (*plates, *event); texts also as nested lists of
            strings of these shapes, to which the site's stop is added where it is missing.  Sites that are not given
            are drawn from the guide.
        :param task: the number of the task of `fit` that they belong to, where there are several.
        :param of: the (model, guide) of that task; None: the trainer's own.
        :raises ValueError: without a replay buffer, for a site that is not a latent, a shape that does not fit, and
            values that are impossible under the model.

        Example::

            gflownet = GFlowNet(model, guide, optimizer=optimizer, replay=Replay())
            gflownet.demonstrate(x, y, values={"z": ["a", "b"]})  # one text for each of two observations
        """
        if self.replay is None:
            raise ValueError("replay: there is no buffer for demonstrations; pass replay=Replay(...) to GFlowNet")
        query = Query(*(of or (self.model, self.guide)), args)
        demonstrations(self.replay, self._observations(query, task), query, values)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The replay buffer, and what the objective remembers of its draws, for a checkpoint.

        :returns: tensors by name, and a dict that JSON can hold.
        """
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
    """sd(u) of the whole training draws, and the share of reward zero."""
    us = [b.u.detach().masked_fill(~b.last, -float("inf")).amax(0) for b in balances]  # (particle, *kept)
    return {
        "sd_u": sum(standard_deviation(u).mean().item() for u in us) / len(us),
        "impossible": sum((whole(b) == -torch.inf).double().mean().item() for b in balances) / len(balances),
    }
