"""The rules of a completion: which token may come next, and the renormalised log-probabilities under them.

    log p(v | prefix) = log softmax over permitted v of logits[v] / temperature
    (with epsilon > 0, log of (1 - epsilon) times that softmax + epsilon / number of permitted tokens)

Before ``min_tokens``, a stop token is forbidden, and so is a token that completes a stop string. After ``max_tokens``,
only stop tokens are permitted; they keep their relative probabilities. Forbidden tokens get exactly -inf. Up to
``max_tokens``, a token that a tool inserts is certain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import text
from ..constraints import Constraint, allowed_at
from ..engine.again import refuse_second_derivative
from ..engine.tuning import TUNING
from ..stop_strings import Stops, StopStrings
from .insertions import Insertions


@dataclass(frozen=True)
class Rules:
    """The rules of R rows; every tensor with one number for each row is 0-d (shared by all rows) or (R,)."""

    stop: Tensor  # (k,) stop token ids; empty: the text has exactly max_tokens tokens, if no stop string ends it
    max_tokens: Tensor
    min_tokens: Tensor
    temperature: Tensor
    allowed: Constraint | None
    vocab_size: int
    epsilon: Tensor  # the probability with which each token is drawn evenly from the permitted ones
    insertions: Insertions | None = None
    strings: StopStrings | None = None

    def select(self, rows: Tensor) -> Rules:
        """Returns the rules of these rows."""
        if self._shared:
            return self

        def pick(x: Tensor) -> Tensor:
            return x[rows] if x.dim() else x

        return replace(
            self,
            max_tokens=pick(self.max_tokens),
            min_tokens=pick(self.min_tokens),
            temperature=pick(self.temperature),
            epsilon=pick(self.epsilon),
        )

    def columns(self) -> Tensor | None:
        """Returns what may differ between rows as integers (R, K), or (1, 0) if nothing does.

        None if rows cannot be compared: equal temperatures with gradients still belong to different rows.
        """
        per_row = [x for x in (self.max_tokens, self.min_tokens, self.temperature, self.epsilon) if x.dim()]
        if any(x.requires_grad for x in per_row):
            return None
        bits = [x.double().view(torch.int64) if x.is_floating_point() else x.long() for x in per_row]
        return torch.stack(bits, 1) if bits else self.stop.new_empty(1, 0)

    def within(self, allowed: Constraint | None) -> Rules:
        """Returns the same rules with another constraint."""
        return replace(self, allowed=allowed)

    @property
    def stops(self) -> Stops:
        """Everything that ends a text."""
        return Stops(self.stop, self.strings)

    def is_stop(self, tokens: Tensor) -> Tensor:
        """Returns whether each token is a stop token."""
        return torch.isin(tokens, self.stop)

    def forced(self, t: int) -> bool:
        """Returns whether the token after ``t`` others is certain in every row, so that no logits are needed."""
        return self.stop.numel() == 1 and t >= self._limits[1]

    def log_probs(self, logits: Tensor, prefix: Tensor, first: int = 0) -> Tensor:
        """Returns normalised log-probabilities (R, T, V) of the T tokens from ``first`` on.

        Arguments as for `permitted`.
        """
        logits, dead = self.permitted(logits, prefix, first)
        log_probs = logits.log_softmax(-1)
        return log_probs if dead is None else log_probs.masked_fill(dead, -torch.inf)

    def selected(self, logits: Tensor, tokens: Tensor, prefix: Tensor, first: int = 0) -> Tensor:
        """Returns `log_probs` of ``tokens`` (R, T, k) alone, without forming those of the other tokens, (R, T, k)."""
        runs = self.runs(first, logits.shape[1])
        if runs is not None and not self.tempered and not self.broad:
            found = [selected_log_softmax(logits[:, a:b], tokens[:, a:b], barrier) for a, b, barrier in runs]
            return torch.cat(found, 1) if len(found) > 1 else found[0]
        logits, dead = self.permitted(logits, prefix, first)
        log_probs = selected_log_softmax(logits, tokens)
        return log_probs if dead is None else log_probs.masked_fill(dead, -torch.inf)

    def permitted(self, logits: Tensor, prefix: Tensor, first: int = 0) -> tuple[Tensor, Tensor | None]:
        """Returns the logits at this temperature, -inf at forbidden tokens.

        Also returns where no token is permitted, BoolTensor (R, T, 1), or None if that is nowhere.

        ``logits`` (R, T, V). ``prefix`` (R, >= first+T-1) holds the tokens drawn so far; only constraints and tools
        read it. An inserted token has logit 0, all others -inf.
        """
        T = logits.shape[1]
        if self.tempered:
            logits = logits / (self.temperature[:, None, None] if self.temperature.dim() else self.temperature)
        if T == 1 and self._constant(first):
            barrier, dead, _ = self._known(first)
            logits = logits if barrier is None else logits + barrier  # several times faster than torch.where
        else:
            barred, dead = self._barred(T, prefix, first)
            logits = logits if barred is None else torch.where(barred, -torch.inf, logits)
        logits = self._mixed(logits) if self.broad else logits
        return (logits, dead) if self.insertions is None else self._with_inserted(logits, dead, prefix, first)

    @cached_property
    def _shared(self) -> bool:
        """Whether all rows have the same rules."""
        return not any(x.dim() for x in (self.max_tokens, self.min_tokens, self.temperature, self.epsilon))

    @cached_property
    def _limits(self) -> tuple[int, int]:
        """The largest ``min_tokens`` and ``max_tokens`` of any row."""
        return int(self.min_tokens.max()), int(self.max_tokens.max())

    @cached_property
    def tempered(self) -> bool:
        """Whether some temperature is not 1, or has a gradient."""
        return self.temperature.requires_grad or not bool((self.temperature == 1).all())

    @cached_property
    def broad(self) -> bool:
        """Whether some epsilon is positive."""
        return bool(self.epsilon.any())

    def _constant(self, t: int) -> bool:
        """Returns whether the limits alone decide what may follow ``t`` tokens, in every row alike."""
        if not self._shared or (self.strings is not None and t < self._limits[0]):
            return False
        return self.allowed is None or isinstance(self.allowed, Tensor)

    @cached_property
    def _cases(self) -> dict[tuple[bool, bool], tuple[Tensor | None, Tensor | None, tuple[Rules, Tensor] | None]]:
        return {}

    def _known(self, t: int) -> tuple[Tensor | None, Tensor | None, tuple[Rules, Tensor] | None]:
        """Returns the barrier after ``t`` tokens, the second result of `_barred`, and the result of `narrowed`.

        Only for constant rules. The barrier is -inf at forbidden tokens and 0 elsewhere. Computed once for each case.
        """
        case = (t < self._limits[0], t >= self._limits[1])
        if case not in self._cases:
            barred, dead = self._barred(1, self.stop[None, :0], t)
            barrier = few = None
            if barred is not None:
                barrier = torch.zeros(barred.shape, device=barred.device).masked_fill_(barred, -torch.inf)
                tokens = (~barred.flatten()).nonzero()[:, 0]
                if dead is None and self.insertions is None and len(tokens) < TUNING.few_permitted * self.vocab_size:
                    few = replace(self, stop=self.stop[:0], strings=None, allowed=None, vocab_size=len(tokens)), tokens
            self._cases[case] = barrier, dead, few
        return self._cases[case]

    def runs(self, first: int, T: int) -> list[tuple[int, int, Tensor | None]] | None:
        """Splits T columns from ``first`` on into runs a..b in which the same tokens are forbidden: (a, b, barrier).

        The barrier (V,) is -inf at forbidden tokens and 0 elsewhere; None if no token is forbidden. Returns None if
        rows differ, a tool may write, or some column permits no token.
        """
        if self.insertions is not None or not T or not self._constant(first):
            return None
        cuts = sorted({0, T} | {t - first for t in self._limits if first < t < first + T})
        found = [(a, b, *self._known(first + a)[:2]) for a, b in pairwise(cuts)]
        if any(dead is not None for *_, dead in found):
            return None
        return [(a, b, None if barrier is None else barrier.flatten()) for a, b, barrier, _ in found]

    def narrowed(self, t: int) -> tuple[Rules, Tensor] | None:
        """Returns the rules after ``t`` tokens restricted to the permitted tokens (k,), and these tokens.

        None if rows differ, a tool may write, or most of the vocabulary is permitted.
        """
        return self._known(t)[2] if self._constant(t) else None

    def _barred(self, T: int, prefix: Tensor, first: int) -> tuple[Tensor | None, Tensor | None]:
        """Returns which tokens get -inf, (R, T, V), and where no token is permitted, (R, T, 1); None for "nowhere".

        Both broadcast. Where no token is permitted, none gets -inf: the softmax there, and its gradient, would be NaN.
        """
        forbidden = self._forbidden(T, prefix, first)
        if forbidden is None:
            return None, None
        dead = forbidden.all(-1, keepdim=True)
        return (forbidden & ~dead, dead) if bool(dead.any()) else (forbidden, None)

    def _with_inserted(
        self, logits: Tensor, dead: Tensor | None, prefix: Tensor, first: int
    ) -> tuple[Tensor, Tensor | None]:
        inserted = self.inserted(prefix, first, logits.shape[1])
        at = inserted != text.PAD  # (R, T)
        if not bool(at.any()):
            return logits, dead
        certain = logits.new_full((int(at.sum()), self.vocab_size), -torch.inf)
        logits = logits.index_put((at,), certain.scatter(1, inserted[at][:, None], 0.0))
        return logits, dead & ~at[..., None] if dead is not None else None

    def inserted(self, prefix: Tensor, first: int, T: int) -> Tensor:
        """Returns the tokens that tools insert at ``first .. first+T-1``, (R, T), PAD where there is none."""
        if self.insertions is None:
            return prefix.new_full((len(prefix), T), text.PAD)
        inserted = self.insertions(prefix[:, : first + T - 1])[:, first:]
        if not self.stop.numel():
            return inserted
        t = torch.arange(first, first + T, device=prefix.device)
        limit = self.max_tokens[:, None] if self.max_tokens.dim() else self.max_tokens
        return inserted.masked_fill(t >= limit, text.PAD)

    def _mixed(self, logits: Tensor) -> Tensor:
        """Returns log of (1 - epsilon) softmax + epsilon uniform, over the permitted tokens."""
        epsilon = self.epsilon[:, None, None] if self.epsilon.dim() else self.epsilon
        permitted = logits > -torch.inf
        even = (epsilon / permitted.sum(-1, keepdim=True)).log()
        log_probs = torch.where(permitted, logits.log_softmax(-1), 0.0)  # log(0 + 0) has no gradient
        mixed = torch.logaddexp(log_probs + torch.log1p(-epsilon), even)
        return torch.where(permitted, mixed, -torch.inf)

    def _forbidden(self, T: int, prefix: Tensor, first: int) -> Tensor | None:
        """Returns which tokens are forbidden, broadcasting to (R, T, V); None if every token is permitted."""
        forbidden = None
        if isinstance(self.allowed, Tensor):
            forbidden = ~self.allowed
        elif self.allowed is not None:
            over = self.stops.ends(prefix).cumsum(-1) > 0
            masks = [self._allowed_after(prefix[:, :t], over[:, t - 1 : t]) for t in range(first, first + T)]
            forbidden = ~torch.stack(masks, -2)
        t = torch.arange(first, first + T, device=self.stop.device)
        if self.strings is not None and first < self._limits[0]:
            early = (t < (self.min_tokens[:, None] if self.min_tokens.dim() else self.min_tokens))[..., None]
            completing = self.strings.completing(self.strings.states(prefix[:, : first + T - 1], first)) & early
            forbidden = completing if forbidden is None else forbidden | completing
        if not self.stop.numel():
            return forbidden
        per_row = [x[:, None] if x.dim() else x for x in (self.min_tokens, self.max_tokens)]
        too_early, too_late = t < per_row[0], t >= per_row[1]  # (T,) or (R, T)
        stops = self._stops
        if bool(too_early.any()):
            early = stops & too_early[..., None]
            forbidden = early if forbidden is None else forbidden | early
        if bool(too_late.any()):
            if forbidden is None:
                return ~stops & too_late[..., None]
            # A stop is certain here: the constraint may forbid some of several stops, but never all.
            barred = ~stops | forbidden
            barred = torch.where(barred.all(-1, keepdim=True), ~stops, barred)
            forbidden = torch.where(too_late[..., None], barred, forbidden)
        return forbidden

    def _allowed_after(self, prefix: Tensor, over: Tensor) -> Tensor:
        """Returns the constraint's mask (R, V) after ``prefix`` (R, t).

        The constraint is called only for texts that have not ended, i.e. that are not ``over``.
        """
        t = prefix.shape[1]
        asked = ~(over.any(-1) | (prefix == text.PAD).any(-1))
        if self.stop.numel() < 2:  # at the limit, the only stop is certain
            asked = asked & (t < self.max_tokens)
        assert self.allowed is not None
        if bool(asked.all()):
            return allowed_at(self.allowed, prefix, self.vocab_size).expand(len(prefix), -1)
        mask = torch.ones(len(prefix), self.vocab_size, dtype=torch.bool, device=prefix.device)
        if bool(asked.any()):
            mask[asked] = allowed_at(self.allowed, prefix[asked], self.vocab_size)
        return mask

    @property
    def _stops(self) -> Tensor:
        mask = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.stop.device)
        mask[self.stop] = True
        return mask


class Selection:
    """A head of `score`: the log-probabilities, under rules, of some tokens at every position.

    ``tokens`` (R, T, k); ``value`` (R, T) is the text that constraints and tools read.
    """

    def __init__(self, rules: Rules, tokens: Tensor, value: Tensor):
        self.rules, self.tokens, self.value = rules, tokens, value

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Returns log-probabilities (r, T, k) from the logits (r, T, V) of these rows (r,)."""
        return self.rules.select(rows).selected(logits, self.tokens[rows], self.value[rows])

    @cached_property
    def runs(self) -> list[tuple[int, int, Tensor | None]] | None:
        """`Rules.runs` if log-probabilities are those of a plain softmax over the permitted tokens; else None."""
        if self.rules.tempered or self.rules.broad:
            return None
        return self.rules.runs(0, self.tokens.shape[1])


def selected_log_softmax(logits: Tensor, index: Tensor, barrier: Tensor | None = None) -> Tensor:
    """Returns ``(logits + barrier).log_softmax(-1).gather(-1, index)``, (..., V) and (..., k) -> (..., k).

    With gradient, one tensor (..., V) is kept for the backward pass; else none. ``barrier`` (V,) is -inf at forbidden
    tokens and 0 elsewhere.
    """
    if has_torch_function((logits, index)):  # e.g. Pyro's tensors that record the sample sites they come from
        return handle_torch_function(selected_log_softmax, (logits, index), logits, index, barrier)
    if not (logits.requires_grad and torch.is_grad_enabled()):
        parts = logits.flatten(0, -2).split(max(1, TUNING.looked_at // logits.shape[-1]))
        indices = index.flatten(0, -2).split(len(parts[0]))
        found = [_behind(x, barrier).log_softmax(-1).gather(-1, i) for x, i in zip(parts, indices, strict=True)]
        return torch.cat(found).view(index.shape)
    result: Tensor = _SelectedLogSoftmax.apply(_behind(logits, barrier), index)
    return result


def _behind(logits: Tensor, barrier: Tensor | None) -> Tensor:
    return logits if barrier is None else logits + barrier


class _SelectedLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1)
        ctx.save_for_backward(log_probs, index)
        return log_probs.gather(-1, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative()
        log_probs, index = ctx.saved_tensors
        # d log p_i / d logit_v = [v = i] - p_v
        result = log_probs.exp().mul_(-grad.sum(-1, keepdim=True))
        return result.scatter_add_(-1, index, grad), None
