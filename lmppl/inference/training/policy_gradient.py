"""Policy gradients: REINFORCE and PPO, with the model's density as the reward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..core.programs import Program
from ..core.query import Query
from ..core.weights import log_ratio
from .densities import Densities, Drawn
from .gflownet.objective import floored
from .loop.schedules import Schedule, at, checked
from .trainer import Trainer

ALGORITHMS, BASELINES, REWARDS = ("reinforce", "ppo"), ("leave-one-out", None), ("likelihood", "joint")


class PolicyGradient(Trainer):
    r"""Trains the guide by reinforcement learning: its latents are the actions, and the model gives the reward.

    .. math:: \max_q \; E_q[R(z)] - \beta \, KL(q \,\|\, p(z)), \qquad
              \text{attained by } q(z) \propto p(z) \, e^{R(z)/\beta}

    p(z) is the model's distribution of its latents, unscaled.  The reward is

    - ``reward="likelihood"``: :math:`R = \tfrac1T \log p(z, observed) - \log p(z)`, at T = 1 log p(observed | z).  With
      the matched :math:`\beta` = ``kl=1`` the objective is the ELBO, :math:`E_q u`, and the posterior attains it;
    - ``reward="joint"``: :math:`R = \tfrac1T \log p(z, observed)`.  With ``kl=0`` it is the reward-only baseline of Hu
      et al. 2024.  The single most probable z attains it: the spread of the posterior is lost.

    A smaller ``kl`` gives a narrower q, a larger one draws q towards the prior.  With :math:`s_n = R(z_n) - \beta \log
    q(z_n) / p(z_n)` of N draws from q, detached, the advantage is :math:`A_n = s_n - \tfrac1{N-1} \sum_{m \ne n} s_m`,
    separately for each element of the kept plates (those that enclose every site), and

    - ``"reinforce"`` maximises :math:`\tfrac1N \sum_n A_n \log q(z_n)`, whose gradient is unbiased.  On the ELBO it is
      -N/(2(N-1)) times the gradient of on-policy `VarGrad` on the same draws;
    - ``"ppo"`` makes ``epochs`` updates on the same draws.  They maximise :math:`\tfrac1N \sum_n \min(\rho_n A_n,
      \mathrm{clip}(\rho_n, 1 - \epsilon, 1 + \epsilon) A_n)` with the ratio :math:`\rho_n = q(z_n) / q_{old}(z_n)` of
      *whole latents*, so that latents of any kind are possible.  With one epoch the gradient is that of REINFORCE.

    Metrics: "loss", :math:`-\tfrac1N \sum_n s_n`, the negative of the objective (of the ELBO, where matched); "reward",
    "kl" (means, nats), "grad_norm", and for PPO "clipped", the share of ratios outside the clipping range.

    :param model: a Pyro program; its parameters are not changed.
    :param guide: a Pyro program with the model's latent sites.
    :param optimizer: a torch optimiser over the guide's trainable parameters.
    :param algorithm: "reinforce" or "ppo".
    :param reward: "likelihood" or "joint".
    :param kl: :math:`\beta \ge 0`, a number or a function of the step.
    :param baseline: "leave-one-out" as above, or None for :math:`A_n = s_n`.
    :param clip_ratio: :math:`\epsilon > 0`, of PPO.
    :param epochs: updates on the same draws; None: 4 for PPO, 1 for REINFORCE, which is on-policy only.
    :param num_particles: N, the draws for each observation; at least 2 for the baseline.
    :param reward_temperature: T > 0, a number or a function of the step.
    :param whiten: divide the advantages by their standard deviation; this changes the objective.
    :param floor: nats.  A reward of zero probability counts as this much below the largest reward of its observation.
    :param clip: the largest norm of the gradient.
    :param max_plate_nesting: how many axes the plates of model and guide take; None: found from a run of both that
        calls no network.

    :raises ValueError: naming the argument that is out of its range.

    Sources: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Schulman et al. 2017, "Proximal
    policy optimization algorithms"; Ziegler et al. 2019 for the KL term in the reward.

    Example::

        elbo = PolicyGradient(model, guide, optimizer=optimizer)  # REINFORCE on the ELBO
        elbo.fit(batches, steps=100)
        posterior = elbo.run(x, y)
        PolicyGradient(model, guide, optimizer=optimizer, algorithm="ppo", reward="joint", kl=0.0)  # reward only
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        optimizer: Optimizer,
        algorithm: str = "reinforce",
        reward: str = "likelihood",
        kl: Schedule = 1.0,
        baseline: str | None = "leave-one-out",
        clip_ratio: float = 0.2,
        epochs: int | None = None,
        num_particles: int = 16,
        reward_temperature: Schedule = 1.0,
        whiten: bool = False,
        floor: float = 50.0,
        clip: float = 1.0,
        max_plate_nesting: int | None = None,
    ):
        super().__init__(model, guide, optimizer=optimizer, clip=clip, max_plate_nesting=max_plate_nesting)
        for name, value, known in (
            ("algorithm", algorithm, ALGORITHMS),
            ("reward", reward, REWARDS),
            ("baseline", baseline, BASELINES),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        epochs = (4 if algorithm == "ppo" else 1) if epochs is None else epochs
        if epochs < 1 or (epochs > 1 and algorithm == "reinforce"):
            raise ValueError(f"epochs: at least 1, and REINFORCE is on-policy only, got {epochs} for {algorithm!r}")
        if clip_ratio <= 0:
            raise ValueError(f"clip_ratio: must be positive, got {clip_ratio}")
        if num_particles < (1 if baseline is None else 2):
            raise ValueError(f"num_particles: at least 1, and 2 for a leave-one-out baseline, got {num_particles}")
        self.algorithm, self.reward, self.baseline, self.whiten = algorithm, reward, baseline, whiten
        self.clip_ratio, self.epochs, self.num_particles, self.floor = clip_ratio, epochs, num_particles, floor
        self.kl = checked(kl, "kl", lambda b: b >= 0, "must not be negative")
        self.reward_temperature = checked(reward_temperature, "reward_temperature", lambda t: t > 0, "must be positive")

    @property
    def accumulates(self) -> bool:
        """Whether `fit` may make one update of several batches: with one epoch."""
        return self.epochs == 1

    def update(self, query: Query, step: int) -> dict[str, float]:
        drawn = Drawn(query, self.num_particles)
        densities = drawn.densities()
        log_q, old = densities.log_q, densities.log_q.detach()
        reward = self.rewards(densities, step)
        # The divergence is part of the reward: q makes the draws, and E_q of the divergence's own gradient is zero.
        divergence = old - floored(densities.log_prior, self.floor, (0,))
        kl = at(self.kl, step)
        signal = reward - kl * divergence if kl else reward  # (particle, *kept)
        advantage, norms, outside = self.advantages(signal), [], torch.zeros(())
        for epoch in range(self.epochs):
            log_q = drawn.log_q(densities.plates) if epoch else log_q
            norms.append(self.descend(-self.surrogate(advantage, log_q, old).mean()))
            outside = ((log_q.detach() - old).exp() - 1).abs() > self.clip_ratio
        metrics = {"reward": reward, "kl": divergence}
        if self.algorithm == "ppo":
            metrics["clipped"] = outside.double()
        means = {name: value.mean().item() for name, value in metrics.items()}
        return {"loss": -signal.mean().item(), "grad_norm": max(norms), **means}

    def rewards(self, densities: Densities, step: int = 0) -> Tensor:
        """R of every particle, where zero probability counts as ``floor`` below the largest.

        :param densities: log-densities of the particles.
        :param step: the number of the step, for schedules.
        :returns: R, (particle, *kept).
        """
        target = densities.log_p / at(self.reward_temperature, step)
        return floored(
            log_ratio(target, densities.log_prior) if self.reward == "likelihood" else target, self.floor, (0,)
        )

    def advantages(self, signal: Tensor) -> Tensor:
        r"""The advantages of a signal s.

        .. math:: A_n = s_n - \tfrac1{N-1} \sum_{m \ne n} s_m

        :param signal: s, (particle, *kept).
        :returns: A, (particle, *kept).
        """
        if self.baseline is not None:
            n = len(signal)
            signal = (signal - signal.mean(0)) * n / (n - 1)  # = s_n less the mean of the others
        return signal / (signal.std(0, correction=0) + 1e-8) if self.whiten else signal

    def surrogate(self, advantage: Tensor, log_q: Tensor, old: Tensor) -> Tensor:
        """What one update maximises.

        :param advantage: A, (particle, *kept).
        :param log_q: log q of the particles with gradient, (particle, *kept).
        :param old: log q when they were drawn, (particle, *kept).
        :returns: (particle, *kept).
        """
        if self.algorithm == "reinforce":
            return advantage * log_q
        ratio = (log_q - old).exp()
        clipped = ratio.clamp(1 - self.clip_ratio, 1 + self.clip_ratio)
        return torch.minimum(ratio * advantage, clipped * advantage)
