"""Reweighted wake-sleep: importance-weighted maximum likelihood of the guide."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..core.arguments import at_least
from ..core.programs import Program
from ..core.query import Query
from ..posterior.posterior import effective_sample_size
from .densities import Densities, Drawn, log_likelihood
from .supervised import Examples
from .trainer import Trainer


class ReweightedWakeSleep(Trainer):
    r"""Trains the guide to minimise KL(p || q): on the observations (wake), on simulated data (sleep), or both.

    .. math:: \mathcal L_{wake} = -\sum_n w_n \log q(z_n), \qquad z_n \sim q, \qquad
              w_n = \frac{e^{u(z_n)}}{\sum_m e^{u(z_m)}}
    .. math:: \mathcal L_{sleep} = -\log q(z \mid y'), \qquad (z, y') \sim p

    The loss is ``wake * L_wake + sleep * L_sleep``, computed for each element of the kept plates (those that enclose
    every site) and averaged over them; the weights are detached.  The wake phase minimises KL(p(z | y) || q), with a
    bias of order 1/N because the weights are normalised.  Its gradient is zero in expectation at the posterior, where
    all weights are 1/N.  An element in which every particle has weight zero contributes nothing.

    :param model: a Pyro program; its parameters are not changed.
    :param guide: a Pyro program with the model's latent sites.
    :param optimizer: a torch optimiser over the guide's trainable parameters.
    :param num_particles: N, the draws of the guide for each observation.
    :param wake: the weight of the wake phase, at least 0.
    :param sleep: the weight of the sleep phase, at least 0.
    :param simulate: a function called with the arguments of a step, which returns (arguments with a simulated
        observation, the latent values that produced it).  The sleep phase needs it, because the guide reads y among its
        arguments.  `dreams` makes one where each observation is an argument.
    :param clip: the largest norm of the gradient.
    :param max_plate_nesting: how many axes the plates of model and guide take; None: found from a run of both that
        calls no network.

    Metrics: "loss", "grad_norm"; "wake" and "ess" (the effective sample size as a share of N); "sleep".

    :raises ValueError: for weights that are negative or both zero, and for a sleep phase without ``simulate``.

    Sources: Bornschein and Bengio 2015, "Reweighted wake-sleep"; Le et al. 2019, "Revisiting reweighted wake-sleep".

    Example::

        rws = ReweightedWakeSleep(model, guide, optimizer=optimizer, wake=0.5, sleep=0.5, simulate=dreams(model))
        rws.fit(batches, steps=100)
        posterior = rws.run(x, y)
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        optimizer: Optimizer,
        num_particles: int = 16,
        wake: float = 1.0,
        sleep: float = 0.0,
        simulate: Examples | None = None,
        clip: float = 1.0,
        max_plate_nesting: int | None = None,
    ):
        super().__init__(model, guide, optimizer=optimizer, clip=clip, max_plate_nesting=max_plate_nesting)
        at_least(1, num_particles=num_particles)
        if wake < 0 or sleep < 0 or wake + sleep == 0:
            raise ValueError(f"wake, sleep: weights must not be negative or both zero, got {wake} and {sleep}")
        if sleep > 0 and simulate is None:
            raise ValueError("simulate: the sleep phase needs a function that simulates observations, see `dreams`")
        self.num_particles, self.wake, self.sleep, self.simulate = num_particles, wake, sleep, simulate

    def update(self, query: Query, step: int) -> dict[str, float]:
        terms, metrics = [], {}
        if self.wake > 0:
            drawn = Drawn(query, self.num_particles)
            densities = drawn.densities()
            wake = wake_loss(densities).mean()
            terms.append(self.wake * wake)
            metrics["wake"] = wake.item()
            metrics["ess"] = (effective_sample_size(densities.u) / self.num_particles).mean().item()
        if self.sleep > 0 and self.simulate is not None:
            dreamt, values = self.simulate(*query.args, **query.kwargs)
            sleep = -log_likelihood(replace(query, args=dreamt), values).mean()
            terms.append(self.sleep * sleep)
            metrics["sleep"] = sleep.item()
        loss = torch.stack(terms).sum()
        return {"loss": loss.item(), "grad_norm": self.descend(loss), **metrics}


def wake_loss(densities: Densities) -> Tensor:
    """-sum_n w_n log q(z_n), (*kept); 0 where all weights are zero."""
    u = densities.u
    weights = u.softmax(0).masked_fill(u.amax(0) == -torch.inf, 0.0)
    return -(weights * densities.log_q).sum(0)
