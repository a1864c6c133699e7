"""Importance sampling."""

from __future__ import annotations

import math
from typing import Any

from ..core.arguments import at_least, is_program
from ..core.programs import Program
from ..core.query import Pair, Query
from ..core.validation import check_axes
from ..core.weights import weigh
from ..posterior.algorithm import Sampler
from ..posterior.posterior import Posterior


class Importance(Sampler):
    r"""Importance sampling, all particles in one vectorised run.

    .. math:: z_n \sim q, \qquad \log w_n = u(z_n) - \log N, \qquad \log \hat Z = \log \sum_n w_n

    :param model: a Pyro program.
    :param guide: another, with the model's latent sites; None: the model proposes its own latents.
    :param num_particles: N.
    :param max_plate_nesting: guessed where not given.

    ``run(*args)`` raises SiteMismatch where model and guide do not fit, and ValueError for a subsampled plate that does
    not enclose every site.
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None = None,
        num_particles: int = 64,
        *,
        max_plate_nesting: int | None = None,
    ):
        is_program(model=model, guide=model if guide is None else guide)
        at_least(1, num_particles=num_particles)
        self.model, self.guide, self.num_particles = model, guide, num_particles
        self.max_plate_nesting = max_plate_nesting

    @property
    def density(self) -> Program:
        """The program that proposes."""
        return self.guide or self.model

    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        """The weighted particles for these arguments."""
        query = Query(self.model, self.guide, args, kwargs, self.max_plate_nesting)
        weighted = weigh(query, self.num_particles)
        check_axes(Pair(query, weighted.guide, weighted.model, self.num_particles))
        log_weights = weighted.u - math.log(self.num_particles)
        return Posterior.of(weighted.guide, weighted.plates, log_weights, query, weighted.model)
