r"""Insertions: the tokens that tools insert into a text, and where.

Let :math:`f(z_{<t})` be the tokens that the first tool with an answer inserts after :math:`z_{<t}`; the empty sequence
o if no tool has one. The tokens that are *pending* after a prefix follow by recursion:

.. math:: w(z_{\le t}) = \begin{cases}
        w_2 w_3 \dots & \text{if } w(z_{<t}) = w_1 w_2 \dots \text{ has two tokens or more, and } z_t = w_1 \\
        f(z_{\le t}) & \text{otherwise}
    \end{cases}, \qquad w(o) = f(o)

So tools are called wherever no insertion is under way. With :math:`w_1` the first pending token,

.. math:: p(z_t \mid z_{<t}) = \begin{cases}
        1[z_t = w_1] & \text{if } w(z_{<t}) \neq o \text{ and } t \le max\_tokens \\
        p_{LM}(z_t \mid z_{<t}) & \text{otherwise}
    \end{cases}

This is normalised, as any distribution of the next token is. It follows that

- an insertion adds exactly 0 to log p and no gradient. A text that disagrees with it has log p = -inf. Both hold in the
  model and in the guide, on-policy and replayed, because w depends on the text only;
- a prefix that ends inside an insertion cannot stop: ``stop_log_probs`` is -inf there;
- inserted tokens count towards ``max_tokens``. A stop is certain there, and what is still pending is cut off. An
  insertion may complete a stop string, which ends the text. ``min_tokens``, ``temperature``, exploration and
  constraints do not affect an insertion; after it, a constraint sees the whole text again;
- drawing costs no more than reading the inserted tokens, as for any other tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..constraints.masks import distinct
from ..language_model import LanguageModel
from ..stop_strings import StopStrings
from ..text import PAD
from ..tools import Tool

Tokens = tuple[int, ...]


class _Prefix(NamedTuple):
    """A prefix that has occurred: the tokens pending after it, and its continuations that have occurred."""

    pending: Tokens
    next: dict[int, _Prefix]


class Insertions:
    """The tokens that tools insert, stored in a tree of prefixes, so that tools are called once for each prefix.

    :raises ValueError: if a tool is not callable.
    """

    def __init__(self, lm: LanguageModel, tools: Iterable[Tool], stop: Tensor, strings: StopStrings | None = None):
        self.lm, self.tools, self.stops, self.strings = lm, tuple(tools), frozenset(stop.tolist()), strings
        if not all(callable(tool) for tool in self.tools):
            raise ValueError(f"tools: expected functions of the text so far, got {self.tools!r}")
        self._root: _Prefix | None = None

    def __call__(self, prefix: Tensor) -> Tensor:
        """Returns the token that must come after each prefix of texts (R, L): (R, L + 1), PAD where any token may come.

        Column t is for the first t tokens; it is PAD if the text has stopped by then.
        """
        if self.strings is not None:  # leave out what follows the end of a text
            over = self.strings.ends(prefix).cumsum(-1) > 0
            prefix = prefix.masked_fill(over, PAD)
        rows, index = distinct(prefix)
        width = prefix.shape[-1] + 1
        forced = [self._along(row) for row in rows.tolist()]
        padded = [row + [PAD] * (width - len(row)) for row in forced]
        return torch.tensor(padded, dtype=torch.long).view(len(rows), width).to(prefix.device)[index]

    def _along(self, row: list[int]) -> list[int]:
        if self._root is None:
            self._root = _Prefix(self._asked([]), {})
        at = self._root
        forced = [at.pending[0] if at.pending else PAD]
        for t, token in enumerate(row):
            if token == PAD or token in self.stops:
                break
            if token not in at.next:
                follows = len(at.pending) > 1 and at.pending[0] == token
                at.next[token] = _Prefix(at.pending[1:] if follows else self._asked(row[: t + 1]), {})
            at = at.next[token]
            forced.append(at.pending[0] if at.pending else PAD)
        return forced

    def _asked(self, prefix: list[int]) -> Tokens:
        """Returns f(prefix): the tokens that the first tool with an answer inserts."""
        asked = [tool for tool in self.tools if not prefix or self._may_answer(tool, prefix[-1])]
        if not asked:  # most prefixes return here and need not be decoded
            return ()
        text = self.lm.vocabulary.decode(prefix)
        for tool in (t for t in asked if text.endswith(_trigger(t))):
            output = tool(text)
            if not (output is None or isinstance(output, str)):
                raise ValueError(f"tools: {tool!r} returned {output!r} for {text!r}; expected a string or None")
            tokens = self._written(prefix, text, output) if output else ()
            if self.stops.intersection(tokens):
                raise ValueError(
                    f"tools: {tool!r} returned {output!r} for {text!r}, which contains a stop of this text"
                )
            if tokens:
                return tokens
        return ()

    def _may_answer(self, tool: Tool, last: int) -> bool:
        trigger, ending = _trigger(tool), self.lm.vocabulary.ending(last)
        return not trigger or not ending or trigger.endswith(ending)

    def _written(self, prefix: list[int], text: str, output: str) -> Tokens:
        """Returns the tokens that spell ``output`` after ``prefix``; () if the tokenizer cannot write it.

        For tokenizers that separate words, spaces are ignored in the comparison.
        """
        vocabulary = self.lm.vocabulary
        try:
            (tokens,) = vocabulary.encode([output])
        except ValueError:  # the vocabulary has no token for a word of it
            return ()
        spelled = vocabulary.decode([*prefix, *tokens])
        return tokens if spelled == text + output or _dense(spelled) == _dense(text + output) else ()


def _trigger(tool: Tool) -> str:
    """Returns the string with which a text must end for the tool to be called; "" if it is called for every text."""
    trigger = getattr(tool, "trigger", None)
    return trigger if isinstance(trigger, str) else ""


def _dense(text: str) -> str:
    return "".join(text.split())
