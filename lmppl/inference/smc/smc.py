"""Sequential Monte Carlo, token by token inside the text sites of a program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from ...distributions.arguments import refuse_nan
from .. import programs
from ..arguments import at_least, is_program
from ..partial import advance, is_grown, keep_first, only
from ..posterior.posterior import Posterior
from ..posterior.run import Run
from ..programs import Node, Program, SiteMismatch
from ..resampling import SCHEMES, conditional
from ..validation import check_axes
from ..weights import Weighted, device_of, kept_plates, log_density, log_density_of_latents, log_ratio
from .ancestry import Ancestry, Resampling
from .growth import Growth
from .twists import Twist, checked, log_twist


@dataclass(frozen=True, kw_only=True)
class Sequential(Posterior):
    """Weighted particles with their ``ancestry``: every resampling on their way, see `lmppl.inference.smc.ancestry`."""

    ancestry: Ancestry = field(repr=False)


class SMC:
    r"""Particles that grow token by token, weighed and resampled on the way.

    .. math:: W_t = W_{t-1} \, p(z_t \mid z_{<t})^{scale} / q(z_t \mid z_{<t}), \qquad \hat Z = \sum_n W^n

    The weights W target the untwisted prefix and carry the evidence.  Before each token the particles of a plate
    element are resampled in proportion to W psi, if the effective sample size of W psi is below ``ess_threshold * N``;
    then psi is divided out, :math:`W^n = \frac1N \sum_m W^m \psi^m / \psi^n`, so that :math:`E[\hat Z] = Z` for any
    positive psi.  An observation or factor enters when the program reaches it, once all particles have ended the text
    before it; latent sites that are no texts are drawn whole.

    :param model: a Pyro program.
    :param guide: another, with the model's latent sites, its texts in the model's order; None: the model proposes.
    :param num_particles: N.
    :param ess_threshold: between 0 (never resample) and 1 (whenever weights differ).
    :param resampling: "systematic", "stratified", "multinomial" or "residual".
    :param twist: psi, see `lmppl.inference.smc.twists`: None, "stop", "flow" or a function prefix -> log psi.
    :param max_plate_nesting: guessed where not given.

    ``run(*args)`` raises SiteMismatch where model and guide do not fit, and ValueError for a subsampled plate that does
    not enclose every site.

    Source: Chopin and Papaspiliopoulos 2020, ch. 10; twists: Zhao et al. 2024.

    Example::

        posterior = SMC(model, guide, num_particles=64, twist="flow").run(x, y)
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None = None,
        num_particles: int = 64,
        ess_threshold: float = 0.5,
        resampling: str = "systematic",
        twist: Twist = None,
        *,
        max_plate_nesting: int | None = None,
    ):
        is_program(model=model, guide=model if guide is None else guide)
        at_least(1, num_particles=num_particles)
        if not 0 <= ess_threshold <= 1:
            raise ValueError(f"ess_threshold: must lie between 0 and 1, got {ess_threshold}")
        if resampling not in SCHEMES:
            raise ValueError(f"resampling: expected one of {', '.join(SCHEMES)}, got {resampling!r}")
        self.model, self.guide, self.num_particles = model, guide, num_particles
        self.ess_threshold, self.resampling, self.twist = ess_threshold, resampling, checked(twist)
        self.max_plate_nesting = max_plate_nesting

    def run(self, *args: Any, **kwargs: Any) -> Sequential:
        """The weighted particles for these arguments, with their ancestry."""
        return run(self, args, kwargs)


@torch.no_grad()
def run(
    smc: SMC, args: tuple[Any, ...], kwargs: dict[str, Any], retained: Mapping[str, Tensor] | None = None
) -> Sequential:
    """SMC, or with ``retained`` values of every latent site (1, *plate axes, *event) conditional SMC.

    Conditional SMC (Andrieu et al. 2010) holds particle 0 to the retained values, through multinomial resamplings
    that keep it: if they are a draw of the posterior, then :math:`E[1 / \\hat Z] = 1 / Z`.
    """
    state = _State(smc, args, kwargs, retained)
    while site := state.next_text():
        state.grow(*site)
    state.check()
    log_weights, origin = state.log_weights - math.log(smc.num_particles), Run(smc.model, args, kwargs)
    found = Posterior.of(state.proposal, state.plates, log_weights, smc.guide, origin)
    return Sequential(**{f.name: getattr(found, f.name) for f in fields(found)}, ancestry=tuple(state.ancestry))


class _State:
    """Particles in the middle of a run: ``values`` of the sites met so far, and log N W (particle, *kept).

    A Python frame cannot be resampled, so programs are run again under ``values`` to learn their next site; each site
    enters the weights once: ``seen`` are those that have.
    """

    def __init__(
        self, smc: SMC, args: tuple[Any, ...], kwargs: dict[str, Any], retained: Mapping[str, Tensor] | None = None
    ):
        self.smc, self.args, self.kwargs, self.retained = smc, args, kwargs, retained
        both = [smc.model] if smc.guide is None else [smc.guide, smc.model]
        sketches = programs.sketches(both, args, kwargs)
        self.nesting = programs.nesting_of(sketches) if smc.max_plate_nesting is None else smc.max_plate_nesting
        self.plates = kept_plates(sketches, self.nesting, subsampling=False)
        self.values: dict[str, Tensor] = {}
        self.seen: set[str] = set()
        self.log_weights = torch.zeros(smc.num_particles, *self.plates.sizes, device=device_of(*sketches))
        self.ancestry: list[Resampling] = []
        self.proposal = self.target = Trace()

    def next_text(self) -> tuple[Node, Node] | None:
        """Take in everything before the next text site; that site in the model and in the guide, None at the end."""
        self.proposal, site = self._advance(self.smc.guide or self.smc.model, self.values, texts_only=True)
        self.values |= programs.values(self.proposal)
        target, met = self.proposal, site
        if self.smc.guide is not None:
            target, met = self._advance(self.smc.model, self.values)
        self._take_in(target)
        if site is None or met is None or met["name"] == site["name"]:
            if (site is None) != (met is None):
                raise SiteMismatch(_mismatch(site, met, target))
            return None if site is None or met is None else (met, site)
        if is_grown(met):
            raise SiteMismatch(_mismatch(site, met, target))
        # The guide draws a text before another latent on which the model's text depends: it is drawn whole.
        fn = site["fn"]
        value = fn.sample_and_log_prob()[0] if hasattr(fn, "sample_and_log_prob") else fn.sample()
        self.values[site["name"]] = keep_first(self.retained, site["name"], fn, value)
        return self.next_text()

    def grow(self, model: Node, guide: Node) -> None:
        """Grow a text in every particle, resampling on the way."""
        growth = Growth(model, guide, self.plates, self.retained)

        def log_following(value: Tensor) -> Tensor:
            trace, _ = self._advance(self.smc.model, self.values | {growth.name: value})
            rest = only(trace, set(trace.nodes) - self.seen - {growth.name})
            return log_density(rest, self.plates)[0].to(self.log_weights.device)

        while not growth.done:
            self._resample(growth, log_twist(self.smc.twist, growth, log_following, self._before))
            self.log_weights = self.log_weights + growth.step()
        refuse_nan(self.log_weights)
        self.values[growth.name] = growth.value
        self.seen.add(growth.name)

    def _before(self) -> dict[str, Tensor]:
        """The latent sites before the one that is being grown, (particle, *kept, ...)."""
        nodes = programs.latents(self.proposal).items()
        return {name: self.plates.lead(node["value"], node["fn"].event_dim) for name, node in nodes}

    def _advance(self, program: Program, values: dict[str, Tensor], *, texts_only: bool = False) -> Any:
        shape = {"nesting": self.nesting, "particles": self.smc.num_particles}
        retained = self.retained if texts_only else None
        return advance(program, self.args, self.kwargs, values, texts_only=texts_only, retained=retained, **shape)

    def _take_in(self, target: Trace) -> None:
        """Multiply the weights by p/q of the sites that the model has met since; a guide's auxiliary sites are 1/q."""
        self.target = target
        auxiliary = {n for n, s in self.proposal.nodes.items() if s["infer"].get("is_auxiliary")}
        fresh = (set(target.nodes) | auxiliary) - self.seen
        log_p = log_density(only(target, fresh), self.plates)[0].to(self.log_weights.device)
        log_q = log_density_of_latents(only(self.proposal, fresh), self.plates)[0]
        self.log_weights = self.log_weights + log_ratio(log_p, log_q)
        self.seen |= fresh

    def _resample(self, growth: Growth, log_psi: Tensor) -> None:
        n = self.smc.num_particles
        score = self.log_weights + log_psi  # (particle, *kept)
        weights = score.softmax(0)  # NaN where all are zero
        low = (weights * weights).sum(0) * (self.smc.ess_threshold * n) > 1  # (*kept): 1 / sum w^2 is too small
        if not bool(low.any()):
            return
        weights = torch.where(low, weights, 1.0)
        stay = torch.arange(n, device=score.device).view(n, *[1] * low.dim())
        scheme = SCHEMES[self.smc.resampling] if self.retained is None else conditional
        chosen = torch.where(low, scheme(weights), stay)
        self.ancestry.append(Resampling(growth.name, growth.prefix.shape[-1], chosen, score - math.log(n)))
        log_mean = score.logsumexp(0) - math.log(n)
        self.log_weights = torch.where(low, log_mean - log_psi.gather(0, chosen), self.log_weights)
        growth.select(chosen)
        for name, node in programs.latents(self.proposal).items():
            self.values[name] = self.plates.take(node["value"], chosen)
            node["value"] = self.values[name]

    def check(self) -> None:
        """Raise where the programs' last run contradicts what was taken for granted before."""
        if self.smc.guide is not None:
            programs.match(self.target, self.proposal)
        nodes = programs.scored(self.target).values()
        subsampled = any(f.full_size not in (None, f.size) for node in nodes for f in node["cond_indep_stack"])
        if self.retained is not None and subsampled:
            raise ValueError("model: a plate is subsampled; run it in full, so that the exact sample is of these data")
        if kept_plates([self.target, self.proposal], self.nesting, subsampling=False) != self.plates:
            raise ValueError("model: its plates changed with the values of its sites; they must not")
        weighted = Weighted(self.log_weights, self.values, self.target, self.proposal, self.plates)
        check_axes(self.smc.model, self.args, self.kwargs, weighted)


def _mismatch(site: Node | None, met: Node | None, target: Trace) -> str:
    if site is None:
        assert met is not None
        return f"guide: it does not sample {met['name']!r}, a latent site of the model"
    if met is not None:
        return f"guide: it comes to {site['name']!r} where the model comes to {met['name']!r}; keep texts in one order"
    node = target.nodes.get(site["name"])
    observed = node is not None and node["is_observed"]
    return f"guide: it samples {site['name']!r}, but the model {'observes' if observed else 'does not have'} that site"
