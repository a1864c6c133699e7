"""Linex: balance by a loss that is linear where q is too large and exponential where it is too small."""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights import Balance
from .objective import Objective


class Linex(Objective):
    r"""The linear-exponential loss of u against the log Z that fits the samples of one observation best.

    .. math:: \mathcal L = \min_{\log Z} \frac1N \sum_n e^{t_n} - t_n - 1
              = \log \frac1N \sum_n e^{u_n} - \frac1N \sum_n u_n, \qquad t_n = u_n - \log Z

    Its slope in u_n is :math:`w_n - 1/N`, w being the normalised :math:`e^u`; near balance it is half of `VarGrad`.
    Far from it, `VarGrad` pushes hardest at what q should not have, the harder the smaller the reward; here that counts
    1/N however small the reward is, and what q has lost counts up to 1: a guide of limited precision blurs an edge
    rather than lose what lies inside.  On-policy it descends KL(p, q), with a bias of order 1/N; `VarGrad` KL(q, p).

    A reward of zero asks q for at most ``floor`` nats below the group's largest: less is as good.  Groups in which all
    rewards are zero teach nothing.

    Source: R. Hu et al. 2025, "Beyond squared error: exploring loss design for enhanced training of generative flow
    networks", Linex(1); there against a learned log Z.
    """

    uses_prefixes = False
    least_particles = 2  # one sample fits itself

    def reduce(self, u: Tensor, balance: Balance, identified: bool) -> Tensor:
        valid = balance.valid.expand_as(u)  # (1, particle, *kept)
        positive = valid & (balance.log_p > -torch.inf)
        some = positive.any(0).any(0)  # (*kept)
        log_z = log_mean_exp(u.detach(), positive)
        u = torch.where(positive, u, torch.minimum(u, log_z)).masked_fill(~some, 0.0)
        valid = valid | ~some
        return log_mean_exp(u, valid) - (u * valid).sum((0, 1)) / valid.sum((0, 1))


def log_mean_exp(u: Tensor, keep: Tensor) -> Tensor:
    """log of the mean of e^u over the first two axes, where kept: (...); -inf where nothing is."""
    return u.masked_fill(~keep, -torch.inf).logsumexp((0, 1)) - keep.sum((0, 1)).clamp(min=1).to(u.dtype).log()
