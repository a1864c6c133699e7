"""A posterior as an ``arviz.InferenceData``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..resampling import systematic

if TYPE_CHECKING:
    from .posterior import Posterior


def to_arviz(posterior: Posterior) -> Any:
    """N equally weighted draws, plates as named dimensions, texts as strings.

    One chain, or the posterior's ``num_chains`` where it has them (N is chains x draws then).

    Particles whose weights differ are resampled (systematically); ``sample_stats.log_weight`` has, for each draw, the
    log weight of the particle that it copies.  ``constant_data.log_evidence`` has the evidence.  Draws copied from one
    particle are not independent: arviz's ESS of them says nothing, `Posterior.ess` does.
    """
    import arviz

    weights, log_weights, n = posterior.probabilities, posterior.log_weights, posterior.num_particles
    chains = getattr(posterior, "num_chains", 1)
    if not torch.allclose(weights, torch.full_like(weights, 1 / n), rtol=1e-4):
        chosen = systematic(weights)
        posterior, log_weights, chains = posterior.take(chosen), log_weights.gather(0, chosen), 1
    plates = list(posterior.sites.plates.names)

    def by_chain(x: np.ndarray) -> np.ndarray:
        return x.reshape(chains, n // chains, *x.shape[1:])

    groups = {
        "posterior": {site: by_chain(_array(posterior, site)) for site in posterior.samples},
        "sample_stats": {"log_weight": by_chain(log_weights.cpu().numpy())},
        "constant_data": {"log_evidence": posterior.log_evidence.cpu().numpy()},
    }
    dims = {name: plates for variables in groups.values() for name in variables}
    return arviz.from_dict(**groups, dims=dims)


def _array(posterior: Posterior, site: str) -> np.ndarray:
    """(N, *plates, ...), of strings for a text."""
    if site in posterior.sites.decoders:
        return np.array(posterior.strings(site))
    return posterior.samples[site].cpu().numpy()
