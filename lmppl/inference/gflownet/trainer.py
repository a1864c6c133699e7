"""`GFlowNet`: amortised inference by training the guide until u is constant."""

from __future__ import annotations

import copy
from typing import Any

from torch.optim import Optimizer

from ..programs import Program
from ..schedules import Schedule, checked
from ..training import Trainer, standard_deviation
from ..weights import Balance
from .exploration import Exploration, Tempered
from .objective import Objective
from .trajectory_balance import TrajectoryBalance
from .var_grad import VarGrad

DEFAULT_EXPLORATION = Tempered(temperature=1.5, fraction=0.25)


class GFlowNet(Trainer):
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
    :param reward_temperature: T in the target p(z, observed)^(1/T), a number or a function of the step; default the
        objective's.
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
        reward_temperature: Schedule | None = None,
        clip: float = 1.0,
        max_plate_nesting: int | None = None,
    ):
        super().__init__(model, guide, optimizer=optimizer, clip=clip, max_plate_nesting=max_plate_nesting)
        if replay is not None:
            raise ValueError("replay: this version has no replay buffer; leave it at None")
        self.objective = copy.copy(objective) if objective is not None else VarGrad()
        if max_plate_nesting is not None:
            self.objective.max_plate_nesting = max_plate_nesting
        if num_particles is not None:
            self.objective.num_particles = num_particles
        if reward_temperature is not None:
            name = "reward_temperature"
            self.objective.reward_temperature = checked(reward_temperature, name, lambda t: t > 0, "must be positive")
        if exploration != "default":
            self.objective.exploration = exploration  # type: ignore[assignment]
        elif self.objective.exploration is None:
            self.objective.exploration = DEFAULT_EXPLORATION
        if isinstance(self.objective, TrajectoryBalance):
            known = {id(p) for p in self.parameters}
            fresh = [p for p in self.objective.parameters() if id(p) not in known]
            if fresh:
                group = {"params": fresh, "lr": self.objective.log_z_lr, "weight_decay": 0.0}
                optimizer.add_param_group(group)

    def update(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], step: int
    ) -> dict[str, float]:
        self.objective.training_step = step
        values = self.objective.draw(model, guide, args, kwargs)
        loss, balances = self.objective.loss_at(model, guide, args, kwargs, values)
        return {"loss": loss.item(), "grad_norm": self.descend(loss), **_summary(balances)}


def _summary(balances: list[Balance]) -> dict[str, float]:
    """sd(u) over the whole training draws."""
    whole = [b.u.detach().masked_fill(~b.last, -float("inf")).amax(0) for b in balances]  # (particle, *kept)
    return {"sd_u": sum(standard_deviation(u).mean().item() for u in whole) / len(whole)}
