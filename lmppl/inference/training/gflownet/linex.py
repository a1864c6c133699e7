"""Linex: balance by a loss that is linear where q is too large and exponential where it is too small."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core.weights import Balance
from .divergences import LINEX
from .var_grad import VarGrad


class Linex(VarGrad):
    r"""The linear-exponential loss of u against the log Z that fits the samples of one observation best.

    .. math:: \mathcal L = \min_{\log Z} \frac1N \sum_n e^{t_n} - t_n - 1
              = \log \frac1N \sum_n e^{u_n} - \frac1N \sum_n u_n, \qquad t_n = u_n - \log Z

    Its slope in u_n is :math:`w_n - 1/N`, w being the normalised :math:`e^u`; near balance it is half of `VarGrad`.
    It is half of ``VarGrad(divergence="forward_kl")``, and takes no divergence itself.
    Far from it, `VarGrad` pushes hardest at what q should not have, the harder the smaller the reward; here that counts
    1/N however small the reward is, and what q has lost counts up to 1: a guide of limited precision blurs an edge
    rather than lose what lies inside.  On-policy it descends KL(p, q), with a bias of order 1/N; `VarGrad` KL(q, p).

    A reward of zero asks q for at most ``floor`` nats below the group's largest: less is as good.  Groups in which all
    rewards are zero teach nothing.

    Source: R. Hu et al. 2025, "Beyond squared error: exploring loss design for enhanced training of generative flow
    networks", Linex(1); there against a learned log Z.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(divergence=LINEX, **kwargs)

    def reduce(self, u: Tensor, balance: Balance) -> Tensor:
        return super().reduce(u, balance) / 2
