"""`Posterior`: weighted particles, what every algorithm answers with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from pyro.ops.stats import fit_generalized_pareto
from pyro.poutine import Trace
from torch import Tensor

from . import programs
from .programs import Program, Replay
from .resampling import SCHEMES
from .weights import Plates, kept_plates, site_log_prob

Index = int | tuple[int, ...] | None


class ZeroEvidence(ValueError):
    """Every particle has weight zero: there is no posterior to speak of."""


@dataclass(frozen=True)
class Sites:
    """What a posterior remembers of its program: plates, event dimensions, and how texts are decoded."""

    plates: Plates
    event_dims: dict[str, int]
    decoders: dict[str, Callable[[Tensor], Any]] = field(repr=False)


@dataclass(frozen=True)
class Posterior:
    r"""Particles with unnormalised log weights that carry the evidence.

    ``samples[site]`` has shape (N, *plates, ...), ``log_weights`` (N, *plates), and
    ``log_weights.logsumexp(0) == log_evidence`` wherever an algorithm estimates it (NaN where it does not).  One data
    point's particles never mix with another's: evidence, ESS, k-hat and resampling are per plate element.
    """

    values: dict[str, Tensor]  # as the program saw them: (N, *plate axes, *event)
    log_weights: Tensor
    log_evidence: Tensor
    sites: Sites
    guide: Program | None = field(default=None, repr=False)

    @classmethod
    def of(cls, trace: Trace, plates: Plates, log_weights: Tensor, guide: Program | None = None) -> Posterior:
        """A posterior over the latent sites of a vectorised trace, under log weights (N, *plates)."""
        nodes = programs.latents(trace)
        sites = Sites(
            plates,
            {name: node["fn"].event_dim for name, node in nodes.items()},
            {name: node["fn"].lm.decode for name, node in nodes.items() if hasattr(node["fn"], "prefix_scores")},
        )
        return cls({n: node["value"] for n, node in nodes.items()}, log_weights, log_weights.logsumexp(0), sites, guide)

    @cached_property
    def samples(self) -> dict[str, Tensor]:
        """Each latent site's values, (N, *plates, ...)."""
        return {name: self.sites.plates.lead(v, self.sites.event_dims[name]) for name, v in self.values.items()}

    @property
    def num_particles(self) -> int:
        return self.log_weights.shape[0]

    @property
    def probabilities(self) -> Tensor:
        """Normalised weights (N, *plates). Raises ZeroEvidence where a plate element's weights are all zero."""
        return normalised(self.log_weights)

    @property
    def ess(self) -> Tensor:
        r"""Effective sample size :math:`(\sum w)^2 / \sum w^2`, (*plates); 0 where all weights are zero."""
        return effective_sample_size(self.log_weights)

    @property
    def khat(self) -> Tensor:
        """Pareto k-hat of the weights' upper tail, (*plates); above 0.7 do not trust them. NaN below 10 tail draws."""
        flat = self.log_weights.reshape(self.num_particles, -1)
        return torch.tensor([pareto_khat(w) for w in flat.T]).reshape(self.log_weights.shape[1:])

    def resample(self, n: int | None = None, scheme: str = "systematic") -> Posterior:
        """``n`` equally weighted particles, each plate element resampled by itself; ``scheme`` as in `resampling`."""
        n = self.num_particles if n is None else n
        if n < 1 or scheme not in SCHEMES:
            raise ValueError(f"n, scheme: expected n >= 1 and one of {sorted(SCHEMES)}, got {n} and {scheme!r}")
        chosen = SCHEMES[scheme](self.probabilities, n)  # (n, *plates)
        values = {name: self.sites.plates.take(value, chosen) for name, value in self.values.items()}
        log_weights = (self.log_evidence - math.log(n)).expand(n, *self.log_evidence.shape)
        return replace(self, values=values, log_weights=log_weights)

    def table(self, site: str, index: Index = None) -> list[tuple[str, float]]:
        """Distinct values of a site with their posterior probabilities, most probable first; texts are decoded.

        ``index`` picks a plate element; it is needed where there is more than one.
        """
        if site not in self.samples:
            raise ValueError(f"site: {site!r} is none of the latent sites {list(self.samples)}")
        index = (index,) if isinstance(index, int) else index
        plates = self.log_weights.shape[1:]
        if index is None:
            if plates.numel() > 1:
                raise ValueError(f"index: the posterior has plates of shape {tuple(plates)}; say which element")
            index = (0,) * len(plates)
        if len(index) != len(plates):
            raise ValueError(f"index: expected {len(plates)} numbers for plates of shape {tuple(plates)}, got {index}")
        at: tuple[Any, ...] = (slice(None), *index)
        total: dict[str, float] = {}
        probabilities = normalised(self.log_weights[at]).tolist()
        for name, p in zip(self._strings(site, self.samples[site][at]), probabilities, strict=True):
            if p > 0:
                total[name] = total.get(name, 0.0) + p
        return sorted(total.items(), key=lambda row: -row[1])

    def _strings(self, site: str, value: Tensor) -> list[str]:
        strings = self.sites.decoders[site](value) if site in self.sites.decoders else [str(v.tolist()) for v in value]
        return [s if isinstance(s, str) else " | ".join(_leaves(s)) for s in strings]

    @torch.no_grad()
    def predictive(
        self, model: Program, *args: Any, sampler: str | None = None, num_particles: int | None = None, **kwargs: Any
    ) -> Predictive:
        """What the model says of its other sites when its latents come from ``sampler``.

        ``None``: this posterior's particles; "prior": the model's own latent sites, p(z | x); "guide": the guide.  The
        guide of training saw the observation, q(z | x, y); prediction has none, so the two differ: both can be asked
        for.  ``args`` go to the model (and to the guide).  Observed sites keep their log-probability under every
        particle, so that an average over z, a vote, or the split of entropy into its expected and mutual parts can be
        taken from it.
        """
        if sampler not in (None, "prior", "guide"):
            raise ValueError(f"sampler: expected None, 'prior' or 'guide', got {sampler!r}")
        if sampler == "guide" and self.guide is None:
            raise ValueError("sampler: this posterior was made without a guide")
        n = num_particles or self.num_particles
        source = [model] if self.guide is None or sampler != "guide" else [self.guide, model]
        nesting = programs.plate_nesting(source, args, kwargs, self.sites.plates.nesting)
        values: dict[str, Tensor] = {}
        if sampler is None:
            values = self.resample(n).values
        elif sampler == "guide":
            proposal = programs.trace(source[0], args, kwargs, programs.Draw(), nesting=nesting, particles=n)
            values = programs.values(proposal)
        run = programs.trace(model, args, kwargs, programs.Draw(), Replay(values), nesting=nesting, particles=n)
        plates = kept_plates([run], nesting)
        nodes = {name: node for name, node in programs.scored(run).items()}
        log_probs = {
            name: site_log_prob(node, plates).expand(1, n, *plates.sizes)[0]
            for name, node in nodes.items()
            if node["is_observed"]
        }
        return Predictive({name: node["value"] for name, node in nodes.items() if not node["is_observed"]}, log_probs)


@dataclass(frozen=True)
class Predictive:
    """Draws of a model's sites (N, ...) and the log-probability of each observed site under every particle."""

    samples: dict[str, Tensor]
    log_probs: dict[str, Tensor]

    def log_prob(self, site: str) -> Tensor:
        """The log of the average over particles of p(observed | z), (*plates)."""
        per_particle = self.log_probs[site]
        return per_particle.logsumexp(0) - math.log(len(per_particle))


def normalised(log_weights: Tensor) -> Tensor:
    """Weights that sum to one over axis 0. Raises ZeroEvidence where all are zero."""
    if bool((log_weights.amax(0) == -torch.inf).any()):
        raise ZeroEvidence(
            "every particle has probability zero under the model: the observation or a factor rules all of them out; "
            "use more particles, a better guide, or check that observed texts end with their stop token"
        )
    return log_weights.softmax(0)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over axis 0; 0 where all weights are zero."""
    log_ess = 2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)
    return torch.where(log_weights.amax(0) == -torch.inf, torch.zeros_like(log_ess), log_ess.exp())


def pareto_khat(log_weights: Tensor) -> float:
    """The generalised Pareto shape of the largest min(N/5, 3 sqrt N) weights (Vehtari et al. 2024), by Pyro's fit."""
    n = len(log_weights)
    tail = int(min(0.2 * n, 3 * n**0.5))
    if tail < 10 or not bool(log_weights.isfinite().any()):
        return float("nan")
    weights, _ = (log_weights - log_weights.max()).double().exp().sort()
    threshold = weights[-tail - 1]
    excess = weights[-tail:] - threshold
    if float(excess[0]) <= 1e-12:  # ties: all weights alike, no tail
        excess = excess[excess > 1e-12]
        if len(excess) < 10:
            return float("-inf") if len(excess) == 0 else float("nan")
    k, _ = fit_generalized_pareto(excess)
    return float(k)


def _leaves(nested: Any) -> list[str]:
    return [nested] if isinstance(nested, str) else [leaf for part in nested for leaf in _leaves(part)]
