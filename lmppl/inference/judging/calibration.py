r"""Simulation-based calibration: the position of the truth among posterior draws, on data drawn from the model.

With :math:`(z^*, y) \sim p(z, y)`, z* is a draw from p(z | y).  So its position among draws of the posterior, by any
statistic of (z, y), is uniform.  Statistics must depend on the data, else the prior passes the test.

Source: Talts, Betancourt, Simpson, Vehtari and Gelman 2018; statistics that depend on the data: Modrák et al. 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ... import text
from ..core import programs
from ..core.programs import Substitute
from ..core.query import Query
from ..core.resampling import multinomial
from ..core.sites import is_text
from ..core.weights import log_density_of_latents, log_ratio, site_log_prob, text_log_probs
from ..posterior.algorithm import on, posterior_of
from ..posterior.posterior import Posterior
from ..samplers.smc.bounds import simulate
from .pools import MEMBERS, Pool, alike, member_weights

Statistic = Callable[[dict[str, Tensor]], Tensor]
Simulate = Callable[[tuple[Any, ...], dict[str, Tensor]], tuple[Any, ...]]


class NotChecked(ValueError):
    """Raised where calibration is not possible for this model, or not without ``simulate``."""


@dataclass
class Calibration:
    """The figures of an algorithm on simulated data, with D = data sets * plate elements.

    ``positions[statistic]`` (D) are in [0, 1], and NaN where the algorithm found zero evidence.  ``lowers`` (D) is its
    log evidence, NaN if it does not estimate it.  ``proposed`` and ``uppers`` (D) are bounds from draws of its
    proposal, too low and too high on average, in nats; NaN if the proposal has auxiliary sites.
    """

    positions: dict[str, Tensor] = field(default_factory=dict)
    lowers: Tensor = field(default_factory=lambda: torch.zeros(0))
    proposed: Tensor = field(default_factory=lambda: torch.zeros(0))
    uppers: Tensor = field(default_factory=lambda: torch.zeros(0))
    pools: list[Pool] = field(default_factory=list, repr=False)
    error: Exception | None = None  # the error that ended the simulations early


@torch.no_grad()
def calibrate(
    algorithm: Any,
    query: Query,
    *,
    simulations: int,
    num_particles: int,
    to_args: Simulate | None = None,
    statistics: Mapping[str, Statistic] | None = None,
) -> Calibration:
    """Runs the algorithm on ``simulations`` data sets drawn from its model.

    An exception on simulated data ends the calibration and becomes its ``error``.

    :param query: the algorithm's model, guide and arguments; see `query_of`.
    :param num_particles: draws for the bounds of each evidence.
    :param to_args: puts simulated observations into the arguments.  None: the model is conditioned on them, which a
        guide would not see.
    :raises NotChecked: for a model that cannot be simulated, for a guide without ``to_args``, and for an algorithm that
        does not run the model that it is given.
    """
    if query.guide is not None and to_args is None:
        raise NotChecked(
            "simulate: the guide reads the observations from its arguments; give simulate=, a function "
            "that puts them there"
        )
    if simulations:
        try:
            simulate(query.model, *query.args, **query.kwargs)
        except ValueError as error:
            raise NotChecked(str(error)) from error
    found = Calibration()
    for _ in range(simulations):
        try:
            _simulation(found, algorithm, query, num_particles, to_args, statistics or {})
        except NotChecked:
            raise
        except Exception as error:  # an algorithm that fails on data of its own model is not sound
            found.error = error
            break
    return found


def _simulation(
    found: Calibration,
    algorithm: Any,
    query: Query,
    num_particles: int,
    to_args: Simulate | None,
    statistics: Mapping[str, Statistic],
) -> None:
    """Adds one simulated data set."""
    truth, observed = simulate(query.model, *query.args, **query.kwargs)
    if to_args is not None:
        query = replace(query, args=to_args(query.args, observed))
        posterior = posterior_of(algorithm, query.args, query.kwargs)
    else:
        query = replace(query, model=pyro.condition(poutine.uncondition(query.model), data=observed))
        posterior = _on(algorithm, query)
    n, draws = effective(posterior), posterior
    if posterior.num_particles > MEMBERS:  # -inf stays -inf
        weights = posterior.log_weights.softmax(0).nan_to_num(nan=1 / posterior.num_particles)
        n, draws = n.clamp(max=MEMBERS), posterior.take(multinomial(weights, MEMBERS))
    looked = _Look(query, draws, truth, num_particles)
    pool = looked.pool(n, draws, statistics)
    for name, x in pool.statistics.items():
        found.positions.setdefault(name, torch.zeros(0, dtype=torch.float64))
        found.positions[name] = torch.cat([found.positions[name], position(x, pool.weights)])
    proposed, upper = looked.bounds()
    found.lowers, found.proposed, found.uppers = (
        torch.cat([old, new.flatten().double().cpu()])
        for old, new in (
            (found.lowers, posterior.log_evidence), (found.proposed, proposed), (found.uppers, upper)
        )
    )  # fmt: skip
    found.pools.append(pool)


def _on(algorithm: Any, query: Query) -> Posterior:
    """The algorithm's posterior on the query's model.

    :raises NotChecked: if the algorithm did not run this model, because an algorithm inside it still runs its own.
    """
    asked = False

    def model(*args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked = True
        return query.model(*args, **kwargs)

    try:
        other = on(algorithm, model)
    except ValueError as error:
        raise NotChecked(str(error)) from error
    posterior = posterior_of(other, query.args, query.kwargs)
    if not asked:
        raise NotChecked(
            f"simulate: {type(algorithm).__name__} does not run the model that it is given, which has the simulated "
            "observations; write its method on(model, guide) so that it passes the model on, or give simulate=, a "
            "function that puts the observations into the arguments"
        )
    return posterior


def effective(posterior: Posterior) -> Tensor:
    """The number of independent draws that a posterior is worth, (*plates); inf for an enumeration.

    Markov chains that are too short, or never move, are worth one draw each.
    """
    if hasattr(posterior, "unexplored"):
        return torch.full_like(posterior.log_evidence, torch.inf)
    return posterior.ess.nan_to_num(nan=float(getattr(posterior, "num_chains", 1)))


def position(x: Tensor, weights: Tensor) -> Tensor:
    r"""The position of the truth, the last of a pool's members (n + 1, C), among them, (C).

    .. math:: F(t^*-) + U P(t = t^*), \qquad U \sim \mathrm{Uniform}(0, 1)

    It is uniform if the truth is a random member.  ``weights`` as in `member_weights`; ties are broken at random.  NaN
    where the truth is the only member.
    """
    drawn, true = x.double(), x[-1].double()
    same = alike(true, drawn)
    below = (weights * ((drawn < true) & ~same)).sum(0)
    ties = (weights * same).sum(0)
    u = torch.rand(true.shape, dtype=weights.dtype, device=weights.device)
    return (below + u * ties).masked_fill(weights[-1] == 1, torch.nan).cpu()


class _Look:
    """One run of the model at N draws, the truth, and ``num_particles`` draws of the proposal, in this order."""

    def __init__(
        self,
        query: Query,
        draws: Posterior,
        truth: Mapping[str, Tensor],
        num_particles: int,
    ):
        self.plates, self.n, self.events = draws.sites.plates, draws.num_particles, draws.sites.event_dims
        proposal = query.trace(query.proposal, programs.Draw(), particles=num_particles)
        own = {}
        for name, value in truth.items():
            axes = query.nesting - (value.dim() - self.events[name])
            own[name] = value.reshape(1, *[1] * axes, *value.shape)
        self.auxiliary = set(programs.latents(proposal)) != set(own)
        anew = {name: proposal.nodes[name]["value"] for name in own} if not self.auxiliary else own
        values = programs.cat_particles([{name: draws.values[name] for name in own}, own, anew])
        total = len(next(iter(values.values())))
        self.trace = query.trace(query.model, Substitute(values), particles=total)
        shape = (total, *self.plates.sizes)
        sites = programs.scored(self.trace)
        known = text_log_probs(sites)
        self.log_p = {
            name: site_log_prob(node, self.plates, known.get(name)).expand(1, *shape)[0] for name, node in sites.items()
        }
        self.observed = [n for n, node in programs.scored(self.trace).items() if node["is_observed"]]
        prior = self._sum([name for name in self.log_p if name not in self.observed])
        self.log_joint = prior + self._sum(self.observed)
        self.log_q = prior[self.n :]
        if query.guide is not None and not self.auxiliary:
            proposed = {name: value[self.n :] for name, value in values.items()}
            particles = total - self.n
            scored = query.trace(query.guide, Substitute(proposed), particles=particles)
            log_q = log_density_of_latents(scored, self.plates)
            self.log_q = log_q.expand(1, particles, *self.plates.sizes)[0]

    def _sum(self, names: list[str]) -> Tensor:
        zero = torch.zeros(len(next(iter(self.log_p.values()))), *self.plates.sizes)
        return sum((self.log_p[name].to(zero.device) for name in names), zero.double())

    def bounds(self) -> tuple[Tensor, Tensor]:
        r"""The log evidence estimated from the proposal, and with the truth in place of one draw, (*plates) each.

        .. math:: E[\log \frac1M \sum_m w_m] \le \log Z \le E[\log \frac1M (w(z^*) + \sum_{m > 1} w_m)]
        """
        if self.auxiliary:  # the truth has no values for auxiliary sites
            return (torch.full(self.plates.sizes, torch.nan),) * 2
        u = log_ratio(self.log_joint[self.n :].to(self.log_q.device), self.log_q.double())
        own, anew = u[:1], u[1:]
        mean = math.log(len(anew))
        return anew.logsumexp(0) - mean, torch.cat([own, anew[1:]]).logsumexp(0) - mean

    def pool(self, n: Tensor, draws: Posterior, more: Mapping[str, Statistic]) -> Pool:
        """The pool of the draws, which are worth n independent ones, and the truth."""
        plates, members = self.plates, self.n + 1
        shape = (members, *plates.sizes)
        found, samples, texts = {}, {}, {}
        log_densities = {"log p(z, observed)"}
        for name, node in programs.scored(self.trace).items():
            if name in self.observed:
                continue
            samples[name] = plates.lead(node["value"], node["fn"].event_dim)[:members]
            if is_text(node["fn"]):
                found[f"length of {name}"] = _summed(text.length(samples[name]), plates.sizes)
                found[f"log p({name})"] = self.log_p[name][:members]
                log_densities.add(f"log p({name})")
                texts[name] = _full(samples[name], shape)
            elif not node["fn"].event_dim:
                found[name] = _summed(samples[name], plates.sizes)
        if self.observed:
            found["log p(observed)"] = self._sum(self.observed)[:members]
            log_densities.add("log p(observed)")
            found["log p(z, observed)"] = self.log_joint[:members]
        found |= {name: statistic(samples).expand(shape) for name, statistic in more.items()}
        weights = member_weights(draws.log_weights.reshape(self.n, -1), n.flatten())
        rows = torch.cat([_full(x, shape).double() for x in samples.values()], -1)
        kinds = torch.unique(rows.flatten(0, -2), dim=0, return_inverse=True)[1].view(members, -1)
        return Pool(
            weights.cpu(),
            {name: x.double().reshape(members, -1).cpu() for name, x in found.items()},
            frozenset(log_densities),
            {name: x.reshape(members, -1, x.shape[-1]).cpu() for name, x in texts.items()},
            kinds.cpu(),
        )


def _full(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(N + 1, *plates, others) with all plates expanded and the others flattened: (N + 1, *plates, K)."""
    return x.expand(*shape, *x.shape[len(shape) :]).reshape(*shape, -1)


def _summed(x: Tensor, plates: tuple[int, ...]) -> Tensor:
    """(N + 1, *plates, others) summed over the others: (N + 1, *plates)."""
    return x.reshape(*x.shape[: 1 + len(plates)], -1).sum(-1).expand(len(x), *plates)
