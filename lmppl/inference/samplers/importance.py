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
    r"""Importance sampling: draws particles from the guide and weighs them by the model, all in one vectorised run.

    .. math:: z_n \sim q, \qquad \log w_n = u(z_n) - \log N, \qquad \log \hat Z = \log \sum_n w_n

    with :math:`u = \log p(z, observed) - \log q(z)`.  :math:`E[\hat Z] = p(observed)` for every guide that covers the
    posterior; how well it does is told by `Posterior.ess` and `Posterior.khat`.

    :param model: a Pyro program.
    :param guide: a Pyro program that samples the model's latent sites; None: the model proposes them itself.
    :param num_particles: N, the number of particles per plate element.
    :param max_plate_nesting: how many batch axes the plates take; None: found from a run without a network.

    ``run(*args)`` passes its arguments to model and guide, and returns a `Posterior`.  It raises SiteMismatch if model
    and guide do not fit together, AxesError if the model is not written for a particle axis, and ValueError for a
    subsampled plate that does not enclose every site.

    Example::

        posterior = Importance(model, guide, num_particles=256).run(x, y)
        posterior.log_evidence  # (*plates): here one for each story
        posterior.ess  # the effective number of particles, at most 256
        posterior.table("z", index=0)[:5]  # the most probable texts of the first story
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
        """The program that proposes: the guide, or the model where there is none."""
        return self.guide or self.model

    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        """The weighted particles for these arguments of model and guide."""
        query = Query(self.model, self.guide, args, kwargs, self.max_plate_nesting)
        weighted = weigh(query, self.num_particles)
        check_axes(Pair(query, weighted.guide, weighted.model, self.num_particles))
        log_weights = weighted.u - math.log(self.num_particles)
        return Posterior.of(weighted.guide, weighted.plates, log_weights, query, weighted.model)
