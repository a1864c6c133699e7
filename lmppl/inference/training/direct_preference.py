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
    r"""Trains the guide on choices between two latents, without a reward model and without draws.

    .. math:: \mathcal L = -\log \sigma\Big(\beta \Big[\log \frac{q(z^+)}{p(z^+)} - \log \frac{q(z^-)}{p(z^-)}\Big]\Big)

    averaged over the kept plates: without one, a choice is between values of all latents together.  The reference p(z)
    is the model's own distribution of its latents, unscaled; what the model observes, and its factors, add nothing.

    Where all choices follow one Bradley-Terry utility, :math:`p(z^+ \succ z^-) = \sigma(r(z^+) - r(z^-))`, and there
    are enough of them, it is least at :math:`q \propto p \, e^{r/\beta}`: what `PolicyGradient` attains with the reward
    r and ``kl`` = :math:`\beta`.  Choices of people who disagree follow no such utility; the loss then fits one to all.

    :param model: a Pyro program.
    :param guide: a Pyro program with the model's latent sites.
    :param optimizer: a torch optimiser over the guide's trainable parameters.
    :param beta: :math:`\beta > 0`; a larger one keeps the guide nearer to the reference.
    :param clip: the largest gradient norm.
    :param max_plate_nesting: guessed where not given.

    The last two items of a batch are dicts of latent values, of what was chosen and of what was not; what comes before
    them are the arguments of model and guide.  Values are shaped as the guide would draw them, (*plates, ...), and
    texts end with their stop.  The metric "margin" is the mean of what stands in the brackets, times beta, and
    "accuracy" the share of choices in which it is positive.

    :raises ValueError: for a beta that is not positive; in a step, for latents without a value, values without a site,
        values that are impossible under model or guide, and a plate that draws which observations it has.

    Source: Rafailov et al. 2023, "Direct preference optimization: your language model is secretly a reward model".

    Example::

        tuning = DirectPreferenceOptimization(model, guide, optimizer=optimizer, beta=1.0)
        tuning.fit([(x, y, {"z": chosen}, {"z": rejected})], steps=100)
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
            raise ValueError("batches: the last two items of a batch must be dicts of latent values, chosen and not")
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
