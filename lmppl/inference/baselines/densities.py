"""Draws of a guide and their densities: what every baseline makes its loss of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from .. import programs
from ..programs import Draw, Program, Replay, SiteMismatch
from ..validation import check_axes_once
from ..weights import Plates, Weighted, kept_plates, log_density, log_density_of_latents

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Densities:
    """Log-densities (particle, *kept) of particles; gradients flow through ``log_q`` alone."""

    log_p: Tensor  # log p(z, observed)
    log_prior: Tensor  # log p(z): the model's latent sites, unscaled
    log_q: Tensor
    plates: Plates

    @property
    def u(self) -> Tensor:
        return self.log_p - self.log_q.detach()


class Drawn:
    """Particles of a guide, which can be scored as often as its parameters change.

    :param values: what to score instead of fresh draws: latents and subsamples, particles leading.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_particles: int,
        max_plate_nesting: int | None = None,
        values: Values | None = None,
    ):
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        nesting = programs.plate_nesting([guide, model], args, kwargs, max_plate_nesting)
        self.shape = {"nesting": nesting, "particles": num_particles}
        if values is None:
            with torch.no_grad():
                values = programs.values(programs.trace(guide, args, kwargs, Draw(), **self.shape))
        self.values = values

    def densities(self) -> Densities:
        """One pass of the guide with gradient, one of the model without.

        :raises SiteMismatch: where model and guide do not fit.
        """
        replay = Replay(self.values)
        guide = programs.trace(self.guide, self.args, self.kwargs, replay, **self.shape)
        with torch.no_grad():
            model = programs.trace(self.model, self.args, self.kwargs, replay, **self.shape)
            programs.match(model, guide)
            check_axes_once(self.model, self.args, self.kwargs, lambda: self._weighted(model, guide))
            latents = programs.latents(model).items()
            known = {n: node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"]) for n, node in latents}
            plates = kept_plates([model, guide], self.shape["nesting"])
            log_p = log_density(model, plates, known=known)
            log_prior = log_density_of_latents(model, plates, known)
        log_q = log_density_of_latents(guide, plates)
        log_p, log_prior, log_q = (self._each(x, plates) for x in (log_p, log_prior, log_q))
        return Densities(log_p, log_prior, log_q, plates)

    def _weighted(self, model: Trace, guide: Trace) -> Weighted:
        plates = kept_plates([model, guide], self.shape["nesting"])
        return Weighted(torch.zeros(self.shape["particles"]), dict(self.values), model, guide, plates)

    def log_q(self, plates: Plates) -> Tensor:
        """The guide's log-densities (particle, *kept) as it now is, with gradient."""
        guide = programs.trace(self.guide, self.args, self.kwargs, Replay(self.values), **self.shape)
        return self._each(log_density_of_latents(guide, plates), plates)

    def _each(self, x: Tensor, plates: Plates) -> Tensor:
        return x.expand(1, self.shape["particles"], *plates.sizes)[0]


def log_likelihood(
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: Values,
    max_plate_nesting: int | None = None,
) -> Tensor:
    """log q (*kept) of given latent values, each as the guide itself would draw it, with gradient.

    :raises SiteMismatch: where a latent site of the guide has no value, or a value no site.
    :raises ValueError: where a value is impossible under the guide.
    """
    nesting = programs.plate_nesting([guide], args, kwargs, max_plate_nesting)
    run = programs.trace(guide, args, kwargs, Replay(values), nesting=nesting, particles=1)
    latents = programs.latents(run)
    for name in latents:
        if name not in values:
            raise SiteMismatch(f"guide: its latent site {name!r} has no value; there are values of {list(values)}")
    for name in values:
        if name not in run.nodes:
            raise SiteMismatch(f"guide: it has no site {name!r}, of which there is a value; it has {list(latents)}")
    log_q = log_density_of_latents(run, kept_plates([run], nesting))[0, 0]
    if bool((log_q == -torch.inf).any()):
        raise ValueError(
            f"the values of {list(values)} are impossible under the guide; texts must end with their stop token and be "
            "no longer than its max_tokens"
        )
    return log_q
