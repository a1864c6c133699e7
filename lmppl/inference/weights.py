r"""The heart: the log importance weight of complete latent values, for any model and guide.

.. math:: u(z) = \log p(z, observed) - \log q(z)

log p is Pyro's log_prob of the model's sites, with scale and mask, factors and observations included.  log q is the
*unscaled* density that produced the values, mask kept.  Shapes: particles lead, then the *kept plates*, those that
enclose every latent, observation and factor; along them weights stay separate and subsampling is divided out.
Everything else is summed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from .. import randomness
from . import programs
from .programs import Node, Program, Replay


@dataclass(frozen=True)
class Plates:
    """The kept plates, left to right: their names, sizes and axes; ``nesting`` axes in all belong to plates."""

    names: tuple[str, ...]
    dims: tuple[int, ...]
    sizes: tuple[int, ...]
    nesting: int

    def reduce(self, log_prob: Tensor) -> Tensor:
        """Sum over every plate axis that is not kept: (..., *plate axes) -> (prefix, particle, *kept)."""
        lead = 2 + self.nesting - log_prob.dim()
        log_prob = log_prob[(None,) * lead] if lead > 0 else log_prob
        others = [d for d in range(-self.nesting, 0) if d not in self.dims]
        log_prob = log_prob.sum(others) if others else log_prob
        return log_prob.expand(log_prob.shape[:2] + self.sizes)

    def lead(self, value: Tensor, event_dim: int) -> Tensor:
        """A site's value (particle, *plate axes, *event) as (particle, *kept, *others larger than 1, *event)."""
        axes = [value.dim() - event_dim + d for d in range(-self.nesting, 0)]
        kept = [axes[d] for d in self.dims]
        others = [a for a in axes if a not in kept]
        value = value.permute(0, *kept, *others, *range(value.dim() - event_dim, value.dim()))
        first = 1 + len(kept)
        return value.reshape(
            *value.shape[:first],
            *(n for n in value.shape[first : first + len(others)] if n > 1),
            *value.shape[first + len(others) :],
        )

    def spread(self, kept: Tensor) -> Tensor:
        """(particle, *kept) as (particle, *plate axes), size 1 along plates that are not kept."""
        shape = [1] * self.nesting
        for d, n in zip(self.dims, self.sizes, strict=True):
            shape[d] = n
        return kept.reshape(kept.shape[0], *shape)

    def take(self, value: Tensor, chosen: Tensor) -> Tensor:
        """Particles ``chosen`` (n, *kept) of a value (N, *plate axes, *event)."""
        index = self.spread(chosen)
        index = index.reshape(*index.shape, *[1] * (value.dim() - index.dim()))
        value = value.expand(
            value.shape[0], *(max(a, b) for a, b in zip(value.shape[1:], index.shape[1:], strict=True))
        )
        return value.gather(0, index.expand(index.shape[0], *value.shape[1:]))


def kept_plates(traces: Iterable[Trace], nesting: int, *, subsampling: bool = True) -> Plates:
    """The plates that enclose every scored site of these traces.

    :raises ValueError: for a subsampled plate that is not kept, unless ``subsampling`` (an objective may be estimated
        from a subsample, evidence may not).
    """
    nodes = [node for trace in traces for node in programs.scored(trace).values()]
    enclosing = [{f.name: f for f in node["cond_indep_stack"] if f.name not in _OWN} for node in nodes]
    every = [{name: f for name, f in e.items() if f.vectorized} for e in enclosing]
    frames = [f for name, f in every[0].items() if all(name in e for e in every)] if every else []
    frames.sort(key=lambda f: f.dim)
    if not subsampling:
        for node_frames in enclosing:  # sequential plates too: they are joint
            for f in node_frames.values():
                if f.full_size not in (None, f.size) and f.name not in {k.name for k in frames}:
                    raise ValueError(
                        f"model: the plate {f.name!r} is subsampled ({f.size} of {f.full_size}) but does not enclose "
                        "every latent, observation and factor, so that no evidence is defined; run it in full"
                    )
    return Plates(tuple(f.name for f in frames), tuple(f.dim for f in frames), tuple(f.size for f in frames), nesting)


_OWN = (programs.PARTICLES, programs.PREFIXES)


def scale(node: Node, plates: Plates) -> Any:
    """A site's scale, the kept plates' subsampling divided out: a datum's evidence is its own."""
    result: Any = node["scale"]
    for f in node["cond_indep_stack"]:
        if f.name in plates.names and f.full_size not in (None, f.size):
            result = result * f.size / f.full_size
    return result


def site_log_prob(node: Node, plates: Plates, log_prob: Tensor | None = None, *, scaled: bool = True) -> Tensor:
    """One site's term, (prefix, particle, *kept): mask applied, and the scale unless it is log q."""
    log_prob = node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"]) if log_prob is None else log_prob
    there = scale_and_mask(log_prob.detach(), 1.0, node["mask"])  # where the site is not there, anything goes
    if there.numel() and not (highest := float(there.max())) < torch.inf:  # NaN is the maximum wherever there is one
        raise ValueError(f"site {node['name']!r}: its log-probability is {highest}; expected a number or -inf")
    return term(node, plates, log_prob, scaled=scaled)


def term(node: Node, plates: Plates, log_prob: Tensor, *, scaled: bool) -> Tensor:
    """`site_log_prob` of a log-probability that may be NaN."""
    return plates.reduce(scale_and_mask(log_prob, scale(node, plates) if scaled else 1.0, node["mask"]))


def log_density(trace: Trace, plates: Plates, *, known: dict[str, Tensor] | None = None) -> Tensor:
    """The sum of a trace's terms; ``known`` holds log-probabilities already at hand, by site."""
    known = known or {}
    sites = programs.scored(trace).items()
    return _total((site_log_prob(node, plates, known.get(name)) for name, node in sites), plates, device_of(trace))


@dataclass(frozen=True)
class Weighted:
    """Particles and their log weights ``u`` (particle, *kept), with the traces and plates they came from."""

    u: Tensor
    values: dict[str, Tensor]
    model: Trace
    guide: Trace
    plates: Plates


@torch.no_grad()
def weigh(
    model: Program,
    guide: Program | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_particles: int,
    max_plate_nesting: int | float | None = None,
) -> Weighted:
    """Draw particles from the guide (or the model's own latent sites) and weigh them."""
    both = [model] if guide is None else [guide, model]
    nesting = programs.plate_nesting(both, args, kwargs, max_plate_nesting)
    draw = programs.Draw()
    proposal = programs.trace(guide or model, args, kwargs, draw, nesting=nesting, particles=num_particles)
    values = programs.values(proposal)
    if guide is None:
        target = proposal
    else:
        target = programs.trace(model, args, kwargs, Replay(values), nesting=nesting, particles=num_particles)
        programs.match(target, proposal)
    plates = kept_plates([target] if guide is None else [target, proposal], nesting, subsampling=False)
    if guide is None:
        log_weight = log_weight_of_prior(target, plates, draw.log_probs)
    else:
        log_q = log_density_of_latents(proposal, plates, draw.log_probs)
        log_weight = log_ratio(log_density(target, plates), log_q)
    u = log_weight.expand(1, num_particles, *plates.sizes)[0]
    return Weighted(u, values, target, proposal, plates)


def log_density_of_latents(guide: Trace, plates: Plates, known: dict[str, Tensor] | None = None) -> Tensor:
    """log q: the unscaled density of the guide's latent sites."""
    known = known or {}
    sites = programs.latents(guide).items()
    terms = (site_log_prob(node, plates, known.get(name), scaled=False) for name, node in sites)
    return _total(terms, plates, device_of(guide))


def device_of(*traces: Trace) -> torch.device | None:
    """Where the values of these traces are; None where there are none."""
    values = (node["value"] for trace in traces for node in programs.scored(trace).values())
    return next((value.device for value in values if isinstance(value, Tensor)), None)


def _total(terms: Iterable[Tensor], plates: Plates, device: torch.device | None = None) -> Tensor:
    """The sum of terms (prefix, particle, *kept), each of size 1 or full."""
    total: Tensor | None = None
    for term in terms:
        total = term if total is None else total + term
    return torch.zeros(1, 1, *plates.sizes, device=device) if total is None else total


def log_weight_of_prior(trace: Trace, plates: Plates, known: dict[str, Tensor] | None = None) -> Tensor:
    """u where the model proposes its own latents: a latent site of scale 1 cancels and is never scored."""
    known = known or {}
    latents = programs.latents(trace)
    terms = []
    for name, node in programs.scored(trace).items():
        if name not in latents:
            terms.append(site_log_prob(node, plates))
        elif isinstance(s := scale(node, plates), Tensor) or abs(s - 1.0) > 1e-12:
            log_p = known[name] if name in known else node["fn"].log_prob(node["value"])
            terms.append(
                log_ratio(site_log_prob(node, plates, log_p), site_log_prob(node, plates, log_p, scaled=False))
            )
        elif name in known and bool((dead := known[name] == -torch.inf).any()):  # a text that could not go on
            terms.append(site_log_prob(node, plates, torch.zeros_like(known[name]).masked_fill(dead, -torch.inf)))
    return _total(terms, plates, device_of(trace))


def log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p - log q, where p = 0 wins over q = 0 (a value that the guide, too, says is impossible)."""
    return (log_p - log_q).masked_fill(log_p == -torch.inf, -torch.inf)


# -- the prefix axis -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Balance:
    """u over the stopped prefixes of one text site, the other sites held: what every objective compares.

    All are (prefix, particle, *kept).  ``log_p`` is detached; gradients flow through ``log_q``.
    """

    site: str | None
    log_p: Tensor
    log_q: Tensor
    valid: Tensor  # the prefix exists and the guide can stop there
    stop: Tensor  # the guide's own probability of stopping there, detached; 1 where whole samples only are kept
    at: Tensor  # how many tokens the prefix has; 0 where whole samples only are kept
    last: Tensor  # the prefix is the whole sample
    identifies: bool  # pairs within one sample do: every latent is a text, each sample keeps a terminable empty prefix
    guide: Trace = field(repr=False)
    plates: Plates = field(repr=False)

    @property
    def u(self) -> Tensor:
        return self.log_p - self.log_q

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the guide was called with."""
        given = self.guide.nodes["_INPUT"]
        return given["args"], given["kwargs"]


def choose_prefixes(end: Tensor, first: Tensor, count: int | None, width: int) -> Tensor:
    """Prefix lengths (P, ...): all of 0..width-1, or ``count`` of them per text, the first possible and the last kept.

    ``end`` and ``first`` (...): the length of the text, and of its shortest terminable prefix.
    """
    if count is None or count >= width:
        return torch.arange(width, device=end.device).view(-1, *[1] * end.dim()).expand(-1, *end.shape)
    between = randomness.uniform((max(0, count - 2), *end.shape), device=end.device)
    span = (end - first - 1).clamp(min=0)  # the lengths strictly between, drawn in strata so that few coincide
    strata = torch.arange(len(between), device=end.device).view(-1, *[1] * end.dim())
    inner = first + 1 + ((strata + between) / max(1, len(between)) * span).long()
    at = torch.cat([first[None], inner, end[None]]) if count > 1 else end[None]
    # A length that occurs twice counts once: the repeats are moved past the end, where they are not valid.
    at, _ = at.sort(0)
    repeated = torch.cat([torch.zeros_like(at[:1], dtype=torch.bool), at[1:] == at[:-1]])
    return at.masked_fill(repeated, width)


def balance(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    drawn: Trace,
    nesting: int,
    num_particles: int,
    site: str | None,
    num_prefixes: int | None = None,
) -> Balance:
    """u at the stopped prefixes of ``site``'s texts: one pass of the guide with gradient, one of the model without.

    ``drawn`` is a vectorised trace of the guide; ``site=None`` keeps whole samples only (P = 1), and so does a particle
    in which the site is masked.
    """
    held = programs.values(drawn)
    if site is None:
        P, where = 1, None
    else:
        fn, value = drawn.nodes[site]["fn"], held[site]
        width = fn.event_shape[0]
        ending = programs.all_stops(fn).ending(value)
        end, stopped = ending.at, ending.ended  # (particle, *plate axes)
        first = torch.minimum(fn.min_tokens.expand(end.shape), end)
        at = choose_prefixes(end, first, num_prefixes, width)  # (P, particle, *plate axes)
        P, where = at.shape[0], at.minimum(end).clamp(max=width - 1)
        held[site] = programs.cut(value, ending, at)
    extra: dict[str, Tensor] = {}
    shape = {"nesting": nesting, "particles": num_particles, "prefixes": P}

    guide_trace = programs.trace(guide, args, kwargs, Replay(held), **shape)
    with torch.no_grad():
        model_trace = programs.trace(model, args, kwargs, Replay(held), **shape)
    programs.match(model_trace, guide_trace)
    if site is not None and site in model_trace.nodes:
        _same_stop_strings(site, model_trace.nodes[site]["fn"], fn)
    plates = kept_plates([model_trace, guide_trace], nesting)
    if site is not None and where is not None:
        scores = guide_trace.nodes[site]["fn"].prefix_scores(
            value
        )  # (P, particle, *plate axes, width), alike for all P
        log_q_site, stop_site = (_at(x, where) for x in scores)
        extra = {site: log_q_site}
    log_q = log_density_of_latents(guide_trace, plates, extra)
    with torch.no_grad():
        if site is not None and where is not None:  # an auxiliary site may be the guide's alone
            in_model = site in model_trace.nodes
            extra = {site: _at(model_trace.nodes[site]["fn"].prefix_log_probs(value), where)} if in_model else {}
        log_p = log_density(model_trace, plates, known=extra)
        full = torch.broadcast_shapes(log_q.shape, log_p.shape, (P, num_particles, *plates.sizes))
        if where is None:
            last = torch.ones(full, dtype=torch.bool, device=log_p.device)
            stop, tokens = torch.ones(full, device=log_p.device), torch.zeros(full, device=log_p.device)
            valid = log_q != -torch.inf
        else:
            # A text in a plate that is not kept is cut together with its neighbours; the longest says when it is over.
            valid = (plates.reduce(((at <= end) & stopped).double()) > 0) & (log_q != -torch.inf)
            last = plates.reduce((at < end).double()) == 0
            mask = guide_trace.nodes[site]["mask"]
            valid = valid & (plates.reduce(scale_and_mask((~stopped).double(), 1.0, mask)) == 0)  # none could not go on
            if mask is not None:
                valid = valid & (last | (plates.reduce(torch.as_tensor(mask).double()) > 0))
            stop_site = scale_and_mask(stop_site.detach(), 1.0, mask)  # a text that is not there has ended for certain
            stop, tokens = plates.reduce(stop_site).exp(), plates.reduce(where.double())
    valid = valid.expand(full)
    return Balance(
        site=site,
        log_p=log_p.expand(full),
        log_q=log_q.expand(full).masked_fill(~valid, 0.0),
        valid=valid,
        stop=stop.expand(full),
        at=tokens.expand(full),
        last=last.expand(full) & valid,
        identifies=all(programs.is_terminable(n) for n in programs.latents(drawn).values())
        and where is not None
        and bool(((at == 0) & (log_q_site != -torch.inf)).any(0).all()),
        guide=guide_trace,
        plates=plates,
    )


def _same_stop_strings(site: str, model: Any, guide: Any) -> None:
    """Raise SiteMismatch where a text would end by another string in the model: its prefixes are not the guide's."""
    own = [getattr(fn, "stop_strings", None) for fn in (model, guide)]
    given = [set() if strings is None else set(strings.strings) for strings in own]
    if given[0] != given[1]:
        raise programs.SiteMismatch(
            f"guide: the texts of site {site!r} end at the stop strings {sorted(given[1])}, the model's at "
            f"{sorted(given[0])}; give both the same"
        )


def _at(prefix_scores: Tensor, where: Tensor) -> Tensor:
    """Column ``where`` (P, particle, ...) of scores (P, particle, ..., W) that are the same for every P."""
    by_prefix = prefix_scores[0].movedim(-1, 0)  # (W, particle, ...)
    missing = int(where.max()) + 1 - by_prefix.shape[0]
    if missing > 0:  # a model that allows fewer tokens than the guide: impossible there
        by_prefix = torch.cat([by_prefix, by_prefix.new_full((missing, *by_prefix.shape[1:]), -torch.inf)])
    return by_prefix.gather(0, where.expand(-1, *by_prefix.shape[1:]))
