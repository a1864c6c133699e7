"""`AutoregressiveText`: a distribution over texts that one function of your own defines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import text
from ..shapes import broadcast_shapes
from ..text import PAD
from .protocols import PrefixScores
from .stepped import SteppedText
from .token_steps import draw


class AutoregressiveText(SteppedText):
    r"""A distribution over texts defined by one function, `next_logits`, which a subclass writes.

    .. math:: p(z) = \prod_t \mathrm{softmax}(\text{next\_logits}(z_1 \dots z_{t-1}))_{z_t}

    It has all capabilities in `lmppl.distributions.protocols`: inference treats it as it treats `Completion`. The
    function is called once for each column of a value. If your distribution carries a state from token to token,
    override `token_steps` instead.

    :param vocabulary: the string of each of the V tokens; "" for tokens that `decode` leaves out.
    :param batch_shape: the shape of the batch. Elements are numbered with the last axis varying fastest.
    :param max_tokens: the largest number of tokens before a stop. After that many tokens a stop is certain.
    :param stop: the token id, or several, that end a text; None: every text has ``max_tokens`` tokens and no stop.
    :param device: the device of samples.
    :raises ValueError: if ``stop`` is no id of the vocabulary, or ``max_tokens`` is too small.

    Shapes: ``event_shape`` is ``(max_tokens + 1,)``, or ``(max_tokens,)`` without a stop.

    Example::

        class Letters(AutoregressiveText):  # "a" twice as often as "b"; a stop with probability 1/2
            def next_logits(self, prefix, element):
                return torch.tensor([1 / 2, 1 / 3, 1 / 6]).log().expand(len(prefix), 3)

        letters = Letters(["", "a", "b"], max_tokens=5, stop=0)
        letters.decode(letters.sample((10,)))
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        batch_shape: Sequence[int] = (),
        *,
        max_tokens: int,
        stop: int | Sequence[int] | None,
        device: torch.device | str | None = None,
    ):
        ids = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
        if any(not 0 <= s < len(vocabulary) for s in ids) or (stop is not None and not ids):
            raise ValueError(f"stop: expected token ids in 0..{len(vocabulary) - 1}, or None; got {stop!r}")
        if max_tokens < (0 if ids else 1):
            raise ValueError(f"max_tokens: must be at least {0 if ids else 1}, got {max_tokens}")
        self.vocabulary, self.longest = list(vocabulary), max_tokens
        self.stop = torch.tensor(ids, dtype=torch.long, device=device)
        super().__init__(torch.Size(batch_shape), torch.Size([max_tokens + bool(ids)]), validate_args=False)

    def next_logits(self, prefix: Tensor, element: Tensor) -> Tensor:
        """Returns the logits of the next token of unfinished texts, (R, V), -inf for tokens that cannot come.

        :param prefix: LongTensor (R, t), the tokens so far, without padding.
        :param element: LongTensor (R,), the number of the batch element of each text.
        :returns: (R, V); they need not be normalised.

        Example::

            class Coins(AutoregressiveText):
                def next_logits(self, prefix, element):
                    return torch.zeros(len(prefix), 2)

            Coins(["head", "tail"], max_tokens=3, stop=None).sample()
        """
        raise NotImplementedError(f"{type(self).__name__} has to define next_logits(prefix, element)")

    @property
    def vocab_size(self) -> int:
        """The number V of tokens."""
        return len(self.vocabulary)

    def decode(self, value: Tensor) -> Any:
        """Returns texts as strings: the strings of their tokens, joined.

        :param value: texts (..., L).
        :returns: a string, or nested lists of strings with the shape of the leading axes.

        >>> AutoregressiveText(["", "a", "b"], max_tokens=5, stop=0).decode(torch.tensor([1, 2, 0]))
        'ab'
        """
        if value.dim() > 1:
            return [self.decode(v) for v in value]
        return "".join(self.vocabulary[t] for t in value.tolist() if t != PAD)

    def token_steps(self, shape: torch.Size | None = None, share: Any = None) -> AutoregressiveSteps:
        """Returns unfinished texts that grow token by token; see `protocols.Steps`.

        :param shape: the shape of the texts, with which the batch broadcasts; None: the batch.
        :param share: ignored.
        :returns: `AutoregressiveSteps`.
        """
        shape = self.batch_shape if shape is None else torch.Size(shape)
        element = torch.arange(self.batch_shape.numel(), device=self.stop.device).view(self.batch_shape)
        return AutoregressiveSteps(self, element.expand(shape).reshape(-1))

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value), with gradient to whatever `next_logits` depends on.

        :param value: texts (..., L); leading axes broadcast with the batch.
        :returns: log-probabilities (..., *batch_shape); -inf for a text that is impossible.
        :raises ValueError: for a malformed text.
        """
        return self._scores(value)[0]

    def prefix_scores(self, value: Tensor) -> PrefixScores:
        """Returns the log-probability of every prefix of a value with a stop after it, and of stopping there.

        See `Completion.prefix_scores`.

        :param value: texts (..., L); leading axes broadcast with the batch.
        :returns: a named tuple of ``log_probs``, log p(z_1..z_t stop), and ``stop_log_probs``, log p(stop | z_1..z_t);
            both (..., *batch_shape, W), column t for prefixes of t tokens.
        :raises ValueError: for a malformed text.
        """
        return PrefixScores(*self._scores(value)[1:])

    def _scores(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns log p of texts (..., L), and their prefix scores (..., W), where W is the event's width."""
        text.validate(value, "value", self.vocab_size)
        width, shape = self.event_shape[0], broadcast_shapes(value.shape[:-1], self.batch_shape)
        too_long = (value[..., width:] != PAD).any(-1).expand(shape)
        rows = text.pad(value[..., :width], width).expand(*shape, width).reshape(-1, width)
        is_stop = torch.isin(rows, self.stop)
        first = is_stop.int().argmax(1, keepdim=True)
        own = torch.where(is_stop.any(1), rows.gather(1, first)[:, 0], self.stop[0]) if len(self.stop) else None
        steps, before, columns = self.token_steps(shape), torch.zeros(len(rows), device=rows.device), []
        for token in rows.unbind(1):
            if own is not None:
                stop = steps.score(own)
                columns.append(torch.stack([before + stop, stop]).masked_fill(steps.ended, -torch.inf))
            fits = (token == PAD) == steps.ended
            before = (before + steps.score(token).masked_fill(steps.ended, 0.0)).masked_fill(~fits, -torch.inf)
            steps.append(token.masked_fill(steps.ended, PAD))
        never = before.new_full((2, len(rows), width + 1), -torch.inf)  # without a stop
        by_prefix, stops = (torch.stack(columns, 2) if columns else never).view(2, *shape, -1)
        return before.view(shape).masked_fill(too_long, -torch.inf), by_prefix, stops


class AutoregressiveSteps:
    """Unfinished texts of an `AutoregressiveText`, one in each row: `protocols.Steps`."""

    def __init__(self, fn: AutoregressiveText, element: Tensor):
        self.fn, self.element = fn, element
        self.prefix = element.new_empty(len(element), 0)
        self.ended = torch.zeros_like(element, dtype=torch.bool)
        self._next: Tensor | None = None

    def log_probs(self) -> Tensor:
        """Returns the log-probabilities of the next token, (R, V): all -inf if no token can follow, 0 in ended rows."""
        if self._next is None:
            rows, V = len(self.ended), self.fn.vocab_size
            live = (~self.ended).nonzero()[:, 0]
            if not len(live):
                return torch.zeros(rows, V, device=self.ended.device)
            logits = self.fn.next_logits(self.prefix[live], self.element[live])
            if logits.shape != (len(live), V):
                raise ValueError(f"next_logits: expected logits {(len(live), V)}, got {tuple(logits.shape)}")
            if len(self.fn.stop) and self.prefix.shape[1] == self.fn.longest:
                other = torch.ones(V, dtype=torch.bool, device=logits.device)
                other[self.fn.stop] = False
                logits = logits.masked_fill(other, -torch.inf)
            dead = (logits == -torch.inf).all(1, keepdim=True)
            log_p = logits.masked_fill(dead, 0.0).log_softmax(1).masked_fill(dead, -torch.inf)
            self._next = log_p.new_zeros(rows, V).index_copy(0, live, log_p)
        return self._next

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        log_p = self.log_probs()
        token = draw(log_p, uniform)
        log_prob = log_p.gather(1, token[:, None])[:, 0]
        token = token.masked_fill(log_prob == -torch.inf, PAD)
        return token.masked_fill(self.ended, PAD), log_prob.masked_fill(self.ended, 0.0)

    def score(self, tokens: Tensor) -> Tensor:
        return self.log_probs().gather(1, tokens.clamp(min=0)[:, None])[:, 0]

    def append(self, tokens: Tensor) -> None:
        self.prefix, self._next = torch.cat([self.prefix, tokens[:, None]], 1), None
        self.ended = self.ended | torch.isin(tokens, self.fn.stop) | (tokens == PAD)
        if not len(self.fn.stop) and self.prefix.shape[1] == self.fn.longest:
            self.ended = torch.ones_like(self.ended)

    def select(self, index: Tensor) -> None:
        self.prefix, self.ended, self.element = self.prefix[index], self.ended[index], self.element[index]
        self._next = None if self._next is None else self._next[index]
