r"""The log importance weight u of complete latent values, for any model and guide.  All inference builds on it.

.. math:: u(z) = \log p(z, observed) - \log q(z)

log p is Pyro's log_prob of the model's sites, with scale and mask, factors and observations included.  log q is the
*unscaled* density that produced the values, with its mask.  Shapes: the particle axis comes first, then the *kept
plates*, which are those that enclose every latent, observation and factor.  Along kept plates weights stay separate and
subsampling is divided out.  Everything else is summed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from ... import randomness
from ...distributions.protocols import PrefixScores
from ...engine.asking import Asking, asking, together
from ...shapes import broadcast_shapes
from . import programs
from .auxiliary import log_lacking
from .plates import Plates
from .programs import Node
from .query import Pair, Query
from .sites import Site, asks_network, is_terminable, text_of, texts_of


def scale(node: Node, plates: Plates) -> Any:
    """A site's scale without the factor of subsampled kept plates, so that each datum has its own evidence."""
    result: Any = node["scale"]
    for f in node["cond_indep_stack"]:
        if f.name in plates.names and f.full_size not in (None, f.size):
            result = result * f.size / f.full_size
    return result


def site_log_prob(node: Node, plates: Plates, log_prob: Tensor | None = None, *, scaled: bool = True) -> Tensor:
    """One site's term, (prefix, particle, *kept), with its mask and, if ``scaled``, its scale; log q has no scale."""
    log_prob = together([_log_prob(node)])[0] if log_prob is None else log_prob
    there = scale_and_mask(log_prob.detach(), 1.0, node["mask"])  # masked elements may have any value
    if there.numel() and not (highest := float(there.max())) < torch.inf:  # the maximum is NaN if any element is
        raise ValueError(f"site {node['name']!r}: its log-probability is {highest}; expected a number or -inf")
    return term(node, plates, log_prob, scaled=scaled)


def text_log_probs(nodes: Mapping[str, Node], besides: Container[str] = ()) -> dict[str, Tensor]:
    """log p of the sites that are texts of language models.  The network reads what they have in common once."""
    return dict(_answers(texts_asking(nodes, besides)))


def texts_asking(nodes: Mapping[str, Node], besides: Container[str] = ()) -> dict[str, Asking[Any]]:
    """The requests of `text_log_probs` to the network, by site."""
    return {name: _log_prob(node) for name, node in nodes.items() if name not in besides and asks_network(node["fn"])}


def _answers(calls: dict[str, Asking[Any]]) -> Iterable[tuple[str, Any]]:
    return zip(calls, together([*calls.values()]), strict=True)


def _log_prob(node: Node) -> Asking[Tensor]:
    site = text_of(node["fn"]) if asks_network(node["fn"]) else None
    try:
        if site is None:
            log_prob: Tensor = node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"])
        else:
            log_prob = site.lift((yield from asking(site.log_prob, node["value"])))
    except ValueError as error:  # a value outside the support: Pyro's message does not name the site
        if str(error).startswith("Expected value argument"):
            raise ValueError(f"site {node['name']!r}: {error}") from error
        raise
    return log_prob


def term(node: Node, plates: Plates, log_prob: Tensor, *, scaled: bool) -> Tensor:
    """`site_log_prob` of a log-probability that may be NaN."""
    return plates.reduce(scale_and_mask(log_prob, scale(node, plates) if scaled else 1.0, node["mask"]))


def log_density(trace: Trace, plates: Plates, *, known: dict[str, Tensor] | None = None) -> Tensor:
    """The sum of a trace's terms; ``known`` holds log-probabilities that were computed before, by site."""
    known, sites = known or {}, programs.scored(trace)
    known = text_log_probs(sites, besides=known) | known
    terms = (site_log_prob(node, plates, known.get(name)) for name, node in sites.items())
    return _total(terms, plates, device_of(trace))


@dataclass(frozen=True)
class Weighted:
    """Particles with their log weights ``u`` (particle, *kept), and the traces and plates that these came from."""

    u: Tensor
    values: dict[str, Tensor]
    model: Trace
    guide: Trace
    plates: Plates


@torch.no_grad()
def weigh(query: Query, num_particles: int) -> Weighted:
    r"""Draws particles from the guide, or from the model if there is no guide, and computes their log weights u.

    .. math:: z_n \sim q, \qquad u_n = \log p(z_n, observed) - \log q(z_n), \qquad E_q[e^{u}] = p(observed)

    log p includes scale, masks, factors and observations; log q is unscaled.  No gradient is computed.  Use it to write
    an algorithm of your own: `Posterior.of` makes a posterior of the result.

    :param query: the model, the guide and their arguments.
    :param num_particles: N, drawn in one vectorised run.

    :returns: an object with ``u`` (N, *plates), for the plates that enclose every site; ``values``, the latent values
        by site, (N, *plate axes, *event) each; ``model`` and ``guide``, the traces (the same one if there is no
        guide); and ``plates``.

    :raises SiteMismatch: if model and guide do not fit together.
    :raises ValueError: for a subsampled plate that does not enclose every site, and for a log-probability that is NaN
        or +inf.

    Example::

        weighted = weigh(Query(model, guide, (x, y)), 64)
        weighted.u.exp().mean(0).log()  # the estimate of the log evidence, (*plates)
        weighted.u.std(0)  # 0 where the guide is the exact posterior
    """
    draw = programs.Draw()
    pair = query.run(draw, particles=num_particles).matched()
    plates = pair.plates()
    if query.guide is None:
        log_weight = log_weight_of_prior(pair.model, plates, draw.log_probs)
    else:
        log_weight = log_ratio(*pair_densities(pair, plates, draw.log_probs))
    u = log_weight.expand(1, num_particles, *plates.sizes)[0]
    return Weighted(u, pair.values, pair.model, pair.proposal, plates)


def pair_densities(pair: Pair, plates: Plates, known: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """log p and log q of a pair's values, (prefix, particle, *kept); ``known``: log q by site, computed before.

    An auxiliary site of the guide that the model lacks is uniform there.
    """
    log_r = log_lacking(pair.proposal, pair.model.nodes, plates)
    log_p = log_density(pair.model, plates)
    return log_p + log_r.to(log_p.device), log_density_of_latents(pair.proposal, plates, known)


def log_density_of_latents(guide: Trace, plates: Plates, known: dict[str, Tensor] | None = None) -> Tensor:
    """log q: the unscaled density of the guide's latent sites."""
    known, sites = known or {}, programs.latents(guide)
    known = text_log_probs(sites, besides=known) | known
    terms = (site_log_prob(node, plates, known.get(name), scaled=False) for name, node in sites.items())
    return _total(terms, plates, device_of(guide))


def device_of(*traces: Trace) -> torch.device | None:
    """The device of these traces' values; None if there are none."""
    values = (node["value"] for trace in traces for node in programs.scored(trace).values())
    return next((value.device for value in values if isinstance(value, Tensor)), None)


def _total(terms: Iterable[Tensor], plates: Plates, device: torch.device | None = None) -> Tensor:
    """The sum of terms (prefix, particle, *kept), each of size 1 or full."""
    total: Tensor | None = None
    for term in terms:
        total = term if total is None else total + term
    return torch.zeros(1, 1, *plates.sizes, device=device) if total is None else total


def log_weight_of_prior(trace: Trace, plates: Plates, known: dict[str, Tensor] | None = None) -> Tensor:
    """u where the model proposes its own latents: the terms of a latent site of scale 1 cancel, so none is computed."""
    known, sites, latents = known or {}, programs.scored(trace), programs.latents(trace)

    def cancels(name: str) -> bool:
        s = scale(sites[name], plates)
        return name in latents and not isinstance(s, Tensor) and abs(s - 1.0) <= 1e-12

    known = text_log_probs({name: node for name, node in sites.items() if not cancels(name)}, besides=known) | known
    terms = []
    for name, node in sites.items():
        if name not in latents:
            terms.append(site_log_prob(node, plates, known.get(name)))
        elif not cancels(name):
            log_p = known[name] if name in known else node["fn"].log_prob(node["value"])
            terms.append(
                log_ratio(site_log_prob(node, plates, log_p), site_log_prob(node, plates, log_p, scaled=False))
            )
        elif name in known and bool((dead := known[name] == -torch.inf).any()):  # a text that met a dead end
            terms.append(site_log_prob(node, plates, torch.zeros_like(known[name]).masked_fill(dead, -torch.inf)))
    return _total(terms, plates, device_of(trace))


def log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p - log q; -inf where p = 0, also where q = 0 as well (a value that is impossible under both)."""
    return (log_p - log_q).masked_fill(log_p == -torch.inf, -torch.inf)


# -- the prefix axis -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Balance:
    """u of the stopped prefixes of one text site, the other sites fixed.  Objectives compare these values.

    All tensors are (prefix, particle, *kept).  ``log_p`` is detached; gradients flow through ``log_q``.
    """

    site: str | None
    log_p: Tensor
    log_q: Tensor
    valid: Tensor  # the prefix exists and the guide can stop there
    stop: Tensor  # the guide's probability of stopping there, detached; 1 where only whole samples are kept
    at: Tensor  # how many tokens the prefix has; 0 where only whole samples are kept
    last: Tensor  # the prefix is the whole sample
    # Whether pairs within one sample identify the posterior: every latent is a text, and every sample keeps an empty
    # prefix at which the guide can stop.
    identifies: bool
    guide: Trace = field(repr=False)
    plates: Plates = field(repr=False)

    @property
    def u(self) -> Tensor:
        return self.log_p - self.log_q

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that the guide was called with."""
        given = self.guide.nodes["_INPUT"]
        return given["args"], given["kwargs"]


def choose_prefixes(end: Tensor, first: Tensor, count: int | None, width: int) -> Tensor:
    """Prefix lengths (P, ...): all of 0..width-1, or ``count`` of them per text, always with the first and the last.

    ``end`` and ``first`` (...): the length of the text, and of its shortest terminable prefix.
    """
    if count is None or count >= width:
        return torch.arange(width, device=end.device).view(-1, *[1] * end.dim()).expand(-1, *end.shape)
    between = randomness.uniform((max(0, count - 2), *end.shape), device=end.device)
    span = (end - first - 1).clamp(min=0)  # the number of lengths between, drawn in strata so that few coincide
    strata = torch.arange(len(between), device=end.device).view(-1, *[1] * end.dim())
    inner = first + 1 + ((strata + between) / max(1, len(between)) * span).long()
    at = torch.cat([first[None], inner, end[None]]) if count > 1 else end[None]
    # A length that occurs twice counts once: repeats are moved past the end, where they are not valid.
    at, _ = at.sort(0)
    repeated = torch.cat([torch.zeros_like(at[:1], dtype=torch.bool), at[1:] == at[:-1]])
    return at.masked_fill(repeated, width)


def balance(
    query: Query, drawn: Trace, num_particles: int, site: str | None, num_prefixes: int | None = None
) -> Balance:
    """u at the stopped prefixes of a site's texts: one pass of the guide with gradient, one of the model without.

    ``drawn`` is a vectorised trace of the guide.  With ``site=None`` only whole samples are kept (P = 1), and likewise
    for a particle in which the site is masked.
    """
    held = programs.values(drawn)
    if site is None:
        P, where = 1, None
    else:
        texts, value = texts_of(drawn.nodes[site]), held[site]
        width, ending = texts.width, texts.ending(value)
        end, stopped = ending.at, ending.ended  # (particle, *plate axes, *stacked)
        first = torch.minimum(texts.min_tokens.expand(end.shape), end)
        at = choose_prefixes(end, first, num_prefixes, width)  # (P, particle, *plate axes, *stacked)
        P, where = at.shape[0], at.minimum(end).clamp(max=width - 1)
        held[site] = programs.cut(value, ending, at)
    extra: dict[str, Tensor] = {}
    pair = query.at(held, particles=num_particles, prefixes=P).matched()
    guide_trace, model_trace, plates = pair.proposal, pair.model, pair.plates(subsampling=True)
    if site is not None and site in model_trace.nodes:
        _same_stop_strings(site, text_of(model_trace.nodes[site]["fn"]), texts)
    if site is not None and where is not None:
        texts = texts_of(guide_trace.nodes[site])
        scores, extra = _scores_among(programs.latents(guide_trace), site, texts, value)
        # (P, particle, *plate axes, *stacked), from scores that are the same for all P
        log_q_site, stop_site = (_at(x, where) for x in scores)
        extra |= {site: texts.lift(log_q_site)}
    log_q = log_density_of_latents(guide_trace, plates, extra)
    with torch.no_grad():
        if site is not None and where is not None:
            # The model may lack an auxiliary site.  If its text scores no prefixes, log_density scores the cut texts.
            other = text_of(model_trace.nodes[site]["fn"]) if site in model_trace.nodes else None
            extra = {}
            if other is not None and other.terminable:
                scores, extra = _scores_among(programs.scored(model_trace), site, other, value)
                extra |= {site: other.lift(_at(scores.log_probs, where))}
        log_r = log_lacking(guide_trace, model_trace.nodes, plates)
        log_p = log_density(model_trace, plates, known=extra)
        log_p = log_p + log_r.to(log_p.device)
        full = broadcast_shapes(log_q.shape, log_p.shape, (P, num_particles, *plates.sizes))
        if where is None:
            last = torch.ones(full, dtype=torch.bool, device=log_p.device)
            stop, tokens = torch.ones(full, device=log_p.device), torch.zeros(full, device=log_p.device)
            valid = log_q != -torch.inf
        else:
            # Texts in a plate that is not kept are cut together; the sample is whole where the longest has ended.
            def total(x: Tensor) -> Tensor:  # over all texts of a particle
                return plates.reduce(texts.total(x.double()))

            valid = (total((at <= end) & stopped) > 0) & (log_q != -torch.inf)
            last = total(at < end) == 0
            mask = texts.there(guide_trace.nodes[site]["mask"])
            valid = valid & (total(scale_and_mask((~stopped).double(), 1.0, mask)) == 0)  # no text met a dead end
            if mask is not None:
                valid = valid & (last | (total(mask.expand(broadcast_shapes(mask.shape, end.shape))) > 0))
            # A masked text has the stop probability 1.
            stop = total(scale_and_mask(stop_site.detach(), 1.0, mask)).exp()
            tokens = total(where)
    valid = valid.expand(full)
    return Balance(
        site=site,
        log_p=log_p.expand(full),
        log_q=log_q.expand(full).masked_fill(~valid, 0.0),
        valid=valid,
        stop=stop.expand(full),
        at=tokens.expand(full),
        last=last.expand(full) & valid,
        identifies=all(is_terminable(n["fn"]) for n in programs.latents(drawn).values())
        and where is not None
        and bool(((at == 0) & (log_q_site != -torch.inf)).any(0).all()),
        guide=guide_trace,
        plates=plates,
    )


def _same_stop_strings(site: str, model: Site | None, guide: Site) -> None:
    """Raises SiteMismatch if model and guide have different stop strings for a site, so different prefixes."""
    if model is None:
        raise programs.SiteMismatch(f"guide: the site {site!r} is a text, but not in the model")
    given = [{x for x in texts.stop_argument if isinstance(x, str)} for texts in (model, guide)]
    if given[0] != given[1]:
        raise programs.SiteMismatch(
            f"guide: the texts of site {site!r} end at the stop strings {sorted(given[1])}, the model's at "
            f"{sorted(given[0])}; give both the same stop strings"
        )


def _scores_among(
    nodes: dict[str, Node], site: str, texts: Site, value: Tensor
) -> tuple[PrefixScores, dict[str, Tensor]]:
    """The prefix scores of one site's value and log p of the other sites, computed in the same pass."""
    calls = {site: asking(texts.prefix_scores, value)} | texts_asking(nodes, besides=(site,))
    log_probs = dict(_answers(calls))
    return log_probs.pop(site), log_probs


def _at(prefix_scores: Tensor, where: Tensor) -> Tensor:
    """Column ``where`` (P, particle, ...) of scores (P, particle, ..., W) that are the same for every P."""
    by_prefix = prefix_scores[0].movedim(-1, 0)  # (W, particle, ...)
    missing = int(where.max()) + 1 - by_prefix.shape[0]
    if missing > 0:  # the model allows fewer tokens than the guide: longer prefixes are impossible
        by_prefix = torch.cat([by_prefix, by_prefix.new_full((missing, *by_prefix.shape[1:]), -torch.inf)])
    return by_prefix.gather(0, where.expand(-1, *by_prefix.shape[1:]))
