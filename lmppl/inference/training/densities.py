"""Draws of a guide and their densities, of which every baseline makes its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..core import programs
from ..core.plates import Plates, kept_plates
from ..core.programs import Draw, Program, SiteMismatch, Substitute
from ..core.query import Query
from ..core.validation import check_axes_once
from ..core.weights import log_density, log_density_of_latents, text_log_probs

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Densities:
    """Log-densities of particles, (particle, *kept); only ``log_q`` has a gradient."""

    log_p: Tensor  # log p(z, observed)
    log_prior: Tensor  # log p(z): the model's latent sites, unscaled
    log_q: Tensor
    plates: Plates

    @property
    def u(self) -> Tensor:
        return self.log_p - self.log_q.detach()


class Drawn:
    """Particles of a guide, which can be scored again after its parameters have changed.

    :param values: values to score instead of fresh draws: latents and subsamples, particles leading.
    """

    def __init__(self, query: Query, num_particles: int, values: Values | None = None):
        self.query, self.num_particles = query, num_particles
        if values is None:
            with torch.no_grad():
                values = programs.values(query.trace(query.proposal, Draw(), particles=num_particles))
        self.values = values

    def densities(self) -> Densities:
        """One pass of the guide with gradient, one of the model without.

        :raises SiteMismatch: where model and guide have different latent sites.
        """
        pair = self.query.at(self.values, particles=self.num_particles).matched()
        plates = pair.plates(subsampling=True)
        check_axes_once(self.query, lambda: pair)
        with torch.no_grad():
            latents = programs.latents(pair.model)
            known = text_log_probs(programs.scored(pair.model))
            for n in latents.keys() - known.keys():
                known[n] = latents[n]["fn"].log_prob(latents[n]["value"], *latents[n]["args"], **latents[n]["kwargs"])
            log_p = log_density(pair.model, plates, known=known)
            log_prior = log_density_of_latents(pair.model, plates, known)
        log_q = log_density_of_latents(pair.proposal, plates)
        log_p, log_prior, log_q = (self._each(x, plates) for x in (log_p, log_prior, log_q))
        return Densities(log_p, log_prior, log_q, plates)

    def log_q(self, plates: Plates) -> Tensor:
        """The guide's log-densities at its present parameters, (particle, *kept), with gradient."""
        guide = self.query.trace(self.query.proposal, Substitute(self.values), particles=self.num_particles)
        return self._each(log_density_of_latents(guide, plates), plates)

    def _each(self, x: Tensor, plates: Plates) -> Tensor:
        return x.expand(1, self.num_particles, *plates.sizes)[0]


def log_likelihood(query: Query, values: Values) -> Tensor:
    """log q (*kept) of given latent values, with gradient; only the guide is run (without one, the model).

    :raises SiteMismatch: where a latent site of the guide has no value, or a value no site.
    :raises ValueError: where a value is impossible under the guide, or a plate subsamples its observations.
    """
    query = replace(query, model=query.proposal, guide=None)
    run = _told(query, query.model, values, "guide")
    return _possible(run, kept_plates([run], query.nesting), values, "guide")


def log_likelihoods(query: Query, values: Values) -> tuple[Tensor, Tensor]:
    """log q with gradient and log p of given latent values, (*kept) each; p: the model's latent sites, unscaled.

    :raises SiteMismatch: where a latent site has no value, or a value no site.
    :raises ValueError: where a value is impossible under model or guide, or a plate subsamples its observations.
    """
    guide = _told(query, query.proposal, values, "guide")
    with torch.no_grad():
        model = _told(query, query.model, values, "model")
        plates = kept_plates([guide, model], query.nesting)
        log_prior = _possible(model, plates, values, "model")
    return _possible(guide, plates, values, "guide"), log_prior


def _told(query: Query, program: Program, values: Values, name: str) -> Trace:
    """Runs the program at these values of its latent sites."""
    run = query.trace(program, Substitute(values), particles=1)
    latents = programs.latents(run)
    for site, node in run.nodes.items():
        if site_is_subsample(node) and (node["fn"].subsample_size or node["fn"].size) < node["fn"].size:
            raise ValueError(  # every run has another subsample
                f"{name}: the plate {site!r} subsamples its observations, so that it is unknown to which ones the "
                "values belong; pass batches to the program, or subsample= to the plate"
            )
    for site in latents:
        if site not in values:
            raise SiteMismatch(f"{name}: its latent site {site!r} has no value; values are given for {list(values)}")
        fn = run.nodes[site]["fn"]
        given = values[site].shape[: values[site].dim() - len(fn.event_shape)]
        plates = zip(reversed(fn.batch_shape), reversed((1,) * len(fn.batch_shape) + tuple(given)), strict=False)
        if any(size > 1 and had == 1 for size, had in plates):  # one value would count for all elements
            raise ValueError(
                f"{name}: its site {site!r} needs a value for each element of its plates, {tuple(fn.batch_shape)}, got "
                f"{tuple(given)}"
            )
    for site in values:
        if site not in run.nodes:
            raise SiteMismatch(f"{name}: it has no site {site!r}, for which a value is given; it has {list(latents)}")
    return run


def _possible(run: Trace, plates: Plates, values: Values, name: str) -> Tensor:
    """The unscaled density of the run's latents, (*kept)."""
    density = log_density_of_latents(run, plates).expand(1, 1, *plates.sizes)[0, 0]
    if bool((density == -torch.inf).any()):
        raise ValueError(
            f"the values of {list(values)} are impossible under the {name}; texts must end with their stop token and "
            "be no longer than its max_tokens"
        )
    return density
