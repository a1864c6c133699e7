r"""Lower and upper bounds of the evidence, and of the divergences of a guide, where enumeration is impossible.

An unbiased estimate of the evidence, and the same estimator with one particle kept at a draw z from the posterior, give

.. math:: E[\log \hat Z] \le \log Z \le E_{z \sim p(z \mid y)}[\log \hat Z(z)].

The upper bound holds because conditional SMC has :math:`E[1 / \hat Z(z)] = P(\hat Z > 0) / Z \le 1 / Z`; it is 1 / Z
unless hard factors can leave a run without a possible particle.  Source: Grosse et al. 2015 (bidirectional Monte
Carlo); with twisted SMC: Zhao et al. 2024.
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
    r"""Lower and upper bounds of the log evidence log Z, in nats.

    .. math:: E[lower] \le \log Z \le E[upper]

    `Sandwich.run` returns it.

    :param lowers: estimates that are too low on average, (repetition, *plates).
    :param uppers: estimates that are too high on average, (repetition, *plates).

    Example::

        exact = Enumeration(model).run(x, y)
        bounds = Sandwich(model, guide, num_particles=64, repetitions=4).run(x, y, exact_sample=exact)
        bounds.lower, bounds.upper, bounds.gap  # (*plates) each
        bounds.standard_errors  # of lower and of upper
    """

    lowers: Tensor
    uppers: Tensor

    @property
    def lower(self) -> Tensor:
        """The mean of ``lowers``, (*plates), in nats: an unbiased estimate of a lower bound."""
        return self.lowers.mean(0)

    @property
    def upper(self) -> Tensor:
        """The mean of ``uppers``, (*plates), in nats: an unbiased estimate of an upper bound.

        It is inf if an exact sample has q(z) = 0.
        """
        return self.uppers.mean(0)

    @property
    def gap(self) -> Tensor:
        """upper - lower, (*plates), in nats: how precisely log Z is known, apart from the standard errors."""
        return self.upper - self.lower

    @property
    def standard_errors(self) -> tuple[Tensor, Tensor]:
        """The standard errors of lower and of upper over the repetitions, (*plates) each; NaN for one repetition."""
        n = len(self.lowers)
        if n == 1:
            return (torch.full_like(self.lower, torch.nan),) * 2
        return self.lowers.std(0) / n**0.5, self.uppers.std(0) / n**0.5


class Sandwich:
    r"""Bounds of the log evidence: lower ones by SMC, upper ones by conditional SMC from an exact posterior sample.

    .. math:: E[\log \hat Z] \le \log Z \le E_{z \sim p(z \mid y)}[\log \hat Z(z)]

    The gap closes as ``num_particles`` grows, and is zero if the guide is the posterior.  ``ess_threshold=0`` is
    importance sampling; with ``num_particles=1`` as well, the bounds are the ELBO, E_q u, and the EUBO, E_p u.

    The exact sample comes from one of two sources.  `Enumeration` gives it where the latents can be enumerated.
    Otherwise `simulate` draws latents and observations together: then the latents are an exact sample given those
    observations.  The upper bound holds on average over exact samples, so with `simulate` average over data sets too.

    :param model: a Pyro program.
    :param guide: a Pyro program that samples the model's latent sites; None: the model proposes them itself.
    :param num_particles: N, the number of particles per plate element.
    :param ess_threshold: from 0 (never resample) to 1 (resample whenever weights differ).
    :param resampling: "systematic", "stratified", "multinomial" or "residual"; conditional runs use multinomial.
    :param twist: None, "stop", "flow" or a function, as in `SMC`.
    :param repetitions: the number of independent pairs of runs to average over.
    :param max_plate_nesting: how many batch axes the plates take; None: found from a run without a network.

    Source: Grosse et al. 2015; with twisted SMC: Zhao et al. 2024.

    Example::

        values, observed = simulate(model, x, y)  # y gives only the shape
        sandwich = Sandwich(model, guide, num_particles=64, twist="flow")
        bounds = sandwich.run(x, observed["y"], exact_sample=values)
        bounds.lower, bounds.upper
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
        """The same settings for another model, and for another guide if there is one.

        :param model: a Pyro program.
        :param guide: a Pyro program; None: the guide is unchanged.
        """
        other = copy.copy(self)
        other.smc = self.smc.on(model, guide)
        return other

    def sized(self, num_particles: int) -> Sandwich:
        """The same settings with ``num_particles`` particles."""
        other = copy.copy(self)
        other.smc = self.smc.sized(num_particles)
        return other

    def run(self, *args: Any, exact_sample: ExactSample, **kwargs: Any) -> Bounds:
        """The bounds for these arguments of model and guide.

        :param exact_sample: an exact `Posterior` (`Enumeration`), from which each repetition draws a sample, or the
            values of every latent site by name, (*plates, ...) each, from `simulate`.
        :raises ValueError: if a latent site has no value, auxiliary sites of the guide included, and for a subsampled
            plate.
        :raises SiteMismatch: if model and guide do not fit together.
        """
        lowers, uppers = [], []
        for _ in range(self.repetitions):
            lowers.append(run(self.smc, args, kwargs).log_evidence)
            uppers.append(run(self.smc, args, kwargs, _draw(exact_sample, 1)).log_evidence)
        return Bounds(torch.stack(lowers), torch.stack(uppers))


class Simulated(NamedTuple):
    """A joint draw of a model's latents and observations: an exact posterior sample, given these observations.

    `simulate` returns it.

    :param values: the latent values by site, as the model draws them.
    :param observed: the observed values by site.

    Example::

        simulated = simulate(model, x, y)
        lm.decode(simulated.values["z"]), lm.decode(simulated.observed["y"])
    """

    values: dict[str, Tensor]
    observed: dict[str, Tensor]


@torch.no_grad()
def simulate(model: Program, *args: Any, **kwargs: Any) -> Simulated:
    r"""Draws latents and observations of a model together.

    .. math:: (z, y) \sim p(z, y) \quad\Rightarrow\quad z \sim p(z \mid y)

    So the latents are an exact posterior sample given the drawn observations.  To condition the model on these, call it
    with them, or use ``pyro.condition(poutine.uncondition(model), data=simulated.observed)``.

    :param model: a Pyro program; its observed sites are drawn too.
    :param args: its arguments, and ``kwargs``.  Given observations are replaced; only their shapes are used.
    :param kwargs: its keyword arguments.
    :returns: a `Simulated`, a pair of dicts (values, observed).
    :raises ValueError: for a factor, and for a scaled or masked site, with which a model cannot be simulated.

    Example::

        values, observed = simulate(model, x, y)
        posterior = Importance(model, guide).run(x, observed["y"])  # the answer is known: values["z"]
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
            raise ValueError(f"model: the site {name!r} is {what}, so the model cannot be simulated forward")
    observed = {n: node["value"] for n, node in nodes.items() if node["infer"].get("was_observed")}
    return Simulated({n: node["value"] for n, node in nodes.items() if n not in observed}, observed)


class Divergences(NamedTuple):
    r"""Intervals (lower, upper) of both KL divergences between a guide and the posterior, in nats, (*plates) each.

    The function `divergences` returns it.

    :param reverse_kl: the interval of :math:`KL(q \| p) = \log Z - E_q u`, which is large if the guide draws what the
        posterior excludes.
    :param forward_kl: the interval of :math:`KL(p \| q) = E_p u - \log Z`, which is large if the guide misses mass of
        the posterior.
    :param elbo: the estimate of :math:`E_q u`.
    :param eubo: the estimate of :math:`E_p u`.

    Example::

        exact = Enumeration(model).run(x, y)
        bounds = Sandwich(model, guide).run(x, y, exact_sample=exact)
        found = divergences(model, guide, x, y, bounds=bounds, exact_sample=exact, num_particles=100)
        low, high = found.forward_kl  # (*plates) each
    """

    reverse_kl: tuple[Tensor, Tensor]
    forward_kl: tuple[Tensor, Tensor]
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
    r"""The KL divergences between a guide and the posterior in both directions, from bounds of the evidence.

    .. math:: KL(q \| p) = \log Z - E_q u, \qquad KL(p \| q) = E_p u - \log Z

    The intervals have the Monte Carlo error of the ELBO, the EUBO and the bounds, and are cut off at zero.

    :param model: a Pyro program.
    :param guide: the guide q to judge; None: the model's own latent sites.
    :param args: the arguments of model and guide, and ``kwargs``.
    :param kwargs: their keyword arguments.
    :param bounds: bounds of the log evidence from a `Sandwich`, whose guide may be another, better one.
    :param exact_sample: as in `Sandwich.run`; a Posterior gives ``num_particles`` draws, given values count as one.
    :param num_particles: the number of draws from the guide.
    :returns: `Divergences`, in nats.
    :raises ValueError: if a latent site has no value in ``exact_sample``.

    Example::

        values, observed = simulate(model, x, y)
        bounds = Sandwich(model, guide).run(x, observed["y"], exact_sample=values)
        found = divergences(model, guide, x, observed["y"], bounds=bounds, exact_sample=values, num_particles=100)
        found.reverse_kl  # (lower, upper)
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
    """An upper bound of log Z on average, (*plates): an exact sample replaces one of the proposal's N draws.

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
