"""Direct preference optimisation: a guide learns from pairs of latents of which somebody chose one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from torch.optim import Optimizer

from ..core.arguments import is_number
from ..core.programs import Program
from ..core.query import Query
from .densities import log_likelihoods
from .trainer import Trainer


class DirectPreferenceOptimization(Trainer):
    r"""Trains the guide on choices between two latents; it needs no reward model and no draws.

    .. math:: \mathcal L = -\log \sigma\Big(\beta \Big[\log \frac{q(z^+)}{p(z^+)} - \log \frac{q(z^-)}{p(z^-)}\Big]\Big)

    :math:`z^+` was chosen and :math:`z^-` was not.  The loss is averaged over the kept plates (those that enclose every
    site).  Without such a plate a choice is between values of all latents together.  The reference p(z) is the model's
    distribution of its latents, unscaled; what the model observes, and its factors, do not count.

    If all choices follow one Bradley-Terry utility, :math:`p(z^+ \succ z^-) = \sigma(r(z^+) - r(z^-))`, the loss is
    smallest, given enough choices, at :math:`q \propto p \, e^{r/\beta}`: what `PolicyGradient` reaches with the reward
    r and ``kl`` = :math:`\beta`.  Choices of people who disagree follow no such utility; the loss then fits one utility
    to all of them.

    :param model: a Pyro program.
    :param guide: a Pyro program with the model's latent sites.
    :param optimizer: a torch optimiser over the guide's trainable parameters.
    :param beta: :math:`\beta > 0`; a larger value keeps the guide closer to the reference.
    :param clip: the largest norm of the gradient.
    :param max_plate_nesting: how many axes the plates of model and guide take; None: found from a run of both that
        calls no network.

    The last two items of a batch are dicts of latent values by site: the chosen ones, then the rejected ones.  The
    items before them are the arguments of model and guide.  Values have the shapes that the guide would draw,
    (*plates, *event), and texts end with their stop.  The metric "margin" is the mean of :math:`\beta [\ldots]`, in
    nats; "accuracy" is the share of choices for which it is positive.

    :raises ValueError: for a ``beta`` that is not positive and finite; in a step, for latents without a value, values
        without a site, values that are impossible under model or guide, and a plate that subsamples its observations.

    Source: Rafailov et al. 2023, "Direct preference optimization: your language model is secretly a reward model".

    Example::

        tuning = DirectPreferenceOptimization(model, guide, optimizer=optimizer, beta=1.0)
        tuning.fit([(x, y, {"z": chosen}, {"z": rejected})], steps=100)
        posterior = tuning.run(x, y)
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        optimizer: Optimizer,
        beta: float = 0.1,
        clip: float = 1.0,
        max_plate_nesting: int | None = None,
    ):
        super().__init__(model, guide, optimizer=optimizer, clip=clip, max_plate_nesting=max_plate_nesting)
        is_number("positive and finite", lambda b: 0 < b < float("inf"), beta=beta)
        self.beta = beta

    def arguments(self, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if len(batch) < 2 or not all(isinstance(values, Mapping) for values in batch[-2:]):
            raise ValueError("batches: the last two items of a batch must be dicts of values, chosen and rejected")
        return batch[:-2]

    def update(self, query: Query, step: int) -> dict[str, float]:
        asked = replace(query, args=self.arguments(query.args, dict(query.kwargs)))
        ratios = []
        for values in query.args[-2:]:
            log_q, log_prior = log_likelihoods(asked, values)
            ratios.append(log_q - log_prior)
        margin = self.beta * (ratios[0] - ratios[1])  # (*kept)
        loss = -logsigmoid(margin).mean()
        metrics = {"margin": margin.detach().mean().item(), "accuracy": (margin > 0).to(torch.double).mean().item()}
        return {"loss": loss.item(), "grad_norm": self.descend(loss), **metrics}
