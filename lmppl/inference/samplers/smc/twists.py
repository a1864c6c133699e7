r"""Twists: scores psi of a prefix by which SMC resamples, looking ahead; the weights never contain them.

* ``"stop"``: p(stop | prefix)^scale, times the factors and observations up to the next latent site, evaluated with the
  prefix stopped.
* ``"flow"``: that over the guide's q(stop | prefix).  A trained guide's flow is
  F(z_1..z_t) = R(z_1..z_t stop) / q(stop | z_1..z_t) (Hu et al. 2024); relative to the prefix's own p(z_1..z_t)^scale
  it is this number.
* a function: prefix (particle, *plates, t) -> log psi (particle, *plates), of the text site that is being grown; with
  a second argument it gets the values of the sites before it, by name, (particle, *plates, ...) each.  NaN and +inf are
  refused; -inf, psi = 0, takes the smallest positive psi of its plate element.

"stop" and "flow" ask about twice the tokens a particle.  Where a stopped prefix says little of how the text will end
(the embedded stories, whose object comes last), leave them out: at about 2,000 tokens, 24 seeds of three stories,
the root mean square error of log Z was 0.43, 0.82, 0.45 without a twist and 0.93, 1.57, 0.92 with "stop"
(`python -m benchmarks.twists`).

For a text that has ended, "stop" and "flow" are the factors and observations that follow.  Where a tool is writing, no
text can stop, and they stay what they were before.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .growth import Growth

Twist: TypeAlias = Literal["stop", "flow"] | Callable[..., Tensor] | None

DEFENDED = 0.5  # below this ESS / N of the scores, weights alone have half of the say


def checked(twist: Twist) -> Twist:
    if twist is None or twist in ("stop", "flow") or callable(twist):
        return twist
    raise ValueError(f"twist: expected None, 'stop', 'flow' or a function of the prefix, got {twist!r}")


def log_twist(
    twist: Twist, growth: Growth, log_following: Callable[[Tensor], Tensor], before: Callable[[], Mapping[str, Tensor]]
) -> Tensor | None:
    """log psi of every particle, (particle, *kept), finite everywhere; None without a twist.

    ``log_following(value)``: the factors and observations up to the next latent site, where the site being grown has
    ``value`` (particle, *plate axes, width).  ``before()``: the latent sites before it, (particle, *kept, ...).
    """
    if twist is None:
        return None
    kept = (growth.shape[0], *growth.plates.sizes)
    if callable(twist):
        prefix = growth.plates.lead(growth.prefix, growth.texts.event_dim)  # (particle, *kept, *others, t)
        log_psi = twist(prefix, before()) if _wants_values(twist) else twist(prefix)
        if not isinstance(log_psi, Tensor) or log_psi.shape[: len(kept)] != kept:
            found = tuple(log_psi.shape) if isinstance(log_psi, Tensor) else type(log_psi).__name__
            raise ValueError(f"twist: it returned {found}; expected a tensor of shape {kept}")
        if log_psi.numel() and not float(log_psi.max()) < torch.inf:  # NaN is the maximum wherever there is one
            which = "NaN" if bool(log_psi.isnan().any()) else "infinity"
            raise ValueError(
                f"twist: it returned {which} in log psi of site {growth.name!r}; expected numbers, or -inf"
            )
        return positive(log_psi.reshape(*kept, -1).sum(-1))
    value, log_p, log_q = growth.stop()
    log_psi = torch.zeros(kept, device=growth.prefix.device)
    if bool(log_p.isfinite().any()):  # one can stop here
        log_psi = log_p + log_following(value)
        log_psi = positive((log_psi - log_q if twist == "flow" else log_psi).expand(kept))
    if growth.log_psi is not None:
        log_psi = torch.where(growth.inserting, growth.log_psi, log_psi)
    growth.log_psi = log_psi
    return log_psi


def _wants_values(twist: Callable[..., Tensor]) -> bool:
    required = [p for p in inspect.signature(twist).parameters.values() if p.default is p.empty]
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in required) > 1


def positive(log_psi: Tensor) -> Tensor:
    """A zero or undefined psi takes the smallest positive psi of its group (axis 0), 1 where there is none."""
    known = log_psi.isfinite()
    least = log_psi.masked_fill(~known, torch.inf).amin(0)
    return torch.where(known, log_psi, least.masked_fill(least == torch.inf, 0.0))


def defended(log_weights: Tensor, log_scores: Tensor, *, always: bool) -> Tensor:
    r"""The logarithms of the V by which particles are resampled, axis 0: W psi, or where few take most of it

    .. math:: V^n = \tfrac12 \frac{W^n \psi^n}{\sum_m W^m \psi^m} + \tfrac12 \frac{W^n}{\sum_m W^m},

    where the effective sample size of W psi is less than half of N, or ``always`` (for "stop" and "flow").
    V is W times a positive number, so that
    evidence stays unbiased; and W/V is then at most twice its mean, so that a psi of which few particles would take all
    costs a factor of two in variance and no more (a defensive mixture, Hesterberg 1995).
    """
    by_scores, by_weights = (x - x.logsumexp(0) for x in (log_scores, log_weights))
    few = (2 * by_scores).logsumexp(0).exp() * ((1.0 if always else DEFENDED) * len(log_scores)) > 1 + 1e-5  # (*kept)
    return torch.where(few, torch.logaddexp(by_scores, by_weights) - math.log(2), by_scores)
