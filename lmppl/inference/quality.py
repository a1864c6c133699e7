"""How far an answer is from the exact posterior: the density of a guide, and the draws of a sampler, never mixed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import programs
from .posterior import Posterior
from .programs import Program, Replay
from .weights import log_density_of_latents


class DensityQuality(NamedTuple):
    """Of q against the exact posterior p, each (*plates)."""

    total_variation: Tensor
    forward_kl: Tensor  # KL(p || q)
    reverse_kl: Tensor  # KL(q || p), over the part of q inside the enumerated support


@torch.no_grad()
def density_quality(exact: Posterior, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DensityQuality:
    r"""Score the whole enumerated support under the guide.

    .. math:: TV = \tfrac12 \Big( \sum_z |q(z) - p(z)| + 1 - \sum_z q(z) \Big)

    Mass of q outside the enumeration counts in full.
    """
    plates = exact.sites.plates
    run = programs.trace(
        guide, args, kwargs, Replay(exact.values), nesting=plates.nesting, particles=exact.num_particles
    )
    log_q = log_density_of_latents(run, plates).expand(1, exact.num_particles, *plates.sizes)[0]
    p = exact.probabilities
    inside = exact.log_weights > -torch.inf
    log_q = log_q.masked_fill(~inside, -torch.inf)
    q = log_q.exp()
    log_p = p.log()
    tv = 0.5 * ((q - p).abs().sum(0) + (1 - q.sum(0)).clamp(min=0))
    forward = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(0)
    reverse = torch.where(q > 0, q * (log_q - log_p), torch.zeros_like(q)).sum(0)
    return DensityQuality(tv, forward, reverse)


def draw_quality(exact: Posterior, posterior: Posterior) -> Tensor:
    """Total variation between weighted particles and the exact posterior, merged by value: (*plates)."""
    names = sorted(exact.samples)
    flat_exact, flat = _rows(exact, names), _rows(posterior, names)  # (N, plates, width)
    weights_exact = exact.probabilities.reshape(exact.num_particles, -1)
    weights = posterior.probabilities.reshape(posterior.num_particles, -1)
    result = []
    for i in range(weights.shape[1]):
        result.append(_distance(flat_exact[:, i], weights_exact[:, i], flat[:, i], weights[:, i]))
    return torch.stack(result).reshape(exact.log_evidence.shape)


def _rows(posterior: Posterior, names: list[str]) -> Tensor:
    shape = posterior.log_weights.shape
    parts = [posterior.samples[n].reshape(shape[0], shape[1:].numel(), -1).double() for n in names]
    return torch.cat(parts, -1)


def _distance(support: Tensor, p: Tensor, drawn: Tensor, w: Tensor) -> Tensor:
    width = max(support.shape[-1], drawn.shape[-1])
    rows = torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-1.0) for x in (support, drawn)])
    _, inverse = torch.unique(rows, dim=0, return_inverse=True)
    difference = torch.zeros(int(inverse.max()) + 1, dtype=p.dtype)
    difference.index_add_(0, inverse[: len(p)], p).index_add_(0, inverse[len(p) :], -w.to(p.dtype))
    return 0.5 * difference.abs().sum()


def modes_found(exact: Posterior, posterior: Posterior, top: int = 10) -> Tensor:
    """The share of the exact posterior's ``top`` most probable values that occur among the particles: (*plates)."""
    names = sorted(exact.samples)
    probabilities = exact.probabilities.reshape(exact.num_particles, -1)
    best = probabilities.topk(min(top, exact.num_particles), 0).indices  # (top, plates)
    support, drawn = _rows(exact, names), _rows(posterior, names)
    alive = posterior.log_weights.reshape(posterior.num_particles, -1) > -torch.inf
    width = max(support.shape[-1], drawn.shape[-1])
    support, drawn = (
        torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-1.0) for x in (support, drawn)
    )
    shares = []
    for i in range(best.shape[1]):
        modes = support[best[:, i], i]
        same = (modes[:, None] == drawn[None, :, i]).all(-1) & alive[None, :, i]
        shares.append(same.any(1).double().mean())
    return torch.stack(shares).reshape(exact.log_evidence.shape)
