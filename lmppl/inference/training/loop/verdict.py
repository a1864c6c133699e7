"""The verdict on a guide, during training and at its end: whether it is the posterior, and what to do if not."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...core import programs
from ...core.query import Query
from ...core.resampling import systematic
from ...core.weights import Weighted, log_ratio, pair_densities, weigh
from ...posterior.log_weights import pareto_khat
from ...processes import distributed

logger = logging.getLogger("lmppl")

LEAST_ESS, MOST_KHAT, MOST_IMPOSSIBLE, MOST_MISSED, MOST_LACKING = 0.1, 0.7, 0.5, 0.25, 0.15
MOST_GAP = 1.0  # nats between the bounds of log Z
ENOUGH_ESS, SURE_ESS = 0.5, 0.9  # of N: the weights agree; they agree even if sd(u) still falls
FALLS = 0.9  # sd(u) falls if it is now less than this share of what it was
SEEN = 5.0  # effective draws of the prior, at least, to tell what a guide misses
ENOUGH, MOST_DRAWS = 100.0, 4096  # effective draws that suffice; draws over all observations, at most
AGAIN = 32  # of these draws are scored under the guide, for each observation
REMEDY = (
    "where a condition makes draws impossible, let a part of the training draws satisfy it: "
    "exploration=Mixture((Tempered(), 0.5), (Proposal(masked), 0.5)) with a program masked by allowed=, or "
    "replay=Replay() and gflownet.demonstrate(...) of values that SMC or MetropolisHastings found; or train longer, "
    "with more particles, or by Linex; see docs/constrained.md"
)

UNCHECKED = (
    "too few of the model's own draws explain the held-out observations. lmppl.inference.diagnose makes more of them; "
    "fit(exact_sample=...) uses a draw of the posterior"
)


@torch.no_grad()
def judge(query: Query, num_particles: int = 128, *, thorough: bool = False) -> dict[str, float]:
    """Means over the observations of all processes, from draws of the guide and of the model's own latents.

    ``held_out_khat`` is a median.  ``held_out_missed`` and ``held_out_lacking`` are `missed` and `lacking`; they use
    the model's draws, because a mode that the guide has lost does not show in the guide's draws.  A figure that cannot
    be estimated is absent.  More of the model's draws are made while too few are effective, if some are impossible, or
    if ``thorough``.
    """
    prior = replace(query, guide=None)
    own, found = weigh(query, num_particles).u, [weigh(prior, num_particles)]
    u, v = of_all(own), of_all(found[0].u)
    while 2 * v.numel() <= MOST_DRAWS and (thorough or bool((v == -torch.inf).any())) and effective(u, v) < ENOUGH:
        found.append(weigh(prior, len(v)))
        v = torch.cat([v, of_all(found[-1].u)])
    return known(held_out_missed=missed(u, v), held_out_lacking=lacking(query, found, own)) | khat(u)


def known(**figures: float) -> dict[str, float]:
    """The figures that are not NaN."""
    return {name: x for name, x in figures.items() if not math.isnan(x)}


def of_all(u: torch.Tensor) -> torch.Tensor:
    """Log weights (N, observations) of the observations of all processes."""
    return torch.cat(distributed.gather(u.reshape(len(u), -1).cpu()), 1)


def khat(u: torch.Tensor) -> dict[str, float]:
    """The median of Pareto k-hat over observations, from log weights (N, *plates); empty where it is undefined."""
    found = torch.tensor([pareto_khat(w) for w in u.reshape(len(u), -1).T.double()], device=u.device)
    found = found[~found.isnan()]
    return {"held_out_khat": found.median().item()} if len(found) else {}


def missed(u: torch.Tensor, v: torch.Tensor) -> float:
    r"""1 - 1/r for the mean r of :math:`\hat Z_v / \hat Z_u` over observations; 0 unless r > 1 by 3 standard errors.

    ``u`` and ``v`` (N, *plates) are log weights of two proposals for the same observations; observations for which u
    finds nothing are left out.  NaN if too few draws of v are effective.
    """
    if effective(u, v) < SEEN:
        return math.nan
    ratio = _ratios(u, v)
    mean, error = float(ratio.mean()), float(ratio.std() / ratio.numel() ** 0.5)
    return 1 - 1 / mean if mean - 3 * error > 1 else 0.0


def lacking(query: Query, found: list[Weighted], u: torch.Tensor) -> float:
    r"""The share of the posterior to which the guide gives too little, minus one standard error:

    .. math:: E_{p(z \mid y)} \max(0, 1 - e^{\log \hat Z - u(z)}),

    which is the total variation if :math:`\hat Z`, the mean of e^u over the guide's draws (N, *plates), is Z.  The
    draws of the posterior are those of ``found``, resampled; NaN if they are too few.
    """
    v, plates = torch.cat([w.u for w in found]).double(), found[0].plates
    guide, model = query.sketches
    names = programs.latents(model).keys()
    frames = [f for node in programs.scored(model).values() for f in node["cond_indep_stack"]]
    subsampled = any(f.full_size not in (None, f.size) for f in frames)  # each run has other observations
    if subsampled or programs.latents(guide).keys() != names or v.shape[1:] != u.shape[1:]:
        return math.nan
    values = programs.cat_particles([{name: w.values[name] for name in names} for w in found])
    some = (v > -torch.inf).any(0)  # (*plates)
    weights = v.masked_fill(~some, 0.0).softmax(0)
    log_z = u.double().logsumexp(0) - math.log(len(u))
    finds = (v.logsumexp(0) - math.log(len(v)) - log_z).exp().clamp(max=1.0)  # as in `effective`
    count = distributed.total(float((finds / (weights**2).sum(0))[some].sum()))  # over all processes, like the shares
    if count < SEEN:
        return math.nan
    chosen = systematic(weights, AGAIN)
    again = {name: plates.take(x, chosen) for name, x in values.items()}
    pair = query.at(again, particles=AGAIN)
    log_w = log_ratio(*pair_densities(pair, pair.plates())).expand(1, AGAIN, *u.shape[1:])[0].double()
    short = of_all((1 - (log_z - log_w).exp()).clamp(min=0.0).masked_fill(~some, torch.nan))
    short = short[:, ~short.isnan().all(0)]
    return max(0.0, float(short.mean() - short.std() / min(count, short.numel()) ** 0.5))


def effective(u: torch.Tensor, v: torch.Tensor) -> float:
    """How many effective draws of the second proposal `missed` would use.

    Draws that find less than the first proposal count in that proportion: if all of them miss its mode, their weights
    are alike, and they say nothing.
    """
    ratio = _ratios(u, v)
    if not bool(ratio.sum() > 0):
        return 0.0
    return float(ratio.sum() ** 2 / (ratio**2).sum() * ratio.mean().clamp(max=1.0))


def _ratios(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """e^v / mean e^u, (N, observations), without the observations for which u finds nothing."""
    u, v = u.double().reshape(len(u), -1), v.double().reshape(len(v), -1)
    log_z = u.logsumexp(0) - math.log(len(u))
    return (v - log_z)[:, log_z > -torch.inf].exp()


def verdict(found: Mapping[str, float], before: Sequence[Mapping[str, float]]) -> str:
    """Whether the guide is the posterior: "converged", "improving", or "suspect: " with the reason.

    - *converged*: at least half of the draws are effective, and no figure contradicts;
    - *improving*: sd(u), or the share of impossible draws, has fallen by a tenth within three evaluations;
    - *suspect*: neither; or the weights agree and another figure contradicts: the guide has lost modes.

    ``found`` is what was measured on held-out observations now, ``before`` what the earlier evaluations measured.
    """
    ess, why = found["held_out_ess"], reasons(found)
    if ess >= SURE_ESS and not why:
        return "converged"
    falls = bool(before) and _falls(found, before[0])
    if falls and not (ess >= ENOUGH_ESS and why):
        return "improving"
    if ess >= ENOUGH_ESS and not why:
        return "converged"
    return f"suspect: {why[0] if why else f'the effective sample size is {ess:.2g} of 1'}"


def _falls(now: Mapping[str, float], before: Mapping[str, float]) -> bool:
    (sd, impossible), (old_sd, old) = ([x["held_out_sd_u"], x["held_out_impossible"]] for x in (now, before))
    return impossible < FALLS * old or (impossible <= old and sd < FALLS * old_sd)


def reasons(found: Mapping[str, float]) -> list[str]:
    """Why these figures are not those of a posterior."""
    checks = (
        ("held_out_ess", lambda x: x < LEAST_ESS, "the effective sample size is {:.2g} of 1"),
        ("held_out_khat", lambda x: x > MOST_KHAT, "k-hat is {:.2g}"),
        ("held_out_impossible", lambda x: x > MOST_IMPOSSIBLE, "{:.0%} of the guide's draws are impossible"),
        ("held_out_missed", lambda x: x > MOST_MISSED, "the guide misses {:.0%} of what the model's own draws find"),
        ("held_out_lacking", lambda x: x > MOST_LACKING, "the guide gives too little to {:.0%} of the posterior"),
        ("held_out_gap", lambda x: x > MOST_GAP, "the bounds of log Z are {:.2g} nats apart"),
        ("impossible", lambda x: x > MOST_IMPOSSIBLE, "{:.0%} of the last training draws were impossible"),
    )
    return [told.format(found[name]) for name, bad, told in checks if name in found and bad(found[name])]


def warn(name: str, history: Sequence[Mapping[str, Any]]) -> None:
    """Warns where training has not found the posterior, or where it is not known whether the guide has lost modes."""
    recent = [metrics["impossible"] for metrics in history[-10:] if "impossible" in metrics]
    found = {**history[-1], **({"impossible": sum(recent) / len(recent)} if recent else {})}
    if why := reasons(found):
        logger.warning("%s: the guide is not the posterior: %s. %s", name, ", ".join(why), REMEDY)
    elif "verdict" in found and "held_out_missed" not in found:
        logger.warning("%s: the guide was not checked for lost modes: %s", name, UNCHECKED)
