"""One text site of all particles, grown token by token under the guide and weighed by the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ... import randomness, text
from ..partial import keep_first
from ..programs import Node, SiteMismatch
from ..weights import Plates, log_ratio, term


class Growth:
    r"""Unfinished texts of one site, (particle, *plate axes), drawn from the guide's site and scored by the model's.

    A token's log increment is :math:`scale \cdot \log p(token) - \log q(token)`, summed over the rows of a particle.  A
    text that has ended stays as it is, with increment 0; one that is impossible under the model gets -inf, and so does
    one that the guide can neither go on with nor stop, which ends there without a stop.  With
    ``retained`` texts by site (1, *plate axes, L), particle 0 gets its tokens from there: +inf where q has none of it.
    """

    def __init__(self, model: Node, guide: Node, plates: Plates, retained: Mapping[str, Tensor] | None = None):
        self.name: str = guide["name"]
        self.model, self.guide, self.plates = dict(model), dict(guide), plates
        self.shape: torch.Size = guide["fn"].batch_shape  # (particle, *plate axes)
        if model["fn"].batch_shape != self.shape:
            raise SiteMismatch(
                f"guide: site {self.name!r} has the batch shape {tuple(self.shape)}, the model's "
                f"{tuple(model['fn'].batch_shape)}"
            )
        self.width: int = guide["fn"].event_shape[0]
        self.q = guide["fn"].token_steps(self.shape)
        tempered = not bool(torch.as_tensor(guide["scale"]).eq(1).all())
        if retained is not None or (model is guide and tempered):  # an estimate of log q would not do
            self.q = self.q.exactly()
        # One and the same site proposes and is weighed: its steps serve as both.
        self.p = self.q if model is guide else model["fn"].token_steps(self.shape, share=self.q)
        self.log_psi: Tensor | None = None  # the twist's last (particle, *kept), where it is "stop" or "flow"
        self.retained: Tensor | None = None
        if retained is not None:
            nothing = torch.full((*self.shape, self.width), text.PAD, device=self.q.prefix.device)
            self.retained = keep_first(retained, self.name, guide["fn"], nothing).flatten(0, -2)  # (row, width)

    @property
    def done(self) -> bool:
        return not self.q.alive or self.q.prefix.shape[1] >= self.width

    @property
    def prefix(self) -> Tensor:
        """The texts so far, (particle, *plate axes, t)."""
        return self.q.prefix.view(*self.shape, -1)

    @property
    def value(self) -> Tensor:
        """The texts, padded to the guide's event: (particle, *plate axes, width)."""
        return text.pad(self.prefix, self.width)

    @property
    def inserting(self) -> Tensor:
        """Whether a tool is writing a text of the particle, (particle, *kept)."""
        rows = self.p.inserting | self.q.inserting
        return self.plates.reduce(rows.view(self.shape).double())[0] > 0

    def step(self) -> Tensor:
        """Draw a token for every text; the particles' log increments, (particle, *kept)."""
        p, q = self.p, self.q
        ended, gone = q.ended, p.ended  # gone, not ended: the text goes on after a stop of the model's
        token, log_q = q.draw(randomness.uniform(self.shape, device=ended.device).flatten())  # both (row,)
        if self.retained is not None:
            token, log_q = self._retain(token, log_q)
        log_p = log_q if p is q else p.score(token)
        q.append(token)
        if p is not q:
            p.append(token)
            dead = (token == text.PAD) & ~ended
            gone = gone | dead | (q.ended > p.ended)  # it has ended, but not for the model
            log_p = log_p.masked_fill(gone, -torch.inf).masked_fill(ended, 0.0)
        return self._ratio(log_p, log_q)

    def _retain(self, token: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """The same draws, but for the rows of particle 0."""
        assert self.retained is not None
        held = torch.arange(len(token), device=token.device) < self.shape[1:].numel()
        own = self.retained[:, self.q.prefix.shape[1]]
        token = torch.where(held, own.masked_fill(self.q.ended, text.PAD), token)
        impossible = (token == text.PAD) & ~self.q.ended
        log_own = self.q.score(token).masked_fill(impossible, -torch.inf).masked_fill(self.q.ended, 0.0)
        return token, torch.where(held, log_own, log_q)

    def stop(self) -> tuple[Tensor, Tensor, Tensor]:
        """The texts ended here by the model's likeliest stop (particle, *plate axes, width), with the logarithms of
        p(stop)^scale and q(stop), (particle, *kept): -inf where they cannot end, 0 where they have ended.
        """
        ended, stops = self.q.ended, self.p.rules.stop
        if stops.numel():
            of_each = torch.stack([self.p.score(s.expand(len(ended))) for s in stops], 1)  # (row, stop)
            log_p, best = of_each.max(1)
            token = stops[best]
            log_q = log_p if self.p is self.q else self.q.score(token)
        else:
            token = torch.full_like(self.q.ended, text.PAD, dtype=torch.long)
            log_p = log_q = torch.full(token.shape, -torch.inf)
        value = torch.cat([self.q.prefix, token.masked_fill(ended, text.PAD)[:, None]], 1)
        value = value[:, : self.width]  # without a stop, a column of padding too many
        log_p, log_q = log_p.masked_fill(ended, 0.0), log_q.masked_fill(ended, 0.0)
        return (
            text.pad(value, self.width).view(*self.shape, -1),
            self._term(self.model, log_p),
            self._term(self.guide, log_q, scaled=False),
        )

    def select(self, chosen: Tensor) -> None:
        """Particle n becomes particle ``chosen[n]``, (particle, *kept)."""
        rows = torch.arange(self.shape.numel(), device=chosen.device).view(self.shape)
        index = self.plates.take(rows, chosen).flatten()
        self.q.select(index)
        if self.p is not self.q:
            self.p.select(index)
        if self.log_psi is not None:
            self.log_psi = self.log_psi.gather(0, chosen)
        for node in (self.model, self.guide):
            for key in ("scale", "mask"):
                node[key] = self._take(node[key], chosen)

    def _take(self, x: Any, chosen: Tensor) -> Any:
        if not isinstance(x, Tensor) or x.dim() < len(self.shape):  # the same for all particles
            return x
        return self.plates.take(x.expand(self.shape), chosen)

    def _ratio(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_ratio(self._term(self.model, log_p), self._term(self.guide, log_q, scaled=False))

    def _term(self, node: Node, log_prob: Tensor, *, scaled: bool = True) -> Tensor:
        """The site's term (particle, *kept) for log-probabilities (row,)."""
        return term(node, self.plates, log_prob.view(1, *self.shape), scaled=scaled)[0]
