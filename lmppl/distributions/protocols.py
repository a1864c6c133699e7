"""What a distribution over texts may promise; inference asks for these promises and never for a class.

A text is a LongTensor (..., L) of token ids, padded on the right with PAD (`lmppl.text`).  A distribution of one's own,
a `pyro.distributions.TorchDistribution`, keeps one promise or several and is then treated as `Completion` is, under any
`.mask`, `.to_event`, `.expand` and plate:

==============  ==============================================================================================
`Text`          is decoded in tables and strings
`Stepwise`      grows in SMC token by token, is regrown by Metropolis, is enumerated by the search of its tree
`Terminable`    gives the objectives its stopped prefixes, and the guide's flow
==============  ==============================================================================================

`lmppl.testing.TextContract` tests them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class PrefixScores(NamedTuple):
    """What one pass over a value says of all its prefixes; both (..., W), a column for each length from 0 on."""

    log_probs: Tensor  # column t: log p(z_1..z_t stop), with the value's own stop; -inf where it cannot stop
    stop_log_probs: Tensor  # column t: log p(that stop | z_1..z_t); 0 where a stop string has ended the text


@runtime_checkable
class Text(Protocol):
    """A distribution over texts: ``event_shape`` is (L,), with room for the stop.

    A ``stop_strings`` that is not None (`lmppl.stop_strings.StopStrings`) ends texts as well, where there is one; so do
    the bounds ``min_tokens`` of the tokens before a stop.  ``lm``, where there is one, encodes strings.
    """

    @property
    def batch_shape(self) -> torch.Size: ...

    @property
    def event_shape(self) -> torch.Size: ...

    @property
    def stop(self) -> Tensor:
        """LongTensor (S,): the tokens of which any ends a text; empty where texts have no stop."""

    def decode(self, value: Tensor) -> Any:
        """Texts (..., L) as strings, nested lists of the leading axes."""

    def log_prob(self, value: Tensor) -> Tensor:
        """(..., L) -> (...), broadcast with the batch; -inf for a text that is impossible."""


@runtime_checkable
class Terminable(Text, Protocol):
    """A text all of whose stopped prefixes are scored in one pass."""

    def prefix_scores(self, value: Tensor) -> PrefixScores:
        """Of texts (..., L), with gradient: (..., W), W at least one more than the tokens before a stop."""


@runtime_checkable
class Stepwise(Text, Protocol):
    """A text that is drawn token by token."""

    @property
    def vocab_size(self) -> int: ...

    def token_steps(self, shape: torch.Size, share: Any = None) -> Steps:
        """Unfinished texts, one a row of the flattened ``shape``, with which the batch broadcasts.

        ``share``: steps of another distribution that are given the same tokens and orders of rows as these, before or
        after them, between one draw or score and the next; what both compute may be computed once, and need not be.
        """


class Steps(Protocol):
    r"""Unfinished texts, R rows.

    Where the log-probabilities of all tokens are at hand, ``log_probs()`` returns them, (R, V), unspecified in rows
    that have ended: `score` for each of many tokens would take as many calls.

    Where tokens may be inserted by a tool, ``inserting``, a BoolTensor (R,), says in which rows the next one is.  Where
    weighted draws are cheaper than log-probabilities, ``propose(uniform)`` draws from the same distribution as `draw`,
    and returns in place of log p(v) a log q whose inverse has the right mean,

    .. math:: E[1 / q \mid v] = 1 / p(v), \qquad E[r(v) / q] = \sum_{v : p(v) > 0} r(v) \text{ for every } r

    so that log r(v) - log q is the log increment of a proper weight, whatever is weighed.  `draw` is the case without
    noise.  Nothing else may be made of q: neither a power of it nor its logarithm has the right mean.
    """

    prefix: Tensor  # (R, t) the tokens so far, PAD behind an end
    ended: Tensor  # BoolTensor (R,)

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's next token v and log p(v), which is what `score` says of it, both (R,), from one uniform number.

        PAD and 0 in rows that have ended; PAD and -inf where nothing can follow, not even a stop.
        """

    def score(self, tokens: Tensor) -> Tensor:
        """The log-probability that ``tokens`` (R,) come next, (R,); unspecified in rows that have ended."""

    def append(self, tokens: Tensor) -> None:
        """Append tokens (R,), PAD in rows that have ended or end here without a stop."""

    def select(self, index: Tensor) -> None:
        """Row r becomes row ``index[r]``; there may be more or fewer of them than before."""
