"""How the texts of a guide differ from those of the posterior, in their lengths and their stops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from ..core import programs
from ..core.programs import Substitute
from ..core.query import Query
from ..core.sites import is_terminable, texts_of
from ..posterior.posterior import Posterior


@dataclass
class Drift:
    """A mean over the proposal's draws, and one over the posterior; ``values`` and ``weights`` were averaged."""

    name: str
    proposed: float
    posterior: float
    meaning: str
    suspect: bool
    values: tuple[Tensor, Tensor]
    weights: tuple[Tensor, Tensor]


def is_trained(query: Query) -> bool:
    """Whether there is a guide with parameters to train.

    They are those of a module, those in Pyro's store, or those of a text's language model that the model does not use.
    """
    if query.guide is None:
        return False
    if isinstance(query.guide, nn.Module) and any(p.requires_grad for p in query.guide.parameters()):
        return True
    proposal, model = query.sketches
    if any(node["type"] == "param" for node in proposal.nodes.values()):
        return True
    frozen, own = (list(programs.language_models(t).values()) for t in (model, proposal))
    return any(lm.trainable_parameters() for lm in own if not any(lm is other for other in frozen))


@torch.no_grad()
def drifts(query: Query, posterior: Posterior) -> list[Drift]:
    """Two rows for each text with a stop: its length, and the proposal's probability of stopping at its end."""
    n = posterior.num_particles
    drawn = query.trace(query.proposal, programs.Draw(), particles=n)
    weighted = query.trace(query.proposal, Substitute(posterior.values), particles=n)
    equal = torch.full_like(posterior.log_weights, 1 / n)
    found = []
    for name in posterior.values:
        if name not in drawn.nodes or not is_terminable(drawn.nodes[name]["fn"]):
            continue
        both = [_measure(trace, name, posterior) for trace in (drawn, weighted)]
        weights = equal, posterior.probabilities
        (length_q, stop_q, free_q), (length_p, stop_p, free_p) = both
        found.append(_length(name, (length_q, length_p), weights))
        free = tuple(w * f for w, f in zip(weights, (free_q, free_p), strict=True))
        if all(float(w.sum()) > 0 for w in free):
            found.append(_stop(name, (stop_q, stop_p), (free[0], free[1])))
    return found


def _measure(trace: Trace, name: str, posterior: Posterior) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens before the stop, the proposal's probability of that stop, and whether it could go on, (N, *plates) each.

    For a site with further axes of texts, these are means over the texts.
    """
    site, value = texts_of(trace.nodes[name]), trace.nodes[name]["value"]
    end = site.ending(value).at
    log_stop = site.prefix_scores(value).stop_log_probs
    at = end.clamp(0, log_stop.shape[-1] - 1).expand(log_stop.shape[:-1])
    stop = log_stop.gather(-1, at[..., None])[..., 0].exp()
    free = stop < 1 - 1e-6  # at max_tokens a stop is certain
    plates, texts = posterior.sites.plates, max(1, site.shape[len(site.shape) - site.stacked :].numel())
    shape = posterior.log_weights.shape
    length, stop, free = (
        plates.lead(site.total(x.double().expand(at.shape)) / texts, 0).reshape(*shape, -1).mean(-1)
        for x in (end, stop, free)
    )
    return length, stop, free


def _length(name: str, values: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor]) -> Drift:
    (q, error_q, _), (p, error_p, sd) = (_moments(*x) for x in zip(values, weights, strict=True))
    significant = abs(p - q) > max(3 * math.hypot(error_q, error_p), 1e-6 * (1 + q))  # beyond rounding
    suspect = significant and abs(p - q) > 0.5 * sd
    meaning = f"tokens: the guide's texts are too {'short' if p > q else 'long'}"
    return Drift(
        f"length of {name}",
        q,
        p,
        meaning if suspect else "tokens, guide's texts -> the posterior's",
        suspect,
        values,
        weights,
    )


def _stop(name: str, values: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor]) -> Drift:
    (q, error_q, _), (p, error_p, _) = (_moments(*x) for x in zip(values, weights, strict=True))
    suspect = abs(p - q) > 3 * math.hypot(error_q, error_p) and not 0.5 < p / max(q, 1e-30) < 2
    meaning = f"the guide stops too {'seldom' if p < q else 'often'} where the posterior's texts end"
    return Drift(
        f"stop of {name}",
        q,
        p,
        meaning if suspect else "the guide's stop probability, its texts -> the posterior's",
        suspect,
        values,
        weights,
    )


def _moments(x: Tensor, weights: Tensor) -> tuple[float, float, float]:
    """The weighted mean of all values (N, *plates), its standard error, and the standard deviation."""
    weights = weights.double() / weights.sum()
    mean = (weights * x).sum()
    deviation = (x - mean) ** 2
    return float(mean), float((weights**2 * deviation).sum().sqrt()), float((weights * deviation).sum().sqrt())
