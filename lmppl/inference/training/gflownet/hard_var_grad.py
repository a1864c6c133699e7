"""`VarGrad` where every draw is possible, `Linex` where some draw is not: the default objective."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core.weights import Balance
from ...processes import distributed
from .divergences import LINEX
from .objective import among
from .var_grad import VarGrad


class HardVarGrad(VarGrad):
    r"""`VarGrad`, but twice `Linex` for a batch in which some draw has reward zero: for hard conditions.

    .. math:: \mathcal L = \frac1N \sum_n (u_n - \bar u)^2 \quad\text{or}\quad
              2 \log \frac1N \sum_n e^{u_n} - \frac2N \sum_n u_n

    The two agree to second order near balance.  A squared loss counts an impossible draw with all ``floor`` nats, so
    that a guide may learn one possible text and lose the others.  In a trial on texts that match a pattern, the squared
    loss ended at a total variation of 0.74 (with a loss of 0.08 and an ESS of 0.7), `Linex` at 0.03
    (docs/constrained.md).

    :param kwargs: the arguments of `Objective`: ``num_particles``, ``exploration``, ``reward_temperature``, ``floor``,
        ``max_plate_nesting``.
    :raises ValueError: for a ``divergence``, which this objective chooses for each batch, and as `VarGrad`.

    Example::

        trainer = GFlowNet(model, guide, HardVarGrad(floor=30.0), optimizer=optimizer)  # with floor=50: the default
        trainer.fit(batches, steps=100)
    """

    def __init__(self, **kwargs: Any):
        if "divergence" in kwargs:
            raise ValueError(
                f"divergence: HardVarGrad chooses it for each batch, got {kwargs['divergence']!r}; use "
                "VarGrad(divergence=...)"
            )
        super().__init__(**kwargs)

    def reduce(self, u: Tensor, balance: Balance) -> Tensor:
        possible = distributed.everywhere(not bool((balance.valid & (balance.log_p == -float("inf"))).any()))
        return among(self.divergence if possible else LINEX, u, balance, balance.valid.to(u.dtype))
