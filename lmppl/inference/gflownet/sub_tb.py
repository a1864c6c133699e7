"""Sub-trajectory balance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import is_number
from ..weights import Balance
from .objective import Objective


class SubTB(Objective):
    r"""Sub-trajectory balance: the weighted mean square of differences of u between stopped prefixes of one sample.

    .. math:: \mathcal L = \sum_{i<j} \lambda^{j-i} (u_i - u_j)^2 \Big/ \sum_{i<j} \lambda^{j-i},
              \qquad u_t = \log p(z_{1..t}\,stop, observed) - \log q(z_{1..t}\,stop)

    over pairs of terminable prefixes; averaged per sample, then over samples, plate elements and sites.  It is the
    modified sub-trajectory balance of Hu et al. 2024 (Eq. 3); its state flow is R(z_1..z_t stop) / q(stop | z_1..z_t).

    Pairs within one sample cancel whatever lies upstream, so by themselves they identify the posterior only if every
    latent is a text whose *empty* prefix can stop.  Elsewhere pairs are taken over prefixes *and* samples, and a log
    message says so once.

    :param lam: weight ratio per token of distance; 1 weighs all pairs alike (a variance).
    """

    def __init__(self, lam: float = 1.0, prefixes: int | str = "all", num_particles: int = 16, **kwargs: Any):
        super().__init__(prefixes=prefixes, num_particles=num_particles, **kwargs)
        is_number("positive", lambda x: x > 0, lam=lam)
        self.lam = lam

    def reduce(self, u: Tensor, balance: Balance, identified: bool) -> Tensor:
        valid, at = balance.valid, balance.at
        if identified:
            return pairwise(u, valid, at, self.lam).mean(0)  # over samples
        self._say_once("pairs within one sample do not identify this posterior; pairing prefixes across samples too")
        return pairwise(u.flatten(0, 1), valid.flatten(0, 1), at.flatten(0, 1), self.lam)


def pairwise(u: Tensor, valid: Tensor, at: Tensor, lam: float) -> Tensor:
    """The lam^|t_i - t_j|-weighted mean of (u_i - u_j)^2 over valid pairs along axis 0: (G, ...) -> (...)."""
    if lam == 1.0:
        count = valid.sum(0)
        mean = (u * valid).sum(0) / count.clamp(min=1)
        return 2 * ((u - mean) ** 2 * valid).sum(0) / (count - 1).clamp(min=1)
    both = valid[:, None] & valid[None]
    both = both & ~torch.eye(len(u), dtype=torch.bool, device=u.device).view(len(u), len(u), *[1] * (u.dim() - 1))
    weight = lam ** (at[:, None] - at[None]).abs() * both
    return (weight * (u[:, None] - u[None]) ** 2).sum((0, 1)) / weight.sum((0, 1)).clamp(min=1e-30)
