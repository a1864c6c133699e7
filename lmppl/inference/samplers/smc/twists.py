r"""Twists: scores psi of a prefix that tell SMC which particles to keep.  The weights never contain them.

* ``"stop"``: p(stop | prefix)^scale times the factors and observations up to the next latent site, computed with the
  text stopped here.
* ``"flow"``: the same divided by the guide's q(stop | prefix).  The flow of a trained guide is
  F(z_1..z_t) = R(z_1..z_t stop) / q(stop | z_1..z_t) (Hu et al. 2024); divided by the prefix's p(z_1..z_t)^scale it is
  this number.
* a function of the prefix (particle, *plates, t) of the growing text that returns log psi (particle, *plates).  With a
  second parameter it also gets the values of the sites before, by name, (particle, *plates, ...) each.  NaN and +inf
  raise ValueError; -inf (psi = 0) takes the smallest positive psi of its plate element.

"stop" and "flow" about double the tokens per particle.  Do not use them where a stopped prefix says little about how
the text will end, as in the embedded stories, whose object comes last: at about 2,000 tokens, 24 seeds of three
stories, the root mean square error of log Z was 0.43, 0.82, 0.45 without a twist and 0.93, 1.57, 0.92 with "stop"
(`python -m benchmarks.twists`).

For a text that has ended, "stop" and "flow" are the factors and observations that follow.  While a tool is writing, no
text can stop, and they keep their last values.
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

DEFENDED = 0.5  # below this ESS / N of the scores, particles are chosen half by the weights alone


def checked(twist: Twist) -> Twist:
    if twist is None or twist in ("stop", "flow") or callable(twist):
        return twist
    raise ValueError(f"twist: expected None, 'stop', 'flow' or a function of the prefix, got {twist!r}")


def log_twist(
    twist: Twist, growth: Growth, log_following: Callable[[Tensor], Tensor], before: Callable[[], Mapping[str, Tensor]]
) -> Tensor | None:
    """log psi of every particle, (particle, *kept), finite everywhere; None without a twist.

    ``log_following(value)``: the log-probability of factors and observations up to the next latent site if the growing
    site has ``value`` (particle, *plate axes, width).  ``before()``: latent sites before it, (particle, *kept, ...).
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
        if log_psi.numel() and not float(log_psi.max()) < torch.inf:  # the maximum is NaN if any element is
            which = "NaN" if bool(log_psi.isnan().any()) else "infinity"
            raise ValueError(
                f"twist: it returned {which} in log psi of site {growth.name!r}; expected numbers, or -inf"
            )
        return positive(log_psi.reshape(*kept, -1).sum(-1))
    value, log_p, log_q = growth.stop()
    log_psi = torch.zeros(kept, device=growth.prefix.device)
    if bool(log_p.isfinite().any()):  # a text can stop here
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
    """Replaces a zero or undefined psi by the smallest positive psi of its group (axis 0), or 1 if there is none."""
    known = log_psi.isfinite()
    least = log_psi.masked_fill(~known, torch.inf).amin(0)
    return torch.where(known, log_psi, least.masked_fill(least == torch.inf, 0.0))


def defended(log_weights: Tensor, log_scores: Tensor, *, always: bool) -> Tensor:
    r"""log V, where particles are resampled in proportion to V (axis 0): the scores W psi, or a defensive mixture.

    .. math:: V^n = \tfrac12 \frac{W^n \psi^n}{\sum_m W^m \psi^m} + \tfrac12 \frac{W^n}{\sum_m W^m}

    The mixture is used if the effective sample size of W psi is less than half of N, and ``always`` for "stop" and
    "flow".  V is W times a positive number, so the evidence stays unbiased.  W/V is at most twice its mean, so a psi
    that favours few particles costs at most a factor of two in variance (Hesterberg 1995).
    """
    by_scores, by_weights = (x - x.logsumexp(0) for x in (log_scores, log_weights))
    few = (2 * by_scores).logsumexp(0).exp() * ((1.0 if always else DEFENDED) * len(log_scores)) > 1 + 1e-5  # (*kept)
    return torch.where(few, torch.logaddexp(by_scores, by_weights) - math.log(2), by_scores)
