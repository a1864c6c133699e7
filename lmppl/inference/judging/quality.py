"""The distance to the exact posterior of a guide's density and of a sampler's draws, measured separately."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...text import PAD
from ..core import programs
from ..core.programs import Program, Substitute
from ..core.sites import text_of
from ..core.weights import log_density_of_latents
from ..posterior.posterior import Posterior
from ..samplers.enumeration.enumeration import Enumerated

MODE = 0.02  # a value of at least this posterior probability is a mode
CLAMPED = 1e-6  # a distribution that is no text may give this in place of a probability of zero, by clamping
MASS = 1e-4  # probabilities in single precision sum to one up to less than this


class DensityQuality(NamedTuple):
    """The quality of q against the exact posterior p, (*plates) each.  S is the set of enumerated values with p > 0."""

    total_variation: Tensor
    forward_kl: Tensor  # KL(p || q); inf if q = 0 on a part of S
    reverse_kl: Tensor  # KL(q || p); inf if q is known to have mass where p = 0, else `reverse_kl_inside`
    modes: Tensor  # the share of modes z with q(z) >= p(z) / 10; NaN if the posterior has none
    outside: Tensor  # the mass of q outside S: where p = 0, or where the enumeration did not look
    reverse_kl_inside: Tensor  # KL(q(. | S) || p); NaN if q has no mass in S


@torch.no_grad()
def density_quality(exact: Posterior, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DensityQuality:
    r"""Scores the enumerated support under the guide.

    .. math:: TV = \tfrac12 \Big( \sum_S |q - p| + q(S^c) \Big), \qquad
              KL(q(\cdot | S) \| p) = \frac{1}{q(S)} \sum_S q \log \frac qp - \log q(S) \ge 0

    The total variation counts all mass of q outside S.  KL(q || p) is infinite if q has mass where p = 0; values that
    an incomplete enumeration did not look at do not count for this.
    """
    plates = exact.sites.plates
    run = programs.trace(
        guide, args, kwargs, Substitute(exact.values), nesting=plates.nesting, particles=exact.num_particles
    )
    log_q = log_density_of_latents(run, plates).expand(1, exact.num_particles, *plates.sizes)[0].double()
    p, again = _merged(exact)
    log_p, inside = p.log(), p > 0
    log_q = log_q.masked_fill(again, -torch.inf)
    q = log_q.exp() * inside  # on S
    mass = q.sum(0).clamp(max=1.0)
    tv = 0.5 * ((q - p).abs().sum(0) + 1 - mass)
    forward = (p * (log_p - log_q)).masked_fill(~inside, 0.0).sum(0)
    within = (q * (log_q - log_p)).masked_fill(q == 0, 0.0).sum(0) / mass - mass.log()  # NaN where mass is 0
    forward, within = (kl.clamp(min=0.0) for kl in (forward, within))  # rounding can make them negative
    texts = all(text_of(node["fn"]) is not None for node in programs.latents(run).values())
    least = 0.0 if texts else CLAMPED
    reverse = within.masked_fill(_reaches_zeros(exact, log_q.exp() > least, 1 - mass), torch.inf)
    return DensityQuality(tv, forward, reverse, _share(p >= MODE, log_q.exp() >= p / 10), 1 - mass, within)


def _merged(exact: Posterior) -> tuple[Tensor, Tensor]:
    """Probabilities merged into the first of equal values, and a mask of the other equal values, (N, *plates) each."""
    p = _flat(exact.probabilities.double())
    if isinstance(exact, Enumerated):  # every value occurs once
        again = torch.zeros_like(p, dtype=torch.bool)
    else:
        kinds = _kinds(exact, exact)[0]  # (N, plates)
        order = torch.arange(len(p), device=p.device)[:, None].expand_as(kinds)
        kind = torch.zeros(int(kinds.max()) + 1, p.shape[1], dtype=torch.long, device=p.device)
        first = kind.scatter_reduce(0, kinds, order, "amin", include_self=False).gather(0, kinds)
        p, again = torch.zeros_like(p).scatter_add_(0, first, p), first != order
    return p.reshape(exact.log_weights.shape), again.reshape(exact.log_weights.shape)


def _reaches_zeros(exact: Posterior, reached: Tensor, outside: Tensor) -> Tensor:
    """Whether q has mass where p is known to be zero, which includes everything outside a complete enumeration."""
    if not isinstance(exact, Enumerated):  # draws: other values may be possible too
        return torch.zeros_like(outside, dtype=torch.bool)
    ruled_out = (exact.log_weights == -torch.inf) & (exact.log_prior > -torch.inf)  # a row of padding has no prior
    return (ruled_out & reached).any(0) | (exact.unexplored == 0) & (outside > MASS)


def draw_quality(exact: Posterior, posterior: Posterior) -> Tensor:
    """The total variation between weighted particles, merged by value, and the exact posterior, (*plates)."""
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
    """The weight of the particles that are not in the enumeration, an estimate of the mass it misses, (*plates)."""
    kinds, drawn_kinds = _kinds(exact, posterior)
    inside = _flat(exact.log_weights) > -torch.inf
    known = torch.zeros(int(max(kinds.max(), drawn_kinds.max())) + 1, kinds.shape[1], dtype=torch.long)
    known.scatter_add_(0, kinds, inside.long())
    outside = known.gather(0, drawn_kinds) == 0
    return (_flat(posterior.probabilities) * outside).sum(0).reshape(exact.log_evidence.shape)


def _share(of: Tensor, having: Tensor) -> Tensor:
    """The share of the rows in ``of`` that are also in ``having``, over axis 0; NaN if there are none."""
    return (of & having).sum(0) / of.sum(0)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)  # (N, *plates) -> (N, plates)


def _kinds(exact: Posterior, posterior: Posterior) -> tuple[Tensor, Tensor]:
    """A number for each distinct joint value of all sites, for both posteriors, (N, plates) each."""
    n, columns = exact.num_particles, []
    for name in sorted(exact.samples):
        sides = [p.samples[name].reshape(p.num_particles, exact.log_evidence.numel(), -1) for p in (exact, posterior)]
        width = max(x.shape[-1] for x in sides)
        columns.append(torch.cat([pad(x.double(), (0, width - x.shape[-1]), value=float(PAD)) for x in sides]))
    values = torch.cat(columns, -1)  # (N exact + N, plates, width)
    _, kinds = torch.unique(values.flatten(0, 1), dim=0, return_inverse=True)
    kinds = kinds.view(values.shape[:2])
    return kinds[:n], kinds[n:]
