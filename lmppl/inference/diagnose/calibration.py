r"""Simulation-based calibration: where the truth lies among posterior draws, on data drawn from the model.

With :math:`(z^*, y) \sim p(z, y)`, z* is itself a draw of p(z | y), so its position among draws of the posterior, by
any statistic of (z, y), is uniform.  Source: Talts, Betancourt, Simpson, Vehtari and Gelman 2018; statistics that
depend on the data, without which the prior passes for a posterior: Modrák et al. 2023.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ... import text
from .. import programs
from ..posterior.posterior import Posterior
from ..programs import Program, Replay
from ..smc.bounds import Sandwich, simulate
from ..weights import site_log_prob

Statistic = Callable[[dict[str, Tensor]], Tensor]
Simulate = Callable[[tuple[Any, ...], dict[str, Tensor]], tuple[Any, ...]]


@dataclass
class Calibration:
    """What simulated data say of an algorithm.

    ``positions[statistic]`` (data sets * plate elements) lie in [0, 1], NaN where the algorithm found zero evidence;
    ``lowers`` and ``uppers`` (likewise) bound each data set's log evidence on average, in nats.
    """

    positions: dict[str, Tensor] = field(default_factory=dict)
    lowers: Tensor = field(default_factory=lambda: torch.zeros(0))
    uppers: Tensor = field(default_factory=lambda: torch.zeros(0))


@torch.no_grad()
def calibrate(
    algorithm: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    simulations: int,
    num_particles: int,
    to_args: Simulate | None = None,
    statistics: Mapping[str, Statistic] | None = None,
) -> Calibration:
    """Run the algorithm on ``simulations`` data sets drawn from its model.

    :param num_particles: of the upper bound of each evidence.
    :param to_args: the arguments with simulated observations in them.  None: the model itself is made to observe them,
        which a guide would not see.

    :raises ValueError: for a model that cannot be simulated forward, and for a guide without ``to_args``.
    """
    guide = getattr(algorithm, "guide", None)
    if guide is not None and to_args is None:
        raise ValueError("simulate: the guide reads the observations from its arguments; say where they go")
    positions: dict[str, list[Tensor]] = {}
    lowers, uppers = [], []
    for _ in range(simulations):
        truth, observed = simulate(algorithm.model, *args, **kwargs)
        if to_args is not None:
            model, inputs = algorithm.model, to_args(args, observed)
        else:
            model, inputs = pyro.condition(poutine.uncondition(algorithm.model), data=observed), args
        posterior = with_model(algorithm, model).run(*inputs, **kwargs)
        bounds = Sandwich(model, guide, num_particles, ess_threshold=0).run(*inputs, exact_sample=truth, **kwargs)
        evidence = posterior.log_evidence
        lowers.append(torch.where(evidence.isnan(), bounds.lower, evidence).flatten().cpu())
        uppers.append(bounds.upper.flatten().cpu())
        for name, (drawn, true) in _compare(model, posterior, truth, inputs, kwargs, statistics or {}).items():
            positions.setdefault(name, []).append(position(drawn, true, posterior).flatten().cpu())
    return Calibration({name: torch.cat(x) for name, x in positions.items()}, torch.cat(lowers), torch.cat(uppers))


def with_model(algorithm: Any, model: Program) -> Any:
    """The same algorithm on another model."""
    other = copy.copy(algorithm)
    other.model = model
    return other


def position(drawn: Tensor, true: Tensor, posterior: Posterior) -> Tensor:
    r"""Where the truth lies among weighted draws, uniform if it is one of them; ties are broken at random.

    .. math:: \frac{n F(t^*-) + U (n P(t = t^*) + 1)}{n + 1}, \qquad U \sim \mathrm{Uniform}(0, 1)

    n is the effective sample size: the truth counts as one draw more.  For an enumerated posterior n is infinite.
    ``drawn`` (N, *plates), ``true`` (*plates) -> (*plates).  NaN where all weights are zero.
    """
    weights = posterior.log_weights.softmax(0)  # NaN where all are zero
    close = 1e-4 * (1 + true.abs())  # the same text may score a little differently in another row
    same = (drawn - true).abs() <= close
    same |= drawn == true  # both infinite
    below = (weights * ((drawn < true) & ~same)).sum(0)
    ties = (weights * same).sum(0)
    u = torch.rand(true.shape, dtype=weights.dtype, device=weights.device)
    if hasattr(posterior, "unexplored"):
        return below + u * ties
    n = posterior.ess
    return (n * below + u * (n * ties + 1)) / (n + 1)


def _compare(
    model: Program,
    posterior: Posterior,
    truth: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    more: Mapping[str, Statistic],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Statistics of the posterior's particles (N, *plates) and of the truth (*plates), from one run of the model."""
    plates, n = posterior.sites.plates, posterior.num_particles
    own = {}
    for name, value in truth.items():
        axes = plates.nesting - (value.dim() - posterior.sites.event_dims[name])
        own[name] = value.reshape(1, *[1] * axes, *value.shape)
    values = programs.cat_particles([{name: posterior.values[name] for name in truth}, own])  # (N + 1, ...)
    trace = programs.trace(model, args, kwargs, Replay(values), nesting=plates.nesting, particles=n + 1)
    shape = (n + 1, *plates.sizes)
    found, samples = {}, {}
    log_likelihoods = []
    for name, node in programs.scored(trace).items():
        log_p = site_log_prob(node, plates).expand(1, *shape)[0]
        if node["is_observed"]:
            log_likelihoods.append(log_p)
            continue
        samples[name] = plates.lead(node["value"], node["fn"].event_dim)
        if hasattr(node["fn"], "prefix_scores"):
            found[f"length of {name}"] = _summed(text.length(samples[name]), plates.sizes)
            found[f"log p({name})"] = log_p
        elif not node["fn"].event_dim:
            found[name] = _summed(samples[name], plates.sizes)
    if log_likelihoods:
        found["log p(observed)"] = torch.stack(log_likelihoods).sum(0)
    found |= {name: statistic(samples).expand(shape) for name, statistic in more.items()}
    return {name: (x[:-1].double(), x[-1].double()) for name, x in found.items()}


def _summed(x: Tensor, plates: tuple[int, ...]) -> Tensor:
    """(N + 1, *plates, others) -> (N + 1, *plates)."""
    return x.reshape(*x.shape[: 1 + len(plates)], -1).sum(-1).expand(len(x), *plates)


def uniformity(positions: Tensor) -> float:
    """The p-value of a chi-square test, 8 positions or more a bin and at most 20 bins; NaN with fewer than 24."""
    positions = positions[~positions.isnan()]
    bins = min(20, len(positions) // 8)
    if bins < 3:
        return float("nan")
    expected = len(positions) / bins
    counts = torch.bincount((positions * bins).long().clamp(0, bins - 1), minlength=bins).double()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((bins - 1) / 2, dtype=torch.float64), statistic / 2))
