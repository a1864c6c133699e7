"""Resampling: pure functions from normalised weights (N, *plates) to n particle indices (n, *plates)."""

from __future__ import annotations

import torch
from torch import Tensor


def systematic(weights: Tensor, n: int | None = None) -> Tensor:
    """One uniform number per plate element, n evenly spaced pointers into the cumulative weights.

    Particle i is chosen floor(n w_i) or ceil(n w_i) times; E[count] = n w_i.
    """
    n = len(weights) if n is None else n
    start = torch.rand(weights.shape[1:], dtype=torch.float64, device=weights.device)
    at = (torch.arange(n, dtype=torch.float64, device=weights.device).view(-1, *[1] * start.dim()) + start) / n
    return _invert(weights, at)


def multinomial(weights: Tensor, n: int | None = None) -> Tensor:
    """n independent draws per plate element."""
    n = len(weights) if n is None else n
    return _invert(weights, torch.rand(n, *weights.shape[1:], dtype=torch.float64, device=weights.device))


def stratified(weights: Tensor, n: int | None = None) -> Tensor:
    """One uniform number in each of n equal strata."""
    n = len(weights) if n is None else n
    jitter = torch.rand(n, *weights.shape[1:], dtype=torch.float64, device=weights.device)
    at = (torch.arange(n, dtype=torch.float64, device=weights.device).view(-1, *[1] * (weights.dim() - 1)) + jitter) / n
    return _invert(weights, at)


SCHEMES = {"systematic": systematic, "multinomial": multinomial, "stratified": stratified}


def _invert(weights: Tensor, at: Tensor) -> Tensor:
    """The particles at which the cumulative weights pass ``at`` (n, *plates); weight zero is never chosen."""
    cdf = weights.double().cumsum(0)
    cdf = (cdf / cdf[-1:]).movedim(0, -1).contiguous()
    at = at.clamp(max=1 - 1e-12).movedim(0, -1).contiguous()
    found = torch.searchsorted(cdf, at, right=True).clamp(max=len(weights) - 1)
    return found.movedim(-1, 0)
