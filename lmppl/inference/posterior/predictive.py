"""Prediction: the unobserved sites of a model, or candidate values of one site, averaged over latents."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..core import programs
from ..core.arguments import at_least, is_program
from ..core.partial import only
from ..core.plates import Plates, kept_plates
from ..core.programs import Substitute
from ..core.query import Query
from ..core.sites import lm_of, text_of
from ..core.weights import site_log_prob, text_log_probs
from .carried import carried
from .log_weights import normalised
from .posterior import Index, Posterior


class Observe(Messenger):
    """Observes given values at sites, whether the program observes or samples them."""

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["is_observed"], msg["done"] = self.values[msg["name"]], True, True


@dataclass(frozen=True)
class Predictive:
    r"""Weighted draws of a model's unobserved sites, and the log-probability of each observed site in every particle.

    .. math:: \log p(y \mid x) = \log \sum_n w_n \, p(y \mid x, z_n)

    `Posterior.predictive` returns it.

    :param draws: the unobserved sites, latents included, as a `Posterior` with normalised weights.
    :param log_probs: log p(observed | z_n) of each observed site, (N, *plates).

    Example::

        found = Importance(model, guide).run(x, y).predictive(model, x, y)
        found.log_prob("y")  # of the observed texts, averaged over particles, (*plates)
        found.table("z", index=0)[:3]  # the most probable latent texts
    """

    draws: Posterior
    log_probs: dict[str, Tensor]

    @property
    def samples(self) -> dict[str, Tensor]:
        """The values of each unobserved site, (N, *plates, ...), with the weights ``log_weights``."""
        return self.draws.samples

    @property
    def log_weights(self) -> Tensor:
        """Normalised log weights of the particles, (N, *plates)."""
        return self.draws.log_weights

    def log_prob(self, site: str) -> Tensor:
        """The log of the weighted average of p(observed | z_n) over particles, (*plates).

        :param site: an observed site.
        :raises ValueError: for a site that is not observed.
        """
        if site not in self.log_probs:
            raise ValueError(f"site: {site!r} is none of the observed sites {list(self.log_probs)}")
        return (self.log_weights + self.log_probs[site]).logsumexp(0)

    def table(self, site: str, index: Index = None) -> list[tuple[str, float]]:
        """The distinct values of an unobserved site with their shares of the weight, largest first.

        :param site: an unobserved site.
        :param index: an element of the plates, as in `Posterior.table`.
        """
        return self.draws.table(site, index)


@dataclass(frozen=True)
class Prediction:
    r"""The probabilities of C candidate values of a site under every particle, and their average.

    .. math:: p_n(c) = p(y_c \mid z_n) / m_n, \qquad \bar p(c) = \sum_n w'_n \, p_n(c), \qquad w'_n \propto w_n m_n

    where :math:`m_n = \sum_c p(y_c \mid z_n)` is the probability that particle n gives to all candidates together.  So
    `probabilities` and the entropies are conditional on the answer being one of the candidates; `log_prob` and `vote`
    are not.  Entropies are in nats.  `Posterior.predict` returns it.  Properties raise ZeroEvidence if every candidate
    is impossible.

    :param names: the candidates as strings.
    :param log_probs: log p(y_c | x, z_n), (C, N, *plates); the plates are the site's.
    :param log_weights: normalised log weights of the particles, (N, *plates).

    Example::

        found = Importance(model).run(x, y).predict(model, ["ab", "c"], x, y)
        found.probabilities  # (C, *plates)
        found.names[int(found.probabilities[:, 0].argmax())]  # the most probable answer of the first plate element
        found.entropy, found.mutual_information  # (*plates): all uncertainty, and the part that z explains
    """

    names: list[str]
    log_probs: Tensor
    log_weights: Tensor

    def __repr__(self) -> str:
        """One line: the candidates, and the shape (N, *plates)."""
        return f"Prediction({', '.join(map(repr, self.names))}: shape {tuple(self.log_probs.shape[1:])})"

    @property
    def log_prob(self) -> Tensor:
        r"""log p(y_c | x) :math:`= \log \sum_n w_n \, p(y_c \mid x, z_n)`, (C, *plates); not normalised over C."""
        return (self.log_weights + self.log_probs).logsumexp(1)

    @property
    def probabilities(self) -> Tensor:
        r"""The posterior predictive :math:`\bar p(c)`, (C, *plates)."""
        return normalised(self.log_prob)

    @property
    def vote(self) -> Tensor:
        """The share of the particles' weight that votes for each candidate, (C, *plates).

        A particle votes for its most probable candidate; ties are split evenly.  Particles under which every candidate
        is impossible do not vote, so that the shares can sum to less than one.
        """
        best = (self.log_probs == self.log_probs.amax(0)) & (self.log_probs > -torch.inf)
        return (self.log_weights.exp() * best / best.sum(0).clamp(min=1)).sum(1)

    @property
    def entropy(self) -> Tensor:
        r"""The entropy of `probabilities` in nats, (*plates): `expected_entropy` + `mutual_information`."""
        p = self.probabilities
        return -torch.xlogy(p, p).sum(0)

    @property
    def expected_entropy(self) -> Tensor:
        r"""The entropy that remains when z is known, :math:`\sum_n w'_n H(p_n)`, in nats, (*plates)."""
        weights, p = self._given_candidates()
        return (weights * -torch.xlogy(p, p).sum(0)).sum(0)

    @property
    def mutual_information(self) -> Tensor:
        r"""The information of z about the answer, :math:`\sum_n w'_n \, KL(p_n \| \bar p)`, in nats, (*plates)."""
        weights, p = self._given_candidates()
        mean = self.probabilities[:, None]
        return (weights * (torch.xlogy(p, p) - torch.xlogy(p, mean)).sum(0)).sum(0)

    def _given_candidates(self) -> tuple[Tensor, Tensor]:
        """w' (N, *plates) and p_n (C, N, *plates), which is zero where m_n is."""
        mass = self.log_probs.logsumexp(0)
        p = (self.log_probs - mass.masked_fill(mass == -torch.inf, 0.0)).exp()
        return normalised(self.log_weights + mass), p


@torch.no_grad()
def predictive(
    posterior: Posterior,
    query: Query,
    sampler: str | None = None,
    num_particles: int | None = None,
    keep: Collection[str] | None = None,
) -> Predictive:
    """See `Posterior.predictive`."""
    query = _nested(query, posterior, sampler)
    run, plates, log_weights, dependent = _run(posterior, query, sampler, num_particles, keep)
    observed = {name: node for name, node in programs.scored(run).items() if node["is_observed"]}
    known = text_log_probs(observed)
    log_probs = {
        name: site_log_prob(node, plates, known.get(name)).expand(1, *log_weights.shape)[0]
        for name, node in observed.items()
    }
    draws = Posterior.of(run, plates, log_weights, query)
    return Predictive(replace(draws, sites=replace(draws.sites, dependent=dependent)), log_probs)


@torch.no_grad()
def predict(
    posterior: Posterior,
    query: Query,
    candidates: Tensor | Sequence[str],
    site: str,
    sampler: str | None = None,
    num_particles: int | None = None,
    keep: Collection[str] | None = None,
) -> Prediction:
    """See `Posterior.predict`."""
    query = _nested(query, posterior, sampler)
    nesting, nodes = query.nesting, programs.scored(query.sketches[-1])
    if not isinstance(site, str) or site not in nodes:
        raise ValueError(f"site: {site!r} is none of the model's sites {list(nodes)}")
    fn = nodes[site]["fn"]
    names, values = _candidates(candidates, fn)  # (C, *axes, *event)
    axes = values.dim() - 1 - fn.event_dim
    if axes > nesting:
        raise ValueError(f"candidates: shape {tuple(values.shape)} has more axes than the plates and site {site!r}")
    values = values.reshape(len(values), *[1] * (1 + nesting - axes), *values.shape[1:])  # (C, 1, *plate axes, *event)
    # Latents are drawn once for all candidates; sites after this one are not scored.
    first = Observe({site: values[0]})
    drawn, plates, log_weights, _ = _run(posterior, query, sampler, num_particles, keep, first, site=site)
    each, known = Observe({site: values}), Substitute(programs.values(drawn))
    run = query.trace(query.model, each, known, particles=len(log_weights), prefixes=len(values))
    log_probs = site_log_prob(run.nodes[site], plates).expand(len(values), *log_weights.shape)
    return Prediction(names, log_probs, log_weights)


def _candidates(candidates: Tensor | Sequence[str], fn: Any) -> tuple[list[str], Tensor]:
    if not isinstance(candidates, Tensor | Sequence) or (isinstance(candidates, Tensor) and not candidates.dim()):
        raise ValueError(f"candidates: expected several strings or a tensor, got {candidates!r}")
    if not len(candidates):
        raise ValueError("candidates: there are none")
    if isinstance(candidates, Tensor):
        site = text_of(fn) if candidates.dim() == 2 else None
        return (site.fn.decode(candidates) if site else [str(c.tolist()) for c in candidates]), candidates
    if isinstance(candidates, str):
        raise ValueError(f"candidates: expected several strings or a tensor, got the string {candidates!r}")
    strings = list(candidates)
    site, lm = text_of(fn), lm_of(fn)
    if lm is None or not all(isinstance(s, str) for s in strings):
        raise ValueError("candidates: strings are for a text site; give its values as a tensor (C, ...)")
    if site is None:
        return strings, torch.tensor([lm.token_id(s) for s in strings])
    return strings, site.complete(strings)


def _nested(query: Query, posterior: Posterior, sampler: str | None) -> Query:
    """The query with enough plate axes for the posterior, for the model, and for a guide that draws."""
    is_program(model=query.model)
    every = replace(query, guide=posterior.guide) if sampler == "guide" else query
    return replace(query, max_plate_nesting=max(posterior.sites.plates.nesting, every.nesting))


def _run(
    posterior: Posterior,
    query: Query,
    sampler: str | None,
    num_particles: int | None,
    keep: Collection[str] | None,
    *handlers: Messenger,
    site: str | None = None,
) -> tuple[Trace, Plates, Tensor, bool]:
    """The model's trace given latents from the sampler, its kept plates, and normalised log weights (N, *plates).

    Then whether the particles are `Sites.dependent`.  With ``site``, the plates are those of this site.
    """
    if sampler not in (None, "prior", "guide"):
        raise ValueError(f"sampler: expected None, 'prior' or 'guide', got {sampler!r}")
    if sampler == "guide" and posterior.guide is None:
        raise ValueError("sampler: this posterior was made without a guide")
    if sampler is not None and keep is not None:
        raise ValueError(f"keep: the sampler {sampler!r} draws every latent site; leave one of the two out")
    if num_particles is not None:
        at_least(1, num_particles=num_particles)
    own, nesting, sketch = posterior.sites.plates, query.nesting, query.sketches[-1]
    plates = kept_plates([sketch if site is None else only(sketch, {site})], nesting)
    n = num_particles or posterior.num_particles
    log_weights = posterior.log_weights.new_full((n, *plates.sizes), -math.log(n))
    values: dict[str, Tensor] = {}
    kept: set[str] = set()
    dependent = False
    if sampler is None:
        _ = posterior.probabilities  # raises ZeroEvidence
        known = {name: _deeper(value, nesting - own.nesting) for name, value in posterior.values.items()}
        kept = carried(posterior.sites.query, query, known, keep, site)
    if kept:
        shared = set(zip(own.dims, own.sizes, strict=True)) <= set(zip(plates.dims, plates.sizes, strict=True))
        if num_particles is None and shared:
            by_axis = own.spread(posterior.log_weights.log_softmax(0))  # (N, *plate axes)
            log_weights = plates.reduce(_deeper(by_axis, nesting - own.nesting))[0]
        else:  # weights are separate for each plate element, but the particles here are joint: resample each element
            posterior = posterior.resample(n, "systematic" if shared else "multinomial")
        # Of chains and enumerations too the weights alone give no error: their classes have estimates of their own.
        dependent = posterior.sites.dependent or type(posterior).standard_error is not Posterior.standard_error
        values = {name: _deeper(posterior.values[name], nesting - own.nesting) for name in kept}
    if sampler == "guide" and posterior.guide is not None:
        values = programs.values(query.trace(posterior.guide, programs.Draw(), particles=n))
    run = query.trace(query.model, programs.Draw(), Substitute(values), *handlers, particles=n)
    return run, plates, log_weights, dependent


def _deeper(x: Tensor, more: int) -> Tensor:
    """(N, ...) with ``more`` plate axes of size 1 on the right of the particle axis."""
    return x.reshape(len(x), *[1] * more, *x.shape[1:])
