"""`UnmaskingSteps`: the paths of an `Unmasking`, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.denoising import ask
from ..rows import distinct_rows
from ..text import PAD

if TYPE_CHECKING:
    from .unmasking import Unmasking


class UnmaskingSteps:
    """Unfinished paths, one in each row: `protocols.Steps`.

    A step is one pass of the network; equal states are read once.
    """

    def __init__(self, fn: Unmasking, kind: Tensor):
        self.fn, self.kind = fn, kind
        self.prefix = kind.new_empty(len(kind), 0)
        self.state = fn.canvases[kind]  # (R, L)
        self.ended = fn.count[kind] == 0
        self._next: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def _law(self) -> tuple[Tensor, Tensor]:
        """Returns log p of every next symbol after each of K distinct states, (K, n, V).

        Also returns the number of each row's state, (R,).
        """
        if self._next is None:
            live = (~self.ended).nonzero()[:, 0]
            states, which = distinct_rows(torch.cat([self.state, self.kind[:, None]], 1)[live])

            def joint(states: Tensor, kind: Tensor, logits: Tensor, which: Tensor, rows: Tensor) -> Tensor:
                log_order, log_words = self.fn.law(states, kind, logits)
                return (log_order[..., None] + log_words)[which]

            log_p = ask(self.fn.lm, states[:, :-1], states[:, -1], joint)
            self._next = log_p, torch.zeros_like(self.kind).index_copy(0, live, which)
        return self._next

    def log_probs(self) -> Tensor:
        """Returns log p of every next symbol, (R, n V); unspecified in rows that have ended."""
        log_p, which = self._law()
        return log_p.flatten(1)[which]

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        if bool(self.ended.all()):
            return torch.full_like(self.kind, PAD), torch.zeros_like(uniform)
        log_p, which = self._law()
        p = log_p.exp().double()  # (K, n, V)
        hole, rest = _inverted(p.sum(-1)[which], uniform.double())
        word, _ = _inverted(p[which, hole], rest)
        log_prob = log_p[which, hole, word].masked_fill(self.ended, 0.0)
        return (hole * self.fn.lm.vocab_size + word).masked_fill(self.ended, PAD), log_prob

    def score(self, tokens: Tensor) -> Tensor:
        if bool(self.ended.all()):
            return torch.zeros(len(tokens), device=tokens.device)
        log_p, which = self._law()
        symbol, V = tokens.clamp(min=0), self.fn.lm.vocab_size
        return log_p[which, symbol // V, symbol % V]

    def append(self, tokens: Tensor) -> None:
        self.prefix, self._next = torch.cat([self.prefix, tokens[:, None]], 1), None
        self.state = after(self.fn, self.state, self.kind, tokens)
        self.ended = self.ended | (self.prefix.shape[1] >= self.fn.count[self.kind]) | (tokens == PAD)

    def select(self, index: Tensor) -> None:
        self.prefix, self.ended, self.kind = self.prefix[index], self.ended[index], self.kind[index]
        self.state = self.state[index]
        self._next = None if self._next is None else (self._next[0], self._next[1][index])


def after(d: Unmasking, state: Tensor, kind: Tensor, symbol: Tensor) -> Tensor:
    """Returns the texts (R, L) after one more step; PAD changes nothing."""
    at = d.holes[kind, symbol.clamp(min=0) // d.lm.vocab_size][:, None]
    word = torch.where(symbol == PAD, state.gather(1, at)[:, 0], symbol % d.lm.vocab_size)
    return state.scatter(1, at, word[:, None])


def _inverted(p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Returns inverse-CDF draws (R,) from weights (R, M), and the rest of each uniform number, again uniform."""
    cdf = p.cumsum(1)
    at = uniform.clamp(max=1 - 2**-23)[:, None] * cdf[:, -1:]
    drawn = torch.searchsorted(cdf, at, right=True).clamp(max=p.shape[1] - 1)
    own = p.gather(1, drawn)
    rest = (at - (cdf.gather(1, drawn) - own)) / own
    return drawn[:, 0], rest[:, 0].clamp(0, 1)
