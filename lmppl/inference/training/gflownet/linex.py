"""Linex: a loss that is linear where q is too large and exponential where it is too small."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core.weights import Balance
from .divergences import LINEX
from .var_grad import VarGrad


class Linex(VarGrad):
    r"""The linear-exponential loss of u at the log Z that fits the samples of one observation best.

    .. math:: \mathcal L = \min_{\log Z} \frac1N \sum_n e^{t_n} - t_n - 1
              = \log \frac1N \sum_n e^{u_n} - \frac1N \sum_n u_n, \qquad t_n = u_n - \log Z

    It is half of ``VarGrad(divergence="forward_kl")``, and near balance half of `VarGrad`.  Its slope in u_n is
    :math:`w_n - 1/N`, where w is the normalised :math:`e^u`.  So a value that q should not have counts at most 1/N,
    however small its reward, and a value that q has lost counts up to 1.  `VarGrad` counts the first kind most, the
    more the smaller the reward.  A guide of limited precision therefore blurs an edge rather than lose what lies
    inside.  On-policy `Linex` minimises KL(p, q), with a bias of order 1/N; `VarGrad` minimises KL(q, p).

    A reward of zero asks q for *at most* ``floor`` nats below the group's largest; less costs nothing.  Groups in which
    all rewards are zero contribute nothing.

    :param kwargs: the arguments of `Objective`: ``num_particles``, ``exploration``, ``reward_temperature``, ``floor``,
        ``max_plate_nesting``.
    :raises TypeError: for a ``divergence``.
    :raises ValueError: as `VarGrad`.

    Source: R. Hu et al. 2025, "Beyond squared error: exploring loss design for enhanced training of generative flow
    networks", Linex(1); there with a learned log Z.

    Example::

        trainer = GFlowNet(model, guide, Linex(num_particles=32), optimizer=optimizer)
        trainer.fit(batches, steps=100)
    """

    def __init__(self, **kwargs: Any):
        super().__init__(divergence=LINEX, **kwargs)

    def reduce(self, u: Tensor, balance: Balance) -> Tensor:
        return super().reduce(u, balance) / 2
