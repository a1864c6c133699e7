"""Sub-trajectory balance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.arguments import is_number
from ...core.weights import Balance
from .divergences import SQUARED, Divergence, mean
from .objective import Objective


class SubTB(Objective):
    r"""Sub-trajectory balance: compares the stopped prefixes of one sample, in pairs.

    .. math:: \mathcal L = \sum_{i<j} \lambda^{j-i} s(u_i - u_j) \Big/ \sum_{i<j} \lambda^{j-i},
              \qquad u_t = \log p(z_{1..t}\,stop, observed) - \log q(z_{1..t}\,stop)

    over pairs of terminable prefixes, with s(x) = (g(x) + g(-x)) / 2; squared, s(x) = x^2.  The loss is averaged for
    each sample, then over samples, plate elements and sites.  Squared, it is the modified sub-trajectory balance of Hu
    et al. 2024 (Eq. 3), whose state flow is R(z_1..z_t stop) / q(stop | z_1..z_t).

    In pairs within one sample everything drawn before the text cancels.  So they identify the posterior only if every
    latent is a text whose *empty* prefix can stop.  For other programs pairs are taken over prefixes *and* samples; a
    log message tells so once.

    :param lam: :math:`\lambda > 0`, the ratio of weights for one more token of distance.  With 1 all pairs count alike,
        and the loss is a variance.
    :param prefixes: "all", or how many prefixes of each text to use, at least 2.
    :param num_particles: samples for each observation.
    :param kwargs: the other arguments of `Objective`: ``exploration``, ``reward_temperature``, ``floor``,
        ``divergence``, ``max_plate_nesting``.
    :raises ValueError: for a ``lam`` that is not positive, and as `Objective`.

    Sources: Madan et al. 2023, "Learning GFlowNets from partial episodes"; Hu et al. 2024, "Amortizing intractable
    inference in large language models".

    Example::

        trainer = GFlowNet(model, guide, SubTB(lam=0.9, prefixes=4), optimizer=optimizer)
        trainer.fit(batches, steps=100)
    """

    def __init__(self, lam: float = 1.0, prefixes: int | str = "all", num_particles: int = 16, **kwargs: Any):
        super().__init__(prefixes=prefixes, num_particles=num_particles, **kwargs)
        is_number("positive", lambda x: x > 0, lam=lam)
        self.lam = lam

    def reduce(self, u: Tensor, balance: Balance) -> Tensor:
        valid, at = balance.valid, balance.at
        if balance.identifies:
            return pairwise(u, valid, at, self.lam, self.divergence).mean(0)  # over samples
        self._say_once("pairs within one sample do not identify this posterior; pairing prefixes across samples too")
        return pairwise(u.flatten(0, 1), valid.flatten(0, 1), at.flatten(0, 1), self.lam, self.divergence)


def pairwise(u: Tensor, valid: Tensor, at: Tensor, lam: float, divergence: Divergence = SQUARED) -> Tensor:
    """The lam^|t_i - t_j|-weighted mean of s(u_i - u_j) over valid pairs along axis 0: (G, ...) -> (...)."""
    if lam == 1.0:
        return divergence.pairs(u, valid)
    i, j = torch.triu_indices(len(u), len(u), 1, device=u.device)
    weight = lam ** (at[i] - at[j]).abs() * (valid[i] & valid[j])
    return mean(divergence.pair(u[i] - u[j]), weight)
