"""The state of a run of SMC: its particles, and the programs, which are run again after a resampling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from pyro.poutine import Trace
from torch import Tensor

from ....distributions.arguments import refuse_nan
from ...core import programs
from ...core.auxiliary import is_transformed, lacking, log_uniform
from ...core.partial import Pause, advance, is_grown, keep_first, only, too_long
from ...core.plates import kept_plates
from ...core.programs import Node, Program, SiteMismatch
from ...core.query import Pair, Query
from ...core.resampling import SCHEMES, conditional
from ...core.sites import texts_of
from ...core.validation import check_axes
from ...core.weights import device_of, log_density, log_density_of_latents, log_ratio, log_weight_of_prior
from .ancestry import Resampling
from .growth import Growth
from .twists import Twist, defended, log_twist

EQUAL = 1e-5  # tolerance for rounding: equal weights have an ESS of N up to this


class Settings(Protocol):
    """The attributes of `SMC` that a run uses."""

    model: Program
    guide: Program | None
    num_particles: int
    ess_threshold: float
    resampling: str
    twist: Twist
    max_plate_nesting: int | None


class State:
    """The particles of a run: ``values`` of the sites met so far, and log N W, (particle, *kept).

    A running Python program cannot be resampled.  So a program runs until its particles are resampled; then it is left,
    and run again with ``values``.  Each site enters the weights once: ``seen`` are the sites that have.  The guide runs
    ahead of the model; sites that it drew beyond the place of a resampling have not entered the weights, and are drawn
    again.
    """

    def __init__(
        self, smc: Settings, args: tuple[Any, ...], kwargs: dict[str, Any], retained: Mapping[str, Tensor] | None = None
    ):
        self.smc, self.retained = smc, retained
        self.query = Query(smc.model, smc.guide, args, kwargs, smc.max_plate_nesting)
        sketches = self.query.sketches
        self.plates = kept_plates(sketches, self.query.nesting, subsampling=False)
        self.texts = {name for name, node in programs.latents(sketches[0]).items() if is_grown(node)}
        self.values: dict[str, Tensor] = {}
        self.seen: set[str] = set()
        self.log_weights = torch.zeros(smc.num_particles, *self.plates.sizes, device=device_of(*sketches))
        self.ancestry: list[Resampling] = []
        self.proposal = self.target = Trace()
        self.moved = False

    def next_text(self) -> tuple[Node, Node] | None:
        """Weighs everything before the next text site; returns this site in model and guide, or None at the end."""
        while True:
            self.moved = False
            pause = self._pause if self.smc.guide is None else None
            proposal, site = self._advance(self.query.proposal, texts_only=True, pause=pause)
            if self.moved:
                continue
            self.proposal, target, met = proposal, proposal, site
            self.values |= programs.values(proposal)
            if self.smc.guide is not None:
                target, met = self._advance(self.smc.model, pause=self._pause)
                if self.moved:
                    continue
            self._take_in(target, set(programs.latents(self.proposal)))
            if site is None or met is None or met["name"] == site["name"]:
                if (site is None) != (met is None):
                    raise SiteMismatch(_mismatch(site, met, target))
                return None if site is None or met is None else (met, site)
            if is_grown(met):
                raise SiteMismatch(_mismatch(site, met, target))
            # The guide has a text before a latent that comes first in the model: the text is drawn in one step.
            value = texts_of(site).draw()[0]
            self.values[site["name"]] = keep_first(self.retained, site["name"], site["fn"], value)

    def grow(self, model: Node, guide: Node) -> None:
        """Grows a text in every particle, token by token, with resampling."""
        growth = Growth(model, guide, self.plates, self.retained)
        self._miss(growth.name, guide["fn"])

        def log_following(value: Tensor) -> Tensor:
            trace, _ = self._advance(self.smc.model, {growth.name: value})
            rest = only(trace, set(trace.nodes) - self.seen - {growth.name})
            return log_density(rest, self.plates)[0].to(self.log_weights.device)

        while not growth.done:
            log_psi = log_twist(self.smc.twist, growth, log_following, self._before)
            chosen = self._resample(growth.name, growth.prefix.shape[-1], log_psi)
            if chosen is not None:
                growth.select(chosen)
            self._add(growth.step())
        refuse_nan(self.log_weights)
        self.values[growth.name] = growth.value
        self.seen.add(growth.name)

    def _before(self) -> dict[str, Tensor]:
        """The values of the latent sites before the growing text, (particle, *kept, ...)."""
        nodes = programs.latents(self.proposal).items()
        return {name: self.plates.lead(node["value"], node["fn"].event_dim) for name, node in nodes}

    def _advance(
        self,
        program: Program,
        more: Mapping[str, Tensor] | None = None,
        *,
        texts_only: bool = False,
        pause: Pause | None = None,
    ) -> tuple[Trace, Node | None]:
        return advance(
            self.query,
            program,
            self.values | dict(more or {}),
            particles=self.smc.num_particles,
            texts_only=texts_only,
            retained=self.retained if texts_only else None,
            pause=pause,
        )

    def _pause(self, name: str, target: Trace) -> bool:
        """Weighs what the model has met before its latent site ``name``; returns whether particles were resampled.

        With a twist, resampling waits for the next text, if there is one, because psi is known only there.
        """
        if name in self.seen:
            return False
        if self.smc.guide is None:
            self.proposal = target
            self.values |= programs.values(target)
        drawn = list(programs.latents(self.proposal))
        met = max((i for i, n in enumerate(drawn) if n in target.nodes), default=-1)
        if not self._take_in(target, set(drawn[: met + 1])):
            return False
        if self.smc.twist is not None and not self.texts <= set(self.values):
            return False
        ahead, proposal = set(drawn[met + 1 :]), self.proposal
        self.proposal = only(proposal, set(proposal.nodes) - ahead)
        self.moved = self._resample(name, 0) is not None
        if self.moved:
            self.values = {n: v for n, v in self.values.items() if n not in ahead}
        else:
            self.proposal = proposal
        return self.moved

    def _take_in(self, target: Trace, drawn: set[str]) -> bool:
        """Multiplies the weights by p/q of the sites that the model has met since; returns whether any changed.

        ``drawn``: the guide's latent sites up to this place.  Auxiliary sites that the model lacks enter here, too.
        """
        self.target = target
        alone = lacking(only(self.proposal, drawn), self.query.sketches[-1].nodes)
        fresh = (set(target.nodes) | set(alone)) - self.seen
        self.seen |= fresh
        new, own = only(target, fresh), only(self.proposal, fresh)
        if self.smc.guide is None:
            increment = log_weight_of_prior(new, self.plates)[0]
        else:
            entering = {name: node for name, node in alone.items() if name in fresh}
            log_r = log_uniform(entering, self.plates, transformed=is_transformed(self.query.sketches[0]))
            log_p = (log_density(new, self.plates) + log_r)[0].to(self.log_weights.device)
            increment = log_ratio(log_p, log_density_of_latents(own, self.plates)[0])
        for name, node in programs.latents(own).items():
            self._miss(name, node["fn"])
        return self._add(increment)

    def _add(self, increment: Tensor) -> bool:
        """Multiplies the weights; returns whether any changed.  An infinite weight (q = 0) stays infinite."""
        sum_ = self.log_weights + increment.to(self.log_weights.device)
        self.log_weights = sum_.masked_fill(self.log_weights == torch.inf, torch.inf)
        return bool((increment != 0).any())

    def _miss(self, name: str, fn: Any) -> None:
        """Makes a weight infinite where the retained text is longer than any text of the guide, so that q = 0."""
        longer = too_long(self.retained, name, fn)
        if longer is not None:
            first = self.plates.reduce(longer.double())[0] > 0  # (1, *kept)
            self.log_weights = torch.cat([self.log_weights[:1].masked_fill(first, torch.inf), self.log_weights[1:]])

    def _resample(self, site: str, token: int, log_psi: Tensor | None = None) -> Tensor | None:
        """Resamples plate elements of a low ESS; returns the chosen indices (particle, *kept), or None if all stay."""
        n = self.smc.num_particles
        score = self.log_weights if log_psi is None else self.log_weights + log_psi  # (particle, *kept)
        weights = score.softmax(0)  # NaN where all are zero
        low = (weights * weights).sum(0) * (self.smc.ess_threshold * n) > 1 + EQUAL  # (*kept): 1 / sum w^2 is too small
        if not bool(low.any()):
            return None
        log_v = score if log_psi is None else defended(self.log_weights, score, always=isinstance(self.smc.twist, str))
        weights = torch.where(low, log_v.softmax(0), 1.0)
        stay = torch.arange(n, device=score.device).view(n, *[1] * low.dim())
        scheme = SCHEMES[self.smc.resampling] if self.retained is None else conditional
        chosen = torch.where(low, scheme(weights), stay)
        self.ancestry.append(Resampling(site, token, chosen, score - math.log(n), log_psi is not None))
        ratio = 0.0 if log_psi is None else (self.log_weights - log_v).gather(0, chosen)  # W / V of each parent
        self.log_weights = torch.where(low, log_v.logsumexp(0) - math.log(n) + ratio, self.log_weights)
        for name, node in programs.latents(self.proposal).items():
            node["value"] = self.values[name] = self.plates.take(node["value"], chosen)
        return chosen

    def check(self) -> None:
        """Raises an error if the last run of the programs contradicts the assumptions of the run."""
        if self.smc.guide is not None:
            programs.match(self.target, self.proposal)
        nodes = programs.scored(self.target).values()
        subsampled = any(f.full_size not in (None, f.size) for node in nodes for f in node["cond_indep_stack"])
        if self.retained is not None and subsampled:
            raise ValueError("model: a plate is subsampled; run it in full, because the exact sample is of all data")
        if kept_plates([self.target, self.proposal], self.query.nesting, subsampling=False) != self.plates:
            raise ValueError("model: its plates changed with the values of its sites; they must not")
        check_axes(Pair(self.query, self.proposal, self.target, len(self.log_weights)))


def _mismatch(site: Node | None, met: Node | None, target: Trace) -> str:
    if site is None:
        assert met is not None
        return f"guide: it does not sample {met['name']!r}, a latent site of the model"
    if met is not None:
        return f"guide: it samples {site['name']!r} where the model samples {met['name']!r}; keep texts in one order"
    node = target.nodes.get(site["name"])
    observed = node is not None and node["is_observed"]
    return f"guide: it samples {site['name']!r}, but the model {'observes' if observed else 'does not have'} that site"
