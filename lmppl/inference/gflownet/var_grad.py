"""VarGrad and its pooled form."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..weights import Balance
from .objective import Objective


class VarGrad(Objective):
    r"""The variance of u over independent samples of one observation.

    .. math:: \mathcal L = \frac1N \sum_n (u_n - \bar u)^2

    It is trajectory balance with the log Z that fits the batch best; on-policy its gradient is 2(N-1)/N times that of
    REINFORCE with a leave-one-out baseline and the matched KL (Richter et al. 2020; Zhang et al. 2023).
    """

    uses_prefixes = False
    least_particles = 2  # one sample has no variance, and would teach nothing

    def reduce(self, u: Tensor, balance: Balance, identified: bool) -> Tensor:
        return weighted_variance(u, balance.valid.to(u.dtype))


class PooledVarGrad(Objective):
    r"""The variance of u over prefixes *and* samples of one observation, each prefix weighed by its stop probability.

    .. math:: \mathcal L = \sum_{n,t} w_{nt} (u_{nt} - \bar u)^2 \Big/ \sum_{n,t} w_{nt},
              \qquad w_{nt} = q(stop \mid z_{1..t})

    Since :math:`\sum_t q(stop \mid z_{1..t}) f(z_{1..t})` is unbiased for :math:`E_q f`, this is VarGrad with the
    stopping time integrated out (Rao-Blackwell).  The weights are detached.

    :param weights: "stop" as above, or "uniform": all pairs of prefixes and samples alike.
    """

    def __init__(self, weights: str = "stop", **kwargs: Any):
        super().__init__(**kwargs)
        if weights not in ("stop", "uniform"):
            raise ValueError(f"weights: expected 'stop' or 'uniform', got {weights!r}")
        self.weights = weights

    def reduce(self, u: Tensor, balance: Balance, identified: bool) -> Tensor:
        weight = balance.valid.to(u.dtype)
        return weighted_variance(u, weight * balance.stop.to(u.dtype) if self.weights == "stop" else weight)


def weighted_variance(u: Tensor, weight: Tensor) -> Tensor:
    """The variance of u (prefix, particle, ...) over its first two axes, under weights: (...)."""
    total = weight.sum((0, 1)).clamp(min=1e-30)
    mean = (weight * u).sum((0, 1)) / total
    return (weight * (u - mean) ** 2).sum((0, 1)) / total
