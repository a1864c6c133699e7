r"""Twists: scores psi of a prefix by which SMC resamples, looking ahead; the weights never contain them.

* ``"stop"``: p(stop | prefix)^scale, times the factors and observations up to the next latent site, evaluated with the
  prefix stopped.
* ``"flow"``: that over the guide's q(stop | prefix).  A trained guide's flow is
  F(z_1..z_t) = R(z_1..z_t stop) / q(stop | z_1..z_t) (Hu et al. 2024); relative to the prefix's own p(z_1..z_t)^scale
  it is this number.
* a function: prefix (particle, *plates, t) -> log psi (particle, *plates), of the text site that is being grown; with
  a second argument it gets the values of the sites before it, by name, (particle, *plates, ...) each.

For a text that has ended, "stop" and "flow" are the factors and observations that follow.  Where a tool is writing, no
text can stop, and they stay what they were before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .growth import Growth

Twist: TypeAlias = Literal["stop", "flow"] | Callable[..., Tensor] | None


def checked(twist: Twist) -> Twist:
    if twist is None or twist in ("stop", "flow") or callable(twist):
        return twist
    raise ValueError(f"twist: expected None, 'stop', 'flow' or a function of the prefix, got {twist!r}")


def log_twist(
    twist: Twist, growth: Growth, log_following: Callable[[Tensor], Tensor], before: Callable[[], Mapping[str, Tensor]]
) -> Tensor:
    """log psi of every particle, (particle, *kept), finite everywhere.

    ``log_following(value)``: the factors and observations up to the next latent site, where the site being grown has
    ``value`` (particle, *plate axes, width).  ``before()``: the latent sites before it, (particle, *kept, ...).
    """
    kept = (growth.shape[0], *growth.plates.sizes)
    if twist is None:
        return torch.zeros(kept, device=growth.q.ended.device)
    if callable(twist):
        prefix = growth.plates.lead(growth.prefix, 1)  # (particle, *kept, *others, t)
        log_psi = twist(prefix, before()) if _wants_values(twist) else twist(prefix)
        if not isinstance(log_psi, Tensor) or log_psi.shape[: len(kept)] != kept:
            found = tuple(log_psi.shape) if isinstance(log_psi, Tensor) else type(log_psi).__name__
            raise ValueError(f"twist: it returned {found}; expected a tensor of shape {kept}")
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
