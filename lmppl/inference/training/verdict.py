"""What to say of a guide when its training has ended: whether it is the posterior, and what to do where it is not."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..posterior.log_weights import pareto_khat
from ..programs import Program
from ..query import Query
from ..weights import weigh

LEAST_ESS, MOST_KHAT, MOST_IMPOSSIBLE, MOST_MISSED = 0.1, 0.7, 0.5, 0.25
SEEN = 5.0  # effective draws of the prior, at least, to say what a guide misses
ENOUGH, MOST_DRAWS = 100.0, 4096  # effective draws after which no more are made; draws over all observations
REMEDY = (
    "where a condition rules draws out, let a part of the training draws satisfy it: "
    "exploration=Mixture((Tempered(), 0.5), (Proposal(masked), 0.5)) with a program masked by allowed=, or "
    "replay=Replay() and gflownet.demonstrate(...) of values that SMC or MetropolisHastings found; or train longer, on "
    "more particles, by Linex; see docs/constrained.md"
)


@torch.no_grad()
def judge(
    model: Program, guide: Program, args: tuple[Any, ...], max_plate_nesting: int | None, num_particles: int = 128
) -> dict[str, float]:
    """Means over observations, from draws of the guide and of the model's own latents.

    ``held_out_khat`` is a median, absent where undefined; ``held_out_missed`` the share of the evidence that the
    model's own draws find and the guide's do not: what a guide has lost does not show in what it draws.
    """
    u, v = (weigh(Query(model, q, args, {}, max_plate_nesting), num_particles).u for q in (guide, None))
    while 2 * v.numel() <= MOST_DRAWS and bool((v == -torch.inf).any()) and effective(u, v) < ENOUGH:
        v = torch.cat([v, weigh(Query(model, None, args, {}, max_plate_nesting), len(v)).u])
    khat = torch.tensor([pareto_khat(w) for w in u.reshape(len(u), -1).T.double()])
    khat = khat[~khat.isnan()]
    return {"held_out_missed": missed(u, v)} | ({"held_out_khat": khat.median().item()} if len(khat) else {})


def missed(u: torch.Tensor, v: torch.Tensor) -> float:
    r"""1 - 1/r of the mean r of :math:`\hat Z_v / \hat Z_u` over observations; 0 unless r > 1 by 3 standard errors.

    ``u`` and ``v`` (N, *plates) are log weights of two proposals for the same observations; those of which u finds
    nothing are left out.
    """
    if effective(u, v) < SEEN:
        return 0.0
    ratio = _ratios(u, v)
    mean, error = float(ratio.mean()), float(ratio.std() / ratio.numel() ** 0.5)
    return 1 - 1 / mean if mean - 3 * error > 1 else 0.0


def effective(u: torch.Tensor, v: torch.Tensor) -> float:
    """How many effective draws of the second proposal `missed` would speak from."""
    ratio = _ratios(u, v)
    return float(ratio.sum() ** 2 / (ratio**2).sum()) if bool(ratio.sum() > 0) else 0.0


def _ratios(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """e^v / mean e^u, (N, observations); without the observations of which u finds nothing."""
    u, v = u.double().reshape(len(u), -1), v.double().reshape(len(v), -1)
    log_z = u.logsumexp(0) - math.log(len(u))
    return (v - log_z)[:, log_z > -torch.inf].exp()


def reasons(found: dict[str, float]) -> list[str]:
    """Why these numbers are not those of a posterior."""
    checks = (
        ("held_out_ess", lambda x: x < LEAST_ESS, "the effective sample size is {:.2g} of 1"),
        ("held_out_khat", lambda x: x > MOST_KHAT, "k-hat is {:.2g}"),
        ("held_out_impossible", lambda x: x > MOST_IMPOSSIBLE, "{:.0%} of the guide's draws are impossible"),
        ("held_out_missed", lambda x: x > MOST_MISSED, "the guide misses {:.0%} of what the model's own draws find"),
        ("impossible", lambda x: x > MOST_IMPOSSIBLE, "{:.0%} of the last training draws were impossible"),
    )
    return [told.format(found[name]) for name, bad, told in checks if name in found and bad(found[name])]
