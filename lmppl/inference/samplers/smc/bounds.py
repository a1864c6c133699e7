r"""Bounds of the evidence from both sides, and of the divergences of a guide, where nothing can be enumerated.

For an unbiased estimate of the evidence, and for the same estimator with one particle held to a draw of the posterior,

.. math:: E[\log \hat Z] \le \log Z \le E_{z \sim p(z \mid y)}[\log \hat Z(z)],

the latter because conditional SMC has :math:`E[1 / \hat Z(z)] = P(\hat Z > 0) / Z \le 1 / Z`: it is 1 / Z unless
hard factors let a run find nothing possible.  Source: Grosse et al. 2015 (bidirectional
Monte Carlo); with twisted SMC: Zhao et al. 2024.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from ...core import programs
from ...core.arguments import at_least
from ...core.plates import kept_plates
from ...core.programs import Program
from ...core.query import Query
from ...core.weights import log_ratio, pair_densities, scale, weigh
from ...posterior.posterior import Posterior
from .smc import SMC, run
from .twists import Twist

ExactSample = Posterior | Mapping[str, Tensor]


@dataclass(frozen=True)
class Bounds:
    """Estimates of log Z that are too low on average (``lowers``) and too high (``uppers``), (repetition, *plates)."""

    lowers: Tensor
    uppers: Tensor

    @property
    def lower(self) -> Tensor:
        """Their mean, (*plates), in nats: an unbiased estimate of a lower bound."""
        return self.lowers.mean(0)

    @property
    def upper(self) -> Tensor:
        """Their mean, (*plates), in nats: an unbiased estimate of an upper bound; inf where q(z) = 0 there."""
        return self.uppers.mean(0)

    @property
    def gap(self) -> Tensor:
        """upper - lower: what log Z is known to, up to the bounds' own standard errors."""
        return self.upper - self.lower

    @property
    def standard_errors(self) -> tuple[Tensor, Tensor]:
        """Of lower and upper over the repetitions, (*plates) each; NaN for a single one."""
        n = len(self.lowers)
        if n == 1:
            return (torch.full_like(self.lower, torch.nan),) * 2
        return self.lowers.std(0) / n**0.5, self.uppers.std(0) / n**0.5


class Sandwich:
    """Lower bounds of the log evidence by SMC, upper bounds by conditional SMC from an exact posterior sample.

    The arguments are those of `SMC`; ``ess_threshold=0`` is importance sampling, and with ``num_particles=1`` too the
    bounds are the ELBO, E_q u, and the EUBO, E_p u.  Conditional runs resample multinomially.  The gap closes as
    ``num_particles`` grows, and is zero for the posterior as guide.

    :param repetitions: independent pairs of runs to average over.

    ``run(*args, exact_sample=...)`` takes a `Posterior` that is exact (`Enumeration`), of which each repetition draws
    anew, or the values of every latent site by name, (*plates, ...): those of `simulate`.  The upper bound holds on
    average over exact samples: for one simulated sample, average over data sets too.  It is inf where the guide cannot
    draw the sample, a text that is longer than the guide's among them.  It raises ValueError where a
    latent site has no value, auxiliary sites of the guide included, and for a subsampled plate.

    Example::

        values, observed = simulate(model, x, y)  # of y no more than its shape is used
        sandwich = Sandwich(model, guide, num_particles=64, twist="flow")
        bounds = sandwich.run(x, observed["y"], exact_sample=values)
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
        repetitions: int = 1,
        max_plate_nesting: int | None = None,
    ):
        at_least(1, repetitions=repetitions)
        self.repetitions = repetitions
        self.smc = SMC(
            model, guide, num_particles, ess_threshold, resampling, twist, max_plate_nesting=max_plate_nesting
        )

    def on(self, model: Program, guide: Program | None = None) -> Sandwich:
        """The same bounds of another model, and where there is a guide by another; None: its own."""
        other = copy.copy(self)
        other.smc = self.smc.on(model, guide)
        return other

    def sized(self, num_particles: int) -> Sandwich:
        """The same bounds by this many particles."""
        other = copy.copy(self)
        other.smc = self.smc.sized(num_particles)
        return other

    def run(self, *args: Any, exact_sample: ExactSample, **kwargs: Any) -> Bounds:
        """The bounds for these arguments."""
        lowers, uppers = [], []
        for _ in range(self.repetitions):
            lowers.append(run(self.smc, args, kwargs).log_evidence)
            uppers.append(run(self.smc, args, kwargs, _draw(exact_sample, 1)).log_evidence)
        return Bounds(torch.stack(lowers), torch.stack(uppers))


class Simulated(NamedTuple):
    """A joint draw from a model: an exact posterior sample of its latents, given the observations drawn with it."""

    values: dict[str, Tensor]
    observed: dict[str, Tensor]


@torch.no_grad()
def simulate(model: Program, *args: Any, **kwargs: Any) -> Simulated:
    r"""Draw (z, y) jointly from the model, its observed sites drawn too.

    .. math:: (z, y) \sim p(z, y) \quad\Rightarrow\quad z \sim p(z \mid y)

    ``model`` conditioned on ``observed`` is ``pyro.condition(poutine.uncondition(model), data=observed)``, or the model
    called with them where it takes its observations as arguments.

    :raises ValueError: for a factor, a tempered (scaled) or a masked site: such a model has no forward simulation.
    """
    with poutine.block(hide_fn=lambda msg: msg["type"] == "sample"), programs.Unmasked():
        trace = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    nodes = programs.scored(trace)
    plates = kept_plates([trace], programs.nesting_of([trace]))
    for name, node in nodes.items():
        masked = node["mask"] is not None and not bool(torch.as_tensor(node["mask"]).all())
        tempered = not bool((torch.as_tensor(scale(node, plates), dtype=torch.float64) - 1).abs().max() < 1e-9)
        if isinstance(node["fn"], Unit) or masked or tempered:
            what = "a factor" if isinstance(node["fn"], Unit) else "masked" if masked else "scaled"
            raise ValueError(f"model: the site {name!r} is {what}, so that the model cannot be simulated forward")
    observed = {n: node["value"] for n, node in nodes.items() if node["infer"].get("was_observed")}
    return Simulated({n: node["value"] for n, node in nodes.items() if n not in observed}, observed)


class Divergences(NamedTuple):
    """Intervals (lower, upper) of both divergences of a guide from the posterior, in nats, (*plates) each."""

    reverse_kl: tuple[Tensor, Tensor]  # KL(q || p)
    forward_kl: tuple[Tensor, Tensor]  # KL(p || q)
    elbo: Tensor
    eubo: Tensor


@torch.no_grad()
def divergences(
    model: Program,
    guide: Program | None,
    *args: Any,
    bounds: Bounds,
    exact_sample: ExactSample,
    num_particles: int = 1000,
    **kwargs: Any,
) -> Divergences:
    r"""How far a guide is from the posterior, from bounds of the evidence.

    .. math:: KL(q \| p) = \log Z - E_q u, \qquad KL(p \| q) = E_p u - \log Z

    :param bounds: of the log evidence, by a `Sandwich` with any (better) guide.
    :param exact_sample: as for `Sandwich`; a Posterior gives ``num_particles`` draws, values one.
    :param num_particles: draws of the guide.

    The intervals carry the Monte Carlo error of the ELBO, the EUBO and the bounds, and are cut off at zero.
    """
    at_least(1, num_particles=num_particles)
    query = Query(model, guide, args, kwargs)
    elbo = weigh(query, num_particles).u.mean(0)
    values = _draw(exact_sample, num_particles)
    n = num_particles if isinstance(exact_sample, Posterior) else 1
    eubo = _log_weights(query, values, n).mean(0)
    low, high = bounds.lower, bounds.upper
    return Divergences(
        ((low - elbo).clamp(min=0), (high - elbo).clamp(min=0)),
        ((eubo - high).clamp(min=0), (eubo - low).clamp(min=0)),
        elbo,
        eubo,
    )


@torch.no_grad()
def upper_bound(query: Query, u: Tensor, exact_sample: ExactSample) -> Tensor:
    """Of log Z, (*plates), too high on average: an exact sample in the place of one of the proposal's N draws.

    ``u`` (N, *plates) are the log weights of the draws.
    """
    exact = _log_weights(query, _draw(exact_sample, 1), 1)
    return torch.cat([exact, u[1:].expand(len(u) - 1, *exact.shape[1:])]).logsumexp(0) - math.log(len(u))


def _draw(exact_sample: ExactSample, n: int) -> Mapping[str, Tensor]:
    if not isinstance(exact_sample, Posterior | Mapping):
        raise ValueError(f"exact_sample: expected a Posterior or the latent values by site, got {exact_sample!r}")
    return exact_sample.resample(n).values if isinstance(exact_sample, Posterior) else exact_sample


def _log_weights(query: Query, values: Mapping[str, Tensor], n: int) -> Tensor:
    """u at given values of the latents, (n, *plates)."""
    pair = query.at(values, particles=n)
    if missing := {name for trace in (pair.model, pair.proposal) for name in programs.latents(trace)} - set(values):
        raise ValueError(f"exact_sample: it has no value for the sites {sorted(missing)}")
    plates = pair.plates()
    return log_ratio(*pair_densities(pair, plates)).expand(1, n, *plates.sizes)[0]
