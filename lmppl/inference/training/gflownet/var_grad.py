"""VarGrad and its pooled form."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core.weights import Balance
from .objective import Objective, among


class VarGrad(Objective):
    r"""Compares whole samples of one observation with each other; squared, the loss is the variance of u.

    .. math:: \mathcal L = \min_c \frac1N \sum_n g(u_n - c), \qquad \text{squared: } \frac1N \sum_n (u_n - \bar u)^2

    It is trajectory balance with the log Z that fits the batch best.  On-policy its gradient is -2(N-1)/N times that of
    REINFORCE on the ELBO with a leave-one-out baseline.  On-policy with an alpha-divergence it minimises that
    divergence, with a bias of order 1/N.  With the other divergences the best c is log Z near balance only
    (docs/objectives.md).

    :param num_particles: N, samples for each observation.
    :param prefixes: not used.
    :param exploration: the `Exploration` that draws the samples; None: the guide itself.
    :param reward_temperature: T in the target :math:`p(z, observed)^{1/T}`, a number or a function of the step.
    :param floor: nats.  A reward of zero counts as this much below the largest reward of its observation.
    :param max_plate_nesting: how many axes the plates take; infinite: found from a run that calls no network.
    :param divergence: g, a name in `DIVERGENCES` or a `Divergence`.
    :raises ValueError: for fewer than two particles, and as `Objective`.

    Source: Richter et al. 2020, "VarGrad"; Zhang et al. 2023, "Robust scheduling with GFlowNets".

    Example::

        trainer = GFlowNet(model, guide, VarGrad(divergence="hellinger"), optimizer=optimizer, num_particles=8)
        trainer.fit(batches, steps=100)
    """

    uses_prefixes = False
    least_particles = 2  # the variance of one sample is zero

    def reduce(self, u: Tensor, balance: Balance) -> Tensor:
        return among(self.divergence, u, balance, balance.valid.to(u.dtype))


class PooledVarGrad(Objective):
    r"""Compares prefixes *and* samples of one observation, prefixes weighted by the guide's stop probability there.

    .. math:: \mathcal L = \min_c \sum_{n,t} w_{nt} \, g(u_{nt} - c) \Big/ \sum_{n,t} w_{nt},
              \qquad w_{nt} = q(stop \mid z_{1..t})

    Squared, it is the weighted variance.  Since :math:`\sum_t q(stop \mid z_{1..t}) f(z_{1..t})` is unbiased for
    :math:`E_q f`, this is `VarGrad` with the stopping time integrated out (Rao-Blackwell).  The weights are detached.

    :param weights: "stop" as above, or "uniform": all prefixes and samples count alike.
    :param kwargs: the other arguments of `Objective`: ``num_particles``, ``prefixes``, ``exploration``,
        ``reward_temperature``, ``floor``, ``divergence``, ``max_plate_nesting``.
    :raises ValueError: for other ``weights``, and as `Objective`.

    Example::

        trainer = GFlowNet(model, guide, PooledVarGrad(prefixes=3), optimizer=optimizer)
        trainer.fit(batches, steps=100)
    """

    def __init__(self, weights: str = "stop", **kwargs: Any):
        super().__init__(**kwargs)
        if weights not in ("stop", "uniform"):
            raise ValueError(f"weights: expected 'stop' or 'uniform', got {weights!r}")
        self.weights = weights

    def reduce(self, u: Tensor, balance: Balance) -> Tensor:
        weight = balance.valid.to(u.dtype)
        weight = weight * balance.stop.to(u.dtype) if self.weights == "stop" else weight
        return among(self.divergence, u, balance, weight)
