"""Nested inference: the marginal of a posterior as a Pyro distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...distributions import Table, TextTable

if TYPE_CHECKING:
    from .posterior import Posterior


def marginal(posterior: Posterior, site: str) -> Table:
    """One table over the values of all plate elements; a value that an element does not have is impossible there."""
    probabilities, values = posterior.probabilities, posterior.samples[site]
    plates = posterior.sites.plates
    right = 1 + len(plates.sizes)
    event = values.shape[right:]
    n, cells = len(values), probabilities[0].numel()
    rows = values.expand(*probabilities.shape, *event).reshape(n * cells, -1)
    distinct, kind = torch.unique(rows, dim=0, return_inverse=True)  # (K, D), (N * cells)
    mass = torch.zeros(len(distinct), cells, dtype=torch.float64, device=values.device)
    mass.scatter_add_(0, kind.view(n, cells), probabilities.reshape(n, cells).double())
    possible = (mass > 0).any(1)
    distinct, mass = distinct[possible].view(-1, *event), mass[possible].to(probabilities.dtype)
    # (K, *plate axes): the kept plates at their own axes; axes to the left of the first kept plate are dropped.
    axes = plates.spread(mass.view(-1, *plates.sizes)).shape[1:]
    batch = axes[len(axes) + min(plates.dims) :] if plates.dims else ()
    logits = mass.T.reshape(*batch, -1).log()
    if site in posterior.sites.lms and len(event) == 1:
        return TextTable(posterior.sites.lms[site], distinct, logits, posterior.sites.stops[site] or None)
    return Table(distinct, logits)
