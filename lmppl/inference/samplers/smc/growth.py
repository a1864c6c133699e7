"""One text site of all particles, drawn token by token from the guide and weighted by the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from .... import randomness, text
from ...core.partial import keep_first
from ...core.plates import Plates
from ...core.programs import Node, SiteMismatch
from ...core.sites import Site, inserting, propose, text_of
from ...core.weights import log_ratio, term


class Growth:
    r"""Unfinished texts of one site, (particle, *plate axes), drawn from the guide's site and scored by the model's.

    The log increment of a token is :math:`scale \cdot \log p(token) - \log q(token)`, summed over the texts of a
    particle.  A text that has ended has the increment 0.  A text that is impossible in the model has -inf, and so has a
    text at a dead end, which the guide can neither continue nor stop: it ends there without a stop.  With ``retained``
    texts by site (1, *plate axes, L), particle 0 takes its tokens from these; the increment is +inf where q = 0.
    """

    def __init__(self, model: Node, guide: Node, plates: Plates, retained: Mapping[str, Tensor] | None = None):
        self.name: str = guide["name"]
        self.model, self.guide, self.plates = Term.of(model), Term.of(guide), plates
        self.texts = self.guide.texts
        self.shape = self.texts.shape  # (particle, *plate axes, *stacked)
        if self.model.texts.shape != self.shape:
            raise SiteMismatch(
                f"guide: site {self.name!r} has the batch shape {tuple(self.shape)}, the model's "
                f"{tuple(self.model.texts.shape)}"
            )
        self.width = self.texts.width
        self.q = self.texts.steps()
        tempered = not bool(torch.as_tensor(guide["scale"]).eq(1).all())
        self.exact = retained is not None or (model is guide and tempered)  # log q itself is needed, not only log p/q
        # If the same site proposes and is weighted, its steps are used for both.
        self.p = self.q if model is guide else self.model.texts.steps(share=self.q)
        self.log_psi: Tensor | None = None  # the last log psi (particle, *kept) of the twist "stop" or "flow"
        self.retained: Tensor | None = None
        if retained is not None:
            nothing = torch.full((*self.shape, self.width), text.PAD, device=self.q.prefix.device)
            self.retained = keep_first(retained, self.name, guide["fn"], nothing).flatten(0, -2)  # (row, width)

    @property
    def done(self) -> bool:
        return bool(self.q.ended.all()) or self.q.prefix.shape[1] >= self.width

    @property
    def prefix(self) -> Tensor:
        """The texts so far, (particle, *plate axes, *stacked, t)."""
        return self.q.prefix.view(*self.shape, -1)

    @property
    def value(self) -> Tensor:
        """The texts, padded to the guide's event: (particle, *plate axes, *stacked, width)."""
        return text.pad(self.prefix, self.width)

    @property
    def inserting(self) -> Tensor:
        """Whether a tool is writing in a text of the particle, (particle, *kept)."""
        rows = inserting(self.p) | inserting(self.q)
        return self.plates.reduce(self.texts.total(rows.view(self.shape).double()))[0] > 0

    def step(self) -> Tensor:
        """Draws a token for every text; returns the log increments of the particles, (particle, *kept)."""
        p, q = self.p, self.q
        ended, gone = q.ended, p.ended  # gone and not ended: the guide continues after a stop of the model
        uniform = randomness.uniform(self.shape, device=ended.device).flatten()
        token, log_q = q.draw(uniform) if self.exact else propose(q, uniform)  # both (row,)
        if self.retained is not None:
            token, log_q = self._retain(token, log_q)
        log_p = log_q if p is q else p.score(token)
        q.append(token)
        if p is not q:
            p.append(token)
            dead = (token == text.PAD) & ~ended
            gone = gone | dead | (q.ended > p.ended)  # ended in the guide, but not in the model
            log_p = log_p.masked_fill(gone, -torch.inf).masked_fill(ended, 0.0)
        return self._ratio(log_p, log_q)

    def _retain(self, token: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """The draws with the retained tokens in the rows of particle 0."""
        assert self.retained is not None
        held = torch.arange(len(token), device=token.device) < self.shape[1:].numel()
        own = self.retained[:, self.q.prefix.shape[1]]
        token = torch.where(held, own.masked_fill(self.q.ended, text.PAD), token)
        impossible = (token == text.PAD) & ~self.q.ended
        log_own = self.q.score(token).masked_fill(impossible, -torch.inf).masked_fill(self.q.ended, 0.0)
        return token, torch.where(held, log_own, log_q)

    def stop(self) -> tuple[Tensor, Tensor, Tensor]:
        """The texts, ended here by the model's most probable stop token, with log p(stop)^scale and log q(stop).

        The texts have the shape of `value`, the logarithms (particle, *kept): -inf where a text cannot end, 0 where it
        has ended.
        """
        ended, stops = self.q.ended, self.model.texts.fn.stop
        if stops.numel():
            of_each = torch.stack([self.p.score(s.expand(len(ended))) for s in stops], 1)  # (row, stop)
            log_p, best = of_each.max(1)
            token = stops[best]
            log_q = log_p if self.p is self.q else self.q.score(token)
        else:
            token = torch.full_like(self.q.ended, text.PAD, dtype=torch.long)
            log_p = log_q = torch.full(token.shape, -torch.inf, device=token.device)
        value = torch.cat([self.q.prefix, token.masked_fill(ended, text.PAD)[:, None]], 1)
        value = value[:, : self.width]  # without a stop there is one column of padding too many
        log_p, log_q = log_p.masked_fill(ended, 0.0), log_q.masked_fill(ended, 0.0)
        return (
            text.pad(value, self.width).view(*self.shape, -1),
            self.model.of_site(log_p, self.plates),
            self.guide.of_site(log_q, self.plates, scaled=False),
        )

    def select(self, chosen: Tensor) -> None:
        """Replaces particle n by particle ``chosen[n]``, (particle, *kept)."""
        rows = torch.arange(self.shape.numel(), device=chosen.device).view(self.shape)
        index = self.plates.take(rows, chosen).flatten()
        self.q.select(index)
        if self.p is not self.q:
            self.p.select(index)
        if self.log_psi is not None:
            self.log_psi = self.log_psi.gather(0, chosen)
        self.model, self.guide = (term.take(chosen, self.plates) for term in (self.model, self.guide))

    def _ratio(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_ratio(self.model.of_site(log_p, self.plates), self.guide.of_site(log_q, self.plates, scaled=False))


@dataclass(frozen=True)
class Term:
    """Turns the log-probabilities of a site's texts into a term of the weights, with the site's masks and scale."""

    node: Node
    texts: Site
    mask: Any  # which texts count; broadcasts with their shape; None: all

    @classmethod
    def of(cls, node: Node) -> Term:
        texts = text_of(node["fn"])
        if texts is None or not texts.stepwise:
            raise SiteMismatch(f"guide: site {node['name']!r} is drawn token by token, but not in the model")
        return cls({**node, "mask": None}, texts, texts.there(node["mask"]))

    def of_site(self, log_prob: Tensor, plates: Plates, *, scaled: bool = True) -> Tensor:
        """The term (particle, *kept) of log-probabilities (row,)."""
        each = scale_and_mask(log_prob.view(1, *self.texts.shape), 1.0, self.mask)
        return term(self.node, plates, self.texts.total(each), scaled=scaled)[0]

    def take(self, chosen: Tensor, plates: Plates) -> Term:
        shape = self.texts.shape
        batch = shape[: len(shape) - self.texts.stacked]

        def moved(x: Any, shape: torch.Size) -> Any:
            same = not isinstance(x, Tensor) or x.dim() < len(shape)  # the same for all particles
            return x if same else plates.take(x.expand(shape), chosen)

        return replace(
            self, node={**self.node, "scale": moved(self.node["scale"], batch)}, mask=moved(self.mask, shape)
        )
