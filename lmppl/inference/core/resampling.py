"""Resampling: pure functions from normalised weights (N, *plates) to n particle indices (n, *plates).

Source: Douc, Cappé and Moulines 2005.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...randomness import uniform


def systematic(weights: Tensor, n: int | None = None) -> Tensor:
    """n evenly spaced points in the cumulative weights, with one uniform shift per plate element.

    Particle i is chosen floor(n w_i) or ceil(n w_i) times; E[count] = n w_i.
    """
    n = len(weights) if n is None else n
    start = uniform(weights.shape[1:], axis=0, dtype=torch.float64, device=weights.device)
    at = (torch.arange(n, dtype=torch.float64, device=weights.device).view(-1, *[1] * start.dim()) + start) / n
    return _invert(weights, at)


def multinomial(weights: Tensor, n: int | None = None) -> Tensor:
    """n independent draws per plate element."""
    n = len(weights) if n is None else n
    return _invert(weights, uniform((n, *weights.shape[1:]), axis=1, dtype=torch.float64, device=weights.device))


def stratified(weights: Tensor, n: int | None = None) -> Tensor:
    """One uniform number in each of n equal strata."""
    n = len(weights) if n is None else n
    jitter = uniform((n, *weights.shape[1:]), axis=1, dtype=torch.float64, device=weights.device)
    at = (torch.arange(n, dtype=torch.float64, device=weights.device).view(-1, *[1] * (weights.dim() - 1)) + jitter) / n
    return _invert(weights, at)


def residual(weights: Tensor, n: int | None = None) -> Tensor:
    """floor(n w_i) copies of particle i; the rest are independent draws in proportion to n w_i - floor(n w_i)."""
    n = len(weights) if n is None else n
    expected = n * weights.double() / weights.double().sum(0)  # (N, *plates)
    whole = (expected + 1e-9).floor()
    count = whole.sum(0)  # (*plates)
    slot = torch.arange(n, dtype=torch.float64, device=weights.device).view(-1, *[1] * count.dim())
    copied = _invert(whole, (slot + 0.5) / count.clamp(min=1))
    drawn = multinomial((expected - whole).clamp(min=0), n)
    return torch.where(slot < count, copied, drawn)


def conditional(weights: Tensor) -> Tensor:
    """`multinomial` with particle 0 kept as the first choice (conditional SMC, Andrieu et al. 2010)."""
    return torch.cat([torch.zeros_like(weights[:1], dtype=torch.long), multinomial(weights, len(weights) - 1)])


SCHEMES = {"systematic": systematic, "stratified": stratified, "multinomial": multinomial, "residual": residual}


def _invert(weights: Tensor, at: Tensor) -> Tensor:
    """The particles at which the cumulative weights pass ``at`` (n, *plates); a weight of zero is never chosen."""
    cdf = weights.double().cumsum(0)
    cdf = (cdf / cdf[-1:]).movedim(0, -1).contiguous()
    at = at.clamp(max=1 - 1e-12).movedim(0, -1).contiguous()
    found = torch.searchsorted(cdf, at, right=True).clamp(max=len(weights) - 1)
    return found.movedim(-1, 0)
