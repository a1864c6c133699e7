"""Token steps: many texts of one distribution, grown token by token. Sampling and SMC share them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import text
from ..engine.chunks import drawn_from
from ..engine.recomputing import decoder
from ..language_model import LanguageModel
from .protocols import Steps
from .rules import Rules


class DeadEnd(ValueError):
    """The error that a constraint leaves no token to continue with.

    `Completion.sample` raises it. `Importance` and `SMC` do not: they go on and give such a draw weight zero.

    >>> issubclass(DeadEnd, ValueError)
    True
    """

    @classmethod
    def after(cls, lm: LanguageModel, prefix: Tensor) -> DeadEnd:
        """Returns the error whose message shows the prefix.

        :param lm: the language model that decodes it.
        :param prefix: text (L,).
        :returns: a `DeadEnd`.

        >>> error = DeadEnd.after(lm, lm.encode("abc"))
        >>> "'abc'" in str(error)
        True
        """
        return cls(
            f"allowed: the constraint permits no token after {lm.decode(prefix)!r} (tokens "
            f"{prefix[prefix != text.PAD].tolist()}); permit a stop there, or forbid what leads there. Importance and "
            "SMC do not raise: such a draw gets weight zero"
        )


class TokenSteps:
    """R unfinished texts: `draw` or `score` the next token, `append` one to each, `select` (reorder) the rows.

    ``contexts`` (U, Lc) are the distinct prompts, and ``index`` (R,) is the number of each row's prompt. ``share`` is
    another `TokenSteps` of the same network and prompts that receives the same tokens: logits are taken from it, so one
    pass serves proposal and target.
    """

    def __init__(
        self, lm: LanguageModel, contexts: Tensor, index: Tensor, rules: Rules, share: TokenSteps | None = None
    ):
        self.lm, self.rules = lm, rules
        self.prefix = index.new_empty(len(index), 0)  # (R, t): the tokens drawn so far
        self.ended = torch.zeros_like(index, dtype=torch.bool)
        self._state = torch.zeros_like(index)  # the state of the stop strings' automaton
        if not rules.stop.numel():
            self.ended = self.ended | (rules.max_tokens == 0)
        self.prompt: Tensor = contexts[index] if share is None else share.prompt  # (R, Lc)
        self._share = share
        self.alive = len(index) - int(self.ended.count_nonzero())  # the number of rows that have not ended
        self._pending: Tensor | None = None  # tokens appended but not yet sent through the network
        self._unread = 0  # how many of them are in rows that have not ended
        self._decoder = decoder(lm, contexts, index) if share is None else None

    def _logits(self) -> Tensor:
        if self._share is not None:
            assert self._share.prefix.shape == self.prefix.shape, "share: it was given other tokens"
            return self._share._logits()
        assert self._decoder is not None
        if self._pending is not None:
            self._decoder.step(self._pending.clamp(min=0), self._unread)
            self._pending = None
        return self._decoder.logits

    @property
    def inserting(self) -> Tensor:
        """BoolTensor (R,): whether the next token is one that a tool inserts."""
        return self.rules.inserted(self.prefix, self.prefix.shape[1], 1)[:, 0] != text.PAD

    def score(self, tokens: Tensor) -> Tensor:
        """Returns the log-probability that ``tokens`` (R,) come next, (R,); unspecified in rows that have ended."""
        if self.rules.forced(self.prefix.shape[1]):
            return torch.where(self.rules.is_stop(tokens), 0.0, -torch.inf)
        return self._in_parts(_scored, tokens.clamp(min=0))[0]

    def log_probs(self) -> Tensor:
        """Returns the log-probabilities of every next token, (R, V); unspecified in rows that have ended."""
        if self.rules.forced(self.prefix.shape[1]):
            certain = torch.full((self.rules.vocab_size,), -torch.inf, device=self.ended.device)
            return certain.index_fill(0, self.rules.stop, 0.0).expand(len(self.ended), -1)
        return self._in_parts(_all_scored)[0]

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the next token of every row and its log-probability, both (R,), from one uniform number for each row.

        PAD and 0 in rows that have ended. PAD and -inf in rows where a constraint allows nothing: `append` ends the
        text there, and it is impossible.
        """
        t = self.prefix.shape[1]
        if self.rules.forced(t):
            token = self.rules.stop.expand(len(self.ended))
            return token.masked_fill(self.ended, text.PAD), torch.zeros_like(uniform)
        token, log_prob = self._in_parts(_drawn, self.ended, uniform)
        return token, log_prob

    def propose(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a weighted draw, see `protocols.Steps`; here it is `draw`, because the log-probability is known."""
        return self.draw(uniform)

    def _in_parts(self, compute: Callable[..., tuple[Tensor, ...]], *each: Tensor) -> list[Tensor]:
        """Returns ``compute(rules, logits (r, V), prefix (r, t), *each (r, ...))``, some rows at a time."""
        logits = self._logits()
        at_once = drawn_from(self.lm)
        if len(logits) <= at_once:
            return list(compute(self.rules, logits, self.prefix, *each))
        rows = torch.arange(len(logits), device=logits.device)
        parts = zip(*(x.split(at_once) for x in (rows, logits, self.prefix, *each)), strict=True)
        found = [compute(self.rules.select(r), *others) for r, *others in parts]
        return [torch.cat(of_each) for of_each in zip(*found, strict=True)]

    def append(self, tokens: Tensor) -> None:
        """Appends ``tokens`` (R,), PAD in rows that have ended or end here without a stop.

        Several tokens for each row are possible, (R, T), if none of them is a stop.
        """
        tokens = tokens.reshape(len(tokens), -1)
        self.prefix = torch.cat([self.prefix, tokens], 1)
        if self._decoder is not None:
            self._pending, self._unread = tokens, self.alive * tokens.shape[1]
        if self.rules.stop.numel():
            self.ended = self.ended | self.rules.is_stop(tokens[:, -1]) | (tokens[:, -1] == text.PAD)
        else:
            self.ended = self.ended | (self.prefix.shape[1] >= self.rules.max_tokens) | (tokens[:, -1] == text.PAD)
        if self.rules.strings is not None:
            for token in tokens.unbind(1):
                self._state = self.rules.strings.after(self._state, token)
            self.ended = self.ended | self.rules.strings.final[self._state]
        self.alive = len(tokens) - int(self.ended.count_nonzero())

    def select(self, index: Tensor) -> None:
        """Replaces row r by row ``index[r]``."""
        self.prefix, self.ended, self.prompt = self.prefix[index], self.ended[index], self.prompt[index]
        self.alive = len(index) - int(self.ended.count_nonzero())
        self._state, self.rules = self._state[index], self.rules.select(index)
        if self._pending is not None:
            self._pending = self._pending[index]
            self._unread = int((self._pending != text.PAD).sum())
        if self._decoder is not None:
            self._decoder.select(index)


def _scored(rules: Rules, logits: Tensor, prefix: Tensor, tokens: Tensor) -> tuple[Tensor]:
    """`TokenSteps.score` for some rows, with their logits (r, V)."""
    return (rules.selected(logits[:, None], tokens[:, None, None], prefix, prefix.shape[1])[:, 0, 0],)


def _all_scored(rules: Rules, logits: Tensor, prefix: Tensor) -> tuple[Tensor]:
    """`TokenSteps.log_probs` for some rows, with their logits (r, V)."""
    return (rules.log_probs(logits[:, None], prefix, prefix.shape[1])[:, 0],)


def _drawn(rules: Rules, logits: Tensor, prefix: Tensor, ended: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """`TokenSteps.draw` for some rows, with their logits (r, V)."""
    t, tokens = prefix.shape[1], None
    if (narrowed := rules.narrowed(t)) is not None:
        rules, tokens = narrowed
        logits = logits.index_select(1, tokens)
    logits, dead = rules.permitted(logits[:, None], prefix, t)
    probs = logits[:, 0].softmax(-1)  # (r, V); one pass over the vocabulary fewer than with its logarithm
    token = invert(probs, uniform)
    log_prob = probs.gather(1, token[:, None])[:, 0].log()
    token = token if tokens is None else tokens[token]
    if dead is not None:
        token, log_prob = token.masked_fill(dead[:, 0, 0], text.PAD), log_prob.masked_fill(dead[:, 0, 0], -torch.inf)
    return token.masked_fill(ended, text.PAD), log_prob.masked_fill(ended, 0.0)


def draw(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """Returns inverse-CDF draws (R,) from rows of log-probabilities (R, V), with one uniform number (R,) for each row.

    A token of probability zero is never drawn. The draw of a row depends on its own numbers only.
    """
    return invert(log_probs.exp(), uniform)


def invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """`draw` from probabilities (R, V) that need not sum to 1."""
    cdf = probs.cumsum(-1)
    # u < 1 - 2^-23 keeps u * total below total after rounding, so that the index stays inside the vocabulary.
    at = uniform.clamp(max=1 - 2**-23).to(cdf.dtype)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, at, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


def next_log_probs(steps: Steps, vocab_size: int) -> Tensor:
    """Returns log p of every next token, (R, V), for any `protocols.Steps`."""
    if hasattr(steps, "log_probs"):
        found: Tensor = steps.log_probs()
        return found
    tokens = torch.arange(vocab_size, device=steps.prefix.device)
    return torch.stack([steps.score(v.expand(len(steps.ended))) for v in tokens], 1)
