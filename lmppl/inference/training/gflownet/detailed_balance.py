"""Detailed balance."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.weights import Balance
from .divergences import SQUARED, Divergence
from .objective import Objective, among


class DetailedBalance(Objective):
    r"""Detailed balance: *neighbouring* stopped prefixes of one sample against each other.

    .. math:: \mathcal L = \frac1m \sum_i s(u_{t_{i+1}} - u_{t_i})

    over the m pairs of consecutive terminable prefixes that were kept, s as in `SubTB`, squared x^2; `SubTB` over two
    neighbours is the same thing.  With the state flow :math:`F(z_{1..t}) = R(z_{1..t}\,stop) / q(stop \mid z_{1..t})`
    this is :math:`F(z_{1..t}) \, q(z_{t+1} \mid z_{1..t}) = F(z_{1..t+1})`, the detailed balance of forward-looking
    flows.

    Like all pairs within one sample, neighbours identify the posterior only if every latent is a text whose *empty*
    prefix can stop.  Elsewhere the loss of `VarGrad` is added, which ties whole samples together; a log message says so
    once.

    Source: Bengio et al. 2023, "GFlowNet foundations"; Deleu et al. 2022 for states that can all stop.
    """

    def reduce(self, u: Tensor, balance: Balance) -> Tensor:
        loss = neighbours(u, balance.valid, balance.at, self.divergence).mean(0)
        if balance.identifies:
            return loss
        self._say_once("pairs within one sample do not identify this posterior; adding the loss across samples")
        return loss + among(self.divergence, u, balance, balance.last.to(u.dtype))


def neighbours(u: Tensor, valid: Tensor, at: Tensor, divergence: Divergence = SQUARED) -> Tensor:
    """The mean of s(u_j - u_i) over consecutive valid prefixes along axis 0, by length: (P, ...) -> (...)."""
    order = at.masked_fill(~valid, torch.inf).argsort(0)
    u, valid = u.gather(0, order), valid.gather(0, order)
    pair = valid[1:] & valid[:-1]
    return (divergence.pair(u[1:] - u[:-1]) * pair).sum(0) / pair.sum(0).clamp(min=1)
