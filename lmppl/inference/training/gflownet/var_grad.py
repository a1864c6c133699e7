"""VarGrad and its pooled form."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core.weights import Balance
from .objective import Objective, among


class VarGrad(Objective):
    r"""Whole samples of one observation against each other; squared, the variance of u.

    .. math:: \mathcal L = \min_c \frac1N \sum_n g(u_n - c), \qquad \text{squared: } \frac1N \sum_n (u_n - \bar u)^2

    It is trajectory balance with the log Z that fits the batch best; on-policy its gradient is 2(N-1)/N times that of
    REINFORCE with a leave-one-out baseline and the matched KL (Richter et al. 2020; Zhang et al. 2023).  With an
    alpha-divergence it descends that one, but for a factor and a bias of order 1/N; of the others the best c is log Z
    near balance only (docs/objectives.md).
    """

    uses_prefixes = False
    least_particles = 2  # one sample has no variance, and would teach nothing

    def reduce(self, u: Tensor, balance: Balance) -> Tensor:
        return among(self.divergence, u, balance, balance.valid.to(u.dtype))


class PooledVarGrad(Objective):
    r"""Prefixes *and* samples of one observation against each other, each prefix weighed by its stop probability.

    .. math:: \mathcal L = \min_c \sum_{n,t} w_{nt} \, g(u_{nt} - c) \Big/ \sum_{n,t} w_{nt},
              \qquad w_{nt} = q(stop \mid z_{1..t})

    Squared, it is the weighted variance.  Since :math:`\sum_t q(stop \mid z_{1..t}) f(z_{1..t})` is unbiased for
    :math:`E_q f`, this is VarGrad with the stopping time integrated out (Rao-Blackwell).  The weights are detached.

    :param weights: "stop" as above, or "uniform": all pairs of prefixes and samples alike.
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
