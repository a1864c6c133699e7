"""The capabilities that a distribution over texts may have. Inference asks for these and never for a class.

A text is a LongTensor (..., L) of token ids, padded on the right with PAD (`lmppl.text`). Your own distribution is a
`pyro.distributions.TorchDistribution` with one or more of these capabilities. Inference then treats it as it treats
`Completion`, under any ``.mask``, ``.to_event``, ``.expand`` and plate:

==============  ==============================================================================================
`Text`          tables and strings show it decoded
`Stepwise`      SMC grows it token by token, Metropolis-Hastings regrows it, enumeration searches its tree
`Terminable`    objectives score its stopped prefixes, and its stop probabilities give the guide's flow
==============  ==============================================================================================

`lmppl.testing.TextContract` tests them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class PrefixScores(NamedTuple):
    """The scores of all prefixes of a value, from one pass; both are (..., W), column t for prefixes of t tokens."""

    log_probs: Tensor  # column t: log p(z_1..z_t stop), with the value's own stop; -inf where the text cannot stop
    stop_log_probs: Tensor  # column t: log p(that stop | z_1..z_t); 0 where a stop string has ended the text


@runtime_checkable
class Text(Protocol):
    """A distribution over texts; ``event_shape`` is (L,), with room for the stop.

    Optional attributes: ``stop_strings`` (`lmppl.stop_strings.StopStrings` or None), strings that also end texts;
    ``min_tokens``, the smallest number of tokens before a stop; ``lm``, which encodes strings.
    """

    @property
    def batch_shape(self) -> torch.Size:
        """As in torch: the shape of independent elements."""

    @property
    def event_shape(self) -> torch.Size:
        """As in torch: the shape of one value, (L,)."""

    @property
    def stop(self) -> Tensor:
        """LongTensor (S,): the tokens each of which ends a text; empty if texts have no stop."""

    def decode(self, value: Tensor) -> Any:
        """Returns texts (..., L) as strings, or nested lists of strings with the shape of the leading axes."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p of texts (..., L), broadcast with the batch, (...); -inf for a text that is impossible."""


@runtime_checkable
class Terminable(Text, Protocol):
    """A text whose stopped prefixes are all scored in one pass."""

    def prefix_scores(self, value: Tensor) -> PrefixScores:
        """Returns the scores of texts (..., L), with gradient: (..., W).

        W is larger than the number of tokens before the stop by at least one.
        """


@runtime_checkable
class Stepwise(Text, Protocol):
    """A text that is drawn token by token."""

    @property
    def vocab_size(self) -> int:
        """The number V of tokens."""

    def token_steps(self, shape: torch.Size, share: Any = None) -> Steps:
        """Returns unfinished texts, one for each row of the flattened ``shape``, with which the batch broadcasts.

        ``share`` are steps of another distribution that receive the same tokens and the same reordering of rows as
        these, before or after them, between one draw or score and the next. What both compute may be computed once.
        """


class Steps(Protocol):
    r"""Unfinished texts, R rows.

    Optional members:

    - ``log_probs()`` returns the log-probabilities of all tokens, (R, V), unspecified in rows that have ended. It saves
      a call of `score` for each token.
    - ``inserting``, BoolTensor (R,), says in which rows a tool inserts the next token.
    - ``propose(uniform)`` draws from the same distribution as `draw`, and is cheaper where log-probabilities are
      expensive. In place of log p(v) it returns a random log q with

      .. math:: E[1 / q \mid v] = 1 / p(v), \qquad E[r(v) / q] = \sum_{v : p(v) > 0} r(v) \text{ for every } r

      So log r(v) - log q is the log increment of a proper weight, for any r. Use q for nothing else: neither its powers
      nor its logarithm have the right mean. `draw` is the case without noise.
    """

    prefix: Tensor  # (R, t) the tokens so far, PAD after an end
    ended: Tensor  # BoolTensor (R,)

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the next token v of each row and log p(v), both (R,), from one uniform number for each row.

        log p(v) is what `score` returns for v. PAD and 0 in rows that have ended; PAD and -inf in rows where nothing
        can follow, not even a stop.
        """

    def score(self, tokens: Tensor) -> Tensor:
        """Returns the log-probability that ``tokens`` (R,) come next, (R,); unspecified in rows that have ended."""

    def append(self, tokens: Tensor) -> None:
        """Appends tokens (R,), PAD in rows that have ended or that end here without a stop."""

    def select(self, index: Tensor) -> None:
        """Replaces row r by row ``index[r]``; the number of rows may change."""
