"""How far an answer is from the exact posterior: the density of a guide, and the draws of a sampler, never mixed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...text import PAD
from .. import programs
from ..posterior.posterior import Posterior
from ..programs import Program, Replay
from ..weights import log_density_of_latents

MODE = 0.02  # a value of at least this posterior probability is a mode


class DensityQuality(NamedTuple):
    """Of q against the exact posterior p, each (*plates)."""

    total_variation: Tensor
    forward_kl: Tensor  # KL(p || q)
    reverse_kl: Tensor  # KL(q || p), over the part of q inside the enumerated support
    modes: Tensor  # share of the modes z with q(z) >= p(z) / 10; NaN where the posterior has none


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
    return DensityQuality(tv, forward, reverse, _share(p >= MODE, q >= p / 10))


def draw_quality(exact: Posterior, posterior: Posterior) -> Tensor:
    """Total variation between weighted particles and the exact posterior, merged by value: (*plates)."""
    kinds, drawn_kinds = _kinds(exact, posterior)
    p, w = _flat(exact.probabilities), _flat(posterior.probabilities).to(exact.probabilities.dtype)
    difference = p.new_zeros(int(max(kinds.max(), drawn_kinds.max())) + 1, p.shape[1])
    difference.scatter_add_(0, kinds, p).scatter_add_(0, drawn_kinds, -w)
    return (0.5 * difference.abs().sum(0)).reshape(exact.log_evidence.shape)


def modes_drawn(exact: Posterior, posterior: Posterior) -> Tensor:
    """The share of the exact posterior's modes that are among the particles of positive weight, (*plates)."""
    kinds, drawn_kinds = _kinds(exact, posterior)
    drawn = torch.zeros(int(max(kinds.max(), drawn_kinds.max())) + 1, kinds.shape[1], dtype=torch.long)
    drawn.scatter_add_(0, drawn_kinds, (_flat(posterior.log_weights) > -torch.inf).long())
    return _share(_flat(exact.probabilities) >= MODE, drawn.gather(0, kinds) > 0).reshape(exact.log_evidence.shape)


def outside_mass(exact: Posterior, posterior: Posterior) -> Tensor:
    """The share of weighted particles that the enumeration has not: an estimate of what it misses, (*plates)."""
    kinds, drawn_kinds = _kinds(exact, posterior)
    inside = _flat(exact.log_weights) > -torch.inf
    known = torch.zeros(int(max(kinds.max(), drawn_kinds.max())) + 1, kinds.shape[1], dtype=torch.long)
    known.scatter_add_(0, kinds, inside.long())
    outside = known.gather(0, drawn_kinds) == 0
    return (_flat(posterior.probabilities) * outside).sum(0).reshape(exact.log_evidence.shape)


def _share(of: Tensor, having: Tensor) -> Tensor:
    """Of the rows that are ``of``, the share that are ``having``, over axis 0; NaN where there is none."""
    return (of & having).sum(0) / of.sum(0)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)  # (N, *plates) -> (N, plates)


def _kinds(exact: Posterior, posterior: Posterior) -> tuple[Tensor, Tensor]:
    """A number for each distinct value of all sites together, for both posteriors: (N, plates) each."""
    n, columns = exact.num_particles, []
    for name in sorted(exact.samples):
        sides = [p.samples[name].reshape(p.num_particles, exact.log_evidence.numel(), -1) for p in (exact, posterior)]
        width = max(x.shape[-1] for x in sides)
        columns.append(torch.cat([pad(x.double(), (0, width - x.shape[-1]), value=float(PAD)) for x in sides]))
    values = torch.cat(columns, -1)  # (N exact + N, plates, width)
    _, kinds = torch.unique(values.flatten(0, 1), dim=0, return_inverse=True)
    kinds = kinds.view(values.shape[:2])
    return kinds[:n], kinds[n:]
