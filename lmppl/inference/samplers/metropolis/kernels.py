r"""Metropolis kernels on latent texts: a proposal and its acceptance, for all chains at once.

A proposal z' of density :math:`k(z' \mid z)` is accepted with probability

.. math:: \alpha = \min\Big(1, \frac{\pi(z')}{\pi(z)} \frac{k(z \mid z')}{k(z' \mid z)}\Big)

separately for every chain and element of the kept plates.  From a state of probability zero, everything is accepted.

- *Regrowth* changes one text site.  The text z has |z| tokens with its stop; a cut t is uniform over 0 .. |z| - 1, and
  the tokens after z_1..z_t are drawn again from q, the guide's site (or the model's if there is no guide).  At the last
  cut only the stop is drawn again.  Old and new text have the same cut, so that

  .. math:: \frac{k(z \mid z')}{k(z' \mid z)} =
      \frac{|z|}{|z'|} \cdot \frac{q(z_{>t} \mid z_{\le t})}{q(z'_{>t} \mid z_{\le t})}

  is in detailed balance for each t, and so on average.  Texts of one site in plates that are not kept have a cut each,
  and move together: the ratio is a product over them.  A latent site that is no text is drawn again completely.
- *Branch* is a regrowth of one site, after which all later latent sites of the program are drawn again from q.  Old and
  new values share everything before them, so the ratio gets the factor q(z later) / q(z' later), each given the values
  before it.  It is for sites that say which other sites exist (a number of steps or children): they change together.
- *Independence* draws all latent sites from the guide; the ratio is q(z) / q(z').

A text that the model masks does not count in p, and follows q.  Importance weights treat it in the same way if the
guide masks it too; if the guide does not, they give it the weight 1 / q.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .... import randomness, text
from ...core import programs
from ...core.auxiliary import log_lacking
from ...core.partial import only
from ...core.plates import Plates
from ...core.programs import Draw, Node, Sketch, Substitute, Values
from ...core.query import Pair, Query
from ...core.sites import text_of
from ...core.weights import log_density, text_log_probs


class Density(NamedTuple):
    """log p(z, observed) in two parts, each (chain, *kept)."""

    prior: Tensor  # of the latent sites
    likelihood: Tensor  # of observations and factors

    @property
    def joint(self) -> Tensor:
        return self.prior + self.likelihood

    def tempered(self, beta: Tensor) -> Tensor:
        """log of prior x likelihood^beta, with 0^0 = 1; ``beta`` (chain, 1, ..)."""
        return self.prior + torch.where(beta == 0, 0.0, beta * self.likelihood)

    def where(self, accepted: Tensor, other: Density) -> Density:
        """This density where ``accepted`` (chain, *kept) is true, the other elsewhere."""
        return Density(*(torch.where(accepted, a, b) for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Proposal:
    """New values of some sites (chain, *plate axes, *event), their density, and log k(z | z') - log k(z' | z)."""

    values: Values
    density: Density
    log_ratio: Tensor  # (chain, *kept)
    plates: Plates
    log_q: Tensor | None = None  # (chain, *kept) of all latent values, if it is known


class Redraw(Messenger):
    """Draws one latent site again: the tokens of a text after a uniform cut, any other site completely."""

    def __init__(self, site: str, old: Tensor):
        super().__init__()
        self.site, self.old = site, old
        self.log_ratio = torch.zeros(())  # (chain, *plate axes): log k(old | new) - log k(new | old)
        self.known: Values = {}  # log q(new), if drawing computes it

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] != self.site:
            return
        site, fn = text_of(msg["fn"]), msg["fn"]
        if site is not None and site.regrowable:
            count = text.length(self.old)  # (chain, *plate axes, *stacked), with the stop
            keep = (randomness.uniform(count.shape, device=count.device) * count).long()
            keep = keep.minimum(count - 1).clamp(min=0)
            new, log_new = site.regrow(self.old, keep)
            by_token = site.token_log_probs(self.old)
            later = torch.arange(by_token.shape[-1], device=keep.device) >= keep[..., None]
            log_old = torch.where(later, by_token, 0.0).sum(-1)
            cuts = [n.clamp(min=1).to(log_old.dtype).log() for n in (count, text.length(new))]
            self.log_ratio = site.total(log_old - log_new + cuts[0] - cuts[1])
            self.known[self.site] = site.lift(torch.where(later, 0.0, by_token).sum(-1) + log_new)
        else:
            new = fn.sample()
            self.log_ratio = fn.log_prob(self.old) - fn.log_prob(new)
        msg["value"], msg["done"] = new, True


def regrowth(query: Query, n: int, values: Mapping[str, Tensor], site: str, later: Collection[str] = ()) -> Proposal:
    """Proposes new ends for the texts of ``site``, or new values if it is no text; the other sites are fixed.

    The sites ``later``, all that follow it or none, are drawn again.  Here and below, ``n`` is the number of particles
    or chains.
    """
    fresh, redraw = Draw(), Redraw(site, values[site])
    held = Substitute({name: v for name, v in values.items() if name != site and name not in later})
    pair = query.run(fresh, redraw, held, particles=n)
    plates, log_ratio = pair.plates(), redraw.log_ratio
    known = redraw.known | fresh.log_probs
    density = _density(pair, plates, known if query.guide is None else {})
    log_ratio = plates.reduce(log_ratio)[0]
    if later:
        before = only(query.trace(query.proposal, Substitute(values), particles=n), set(later))
        log_new = _log_q(only(pair.proposal, set(later)), plates, fresh.log_probs)
        log_ratio = log_ratio + _log_q(before, plates, {}) - log_new
    new = {name: pair.proposal.nodes[name]["value"] for name in (site, *later)}
    return Proposal(new, density, log_ratio, plates)


def independence(query: Query, n: int, values: Values, log_q: Tensor | None, subsamples: Values) -> Proposal:
    """Proposes new values of all latent sites; ``log_q`` of the old ones is computed if it is None."""
    drawn = draw(query, n, subsamples)[1]
    if log_q is None:
        log_q = _log_q(query.trace(query.proposal, Substitute(values | subsamples), particles=n), drawn.plates, {})
    assert drawn.log_q is not None
    return replace(drawn, log_ratio=log_q - drawn.log_q)


def draw(query: Query, n: int, subsamples: Values) -> tuple[Pair, Proposal]:
    """Draws all latent sites from the proposal; returns the traces of both programs, and the values as a `Proposal`."""
    handler = Draw()
    pair = query.run(handler, Substitute(subsamples), particles=n)
    plates = pair.plates()
    values = {name: node["value"] for name, node in programs.latents(pair.proposal).items()}
    density = _density(pair, plates, handler.log_probs if query.guide is None else {})
    log_q = _log_q(pair.proposal, plates, handler.log_probs)
    return pair, Proposal(values, density, torch.zeros_like(log_q), plates, log_q)


def density(query: Query, n: int, values: Values) -> Density:
    """The density of given values of all latent sites and subsamples."""
    pair = query.at(values, particles=n)
    return _density(pair, pair.plates(), {})


def accept(log_old: Tensor, log_new: Tensor, log_ratio: Tensor) -> Tensor:
    """The Metropolis rule, BoolTensor (chain, *kept), from log pi(z), log pi(z') and log k(z | z') - log k(z' | z)."""
    log_alpha = (log_new - log_old + log_ratio).masked_fill(log_new == -torch.inf, -torch.inf)
    uniform = randomness.uniform(log_alpha.shape, axis=1, dtype=torch.float64, device=log_alpha.device)
    return (log_old == -torch.inf) | (uniform.log() < log_alpha)


def select(plates: Plates, accepted: Tensor, new: Values, old: Values) -> Values:
    """The ``new`` values where ``accepted`` (chain, *kept) is true, else the old ones; other sites are unchanged."""
    chosen, spread = dict(old), plates.spread(accepted)
    for name, a in new.items():
        b = old[name]
        if a.shape[-1:] != b.shape[-1:]:  # texts whose max_tokens depends on other sites
            width = max(a.shape[-1], b.shape[-1])
            a, b = text.pad(a, width), text.pad(b, width)
        chosen[name] = torch.where(spread.view(*spread.shape, *[1] * (a.dim() - spread.dim())), a, b)
    return chosen


def _density(pair: Pair, plates: Plates, known: Values) -> Density:
    proposal, target = pair.proposal, pair.model
    latent = programs.latents(target)
    if not latent:
        raise ValueError("model: it has no latent site, so there is nothing to sample")
    known = text_log_probs(programs.scored(target), besides=known) | known
    prior = log_density(only(target, set(latent)), plates, known=known)
    prior = prior + log_lacking(proposal, target.nodes, plates).to(prior.device)
    for name, node in latent.items():  # an element that the model masks follows q
        site = text_of(node["fn"])
        mask = node["mask"] if site is None else site.there(node["mask"])
        if mask is not None and bool((out := torch.as_tensor(mask).logical_not()).any()):
            prior = prior + plates.reduce(_log_q_of(proposal.nodes[name], out))
    likelihood = log_density(only(target, set(target.nodes) - set(latent)), plates, known=known).to(prior.device)
    n = len(next(iter(latent.values()))["value"])
    return Density(*(x[0].expand(n, *plates.sizes) for x in (prior, likelihood)))


def _log_q(proposal: Trace, plates: Plates, known: Values) -> Tensor:
    """log q of all latent values, masked or not, (chain, *kept)."""
    terms = []
    for name, node in programs.latents(proposal).items():
        site = text_of(node["fn"])
        whole = name in known and (site is None or site.mask is None)
        terms.append(plates.reduce(known[name] if whole else _log_q_of(node))[0])
    return torch.stack(torch.broadcast_tensors(*terms)).sum(0)


def _log_q_of(node: Node, mask: Tensor | None = None) -> Tensor:
    """log q of a site's value, masked or not, or only of the elements in ``mask`` (the texts of a text site)."""
    site = text_of(node["fn"])
    if site is None:
        return scale_and_mask(node["fn"].log_prob(node["value"]), 1.0, mask)
    return site.total(scale_and_mask(site.log_prob(node["value"]), 1.0, mask))


class Moved(NamedTuple):
    """The particles after a move."""

    values: Values
    log_p: Tensor  # log p(z, observed), (particle, *kept)
    accepted: Tensor  # BoolTensor (particle, *kept)


@torch.no_grad()
def regrow(query: Query, values: Values, log_p: Tensor, *, site: str | None = None, temperature: float = 1.0) -> Moved:
    r"""One regrowth move of every particle, with the target :math:`p(z, observed)^{1/T}`.

    :param values: (particle, *plate axes, *event) of every latent site, and of subsamples if there are any.
    :param log_p: log p(z, observed) of these values, (particle, *kept), from ``density(...).joint`` or the last move.
    :param site: the site to move; None: one of the guide's latent sites, chosen uniformly.
    :param temperature: the temperature T.
    """
    n = len(log_p)
    if site is None:
        sites = list(programs.latents(query.trace(query.proposal, Sketch(), Substitute(values), particles=n)))
        site = sites[int(torch.randint(len(sites), ()))]
    proposal = regrowth(query, n, values, site)
    log_new = proposal.density.joint.to(log_p.dtype)
    accepted = accept(log_p / temperature, log_new / temperature, proposal.log_ratio)
    moved = select(proposal.plates, accepted, proposal.values, values)
    return Moved(moved, torch.where(accepted, log_new, log_p), accepted)
