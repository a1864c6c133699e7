"""Detailed balance."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.weights import Balance
from .divergences import SQUARED, Divergence
from .objective import Objective, among


class DetailedBalance(Objective):
    r"""Detailed balance: compares *neighbouring* stopped prefixes of one sample.

    .. math:: \mathcal L = \frac1m \sum_i s(u_{t_{i+1}} - u_{t_i}), \qquad s(x) = \tfrac12 (g(x) + g(-x))

    over the m pairs of consecutive terminable prefixes that were kept; squared, s(x) = x^2.  `SubTB` over two
    neighbours is the same.  With the state flow :math:`F(z_{1..t}) = R(z_{1..t}\,stop) / q(stop \mid z_{1..t})` a loss
    of zero means :math:`F(z_{1..t}) \, q(z_{t+1} \mid z_{1..t}) = F(z_{1..t+1})`, the detailed balance of
    forward-looking flows.

    Like all pairs within one sample, neighbours identify the posterior only if every latent is a text whose *empty*
    prefix can stop.  For other programs the loss of `VarGrad` is added, which compares whole samples; a log message
    tells so once.

    :param num_particles: samples for each observation.
    :param prefixes: "all", or how many prefixes of each text to use, at least 2.
    :param exploration: the `Exploration` that draws the samples; None: the guide itself.
    :param reward_temperature: T in the target :math:`p(z, observed)^{1/T}`, a number or a function of the step.
    :param floor: nats.  A reward of zero counts as this much below the largest reward of its observation.
    :param max_plate_nesting: how many axes the plates take; infinite: found from a run that calls no network.
    :param divergence: g, a name in `DIVERGENCES` or a `Divergence`.
    :raises ValueError: as `Objective`.

    Sources: Bengio et al. 2023, "GFlowNet foundations"; Deleu et al. 2022, "Bayesian structure learning with generative
    flow networks", for states that can all stop.

    Example::

        trainer = GFlowNet(model, guide, DetailedBalance(), optimizer=optimizer)
        trainer.fit(batches, steps=100)
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
