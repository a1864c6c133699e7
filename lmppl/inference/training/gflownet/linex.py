"""Linex: balance by a loss that is linear where q is too large and exponential where it is too small."""

from __future__ import annotations

from torch import Tensor

from ...core.weights import Balance
from ..loop.schedules import Schedule
from .divergences import LINEX
from .exploration import Exploration
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

    def __init__(
        self,
        *,
        num_particles: int = 16,
        prefixes: int | str = "all",
        exploration: Exploration | None = None,
        reward_temperature: Schedule = 1.0,
        floor: float = 50.0,
        max_plate_nesting: int | float = float("inf"),
    ):
        super().__init__(
            num_particles=num_particles, prefixes=prefixes, exploration=exploration, floor=floor,
            reward_temperature=reward_temperature, max_plate_nesting=max_plate_nesting, divergence=LINEX,
        )  # fmt: skip

    def reduce(self, u: Tensor, balance: Balance) -> Tensor:
        return super().reduce(u, balance) / 2
