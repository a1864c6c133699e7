"""How a text under a grammar may end, and what a vocabulary can write: so that no token leads to a dead end.

A grammar describes bytes, a text is written in tokens, and its last token must be a stop. So two things can go wrong:
the vocabulary may be unable to spell what must come next, and a token such as "%." may spell what only the stop "."
may.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..encoding import Stop
from ..language_model import LanguageModel
from ..stop_strings import StopStrings
from .arguments import as_lm
from .spelling import Spelling, spelling

_SPELT_OUT = 1024  # up to so many spellings are listed in a regular expression
_CHARACTERS = {9, 10, 13, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)}  # the bytes of ordinary text


class Endings:
    """The stops of a text under one vocabulary.

    ``silent`` stops are no part of the text (eos); ``spoken`` ones are ("."); ``strings`` are stop strings.
    """

    def __init__(self, spelling: Spelling, stops: list[int], strings: StopStrings | None = None):
        self.spelling, self.stops, self.strings = spelling, stops, strings
        self.silent = [s for s in stops if spelling.is_silent(s)]
        self.spoken = [s for s in stops if not spelling.is_silent(s)]

    @cached_property
    def spelled(self) -> list[bytes]:
        """The bytes that each token spells; b"" for silent ones."""
        decode = self.spelling.tokenizer.decode_bytes
        return [decode([int(i)]) if i else b"" for i in self.spelling.index]

    @cached_property
    def certain(self) -> bool:
        """Whether any text that the grammar allows can be written and then ended, so that nothing must be checked."""
        return not self.spoken and self.strings is None and self.complete

    @cached_property
    def complete(self) -> bool:
        """Whether ordinary text can be written byte by byte."""
        return {s[0] for s in self.spelled if len(s) == 1} >= _CHARACTERS

    @cached_property
    def begins_stop(self) -> np.ndarray:
        """(V,) whether a token may spell the beginning of a spoken stop, which no other token may then complete."""
        found = np.zeros(len(self.spelled), dtype=bool)
        for stop in {self.spelled[s] for s in self.spoken}:
            for v, s in enumerate(self.spelled):
                found[v] |= bool(s) and (s in stop or any(s.endswith(stop[:j]) for j in range(1, len(stop) + 1)))
        found[self.stops] = False
        return found

    def pattern(self) -> str | None:
        """Returns a regular expression of what can be written and then ended, as far as one exists; None: anything."""
        if self.certain:
            return None
        stops = {self.spelled[s] for s in self.spoken}
        content = {s for v, s in enumerate(self.spelled) if s and v not in self.spoken}
        ending = ""
        if stops:
            ending = f"(?:{'|'.join(_escaped(stops))})" + ("?" if self.silent or self.strings is not None else "")
        return f"(?s:{self._written(content, stops)}{ending})"

    def completing(self, state: int) -> list[int]:
        """Returns the tokens that complete a stop string, given the state of its automaton."""
        return [] if self.strings is None else self.strings.completing_ids(state)

    def after(self, state: int, token: int) -> int:
        """Returns the state after one more token."""
        return 0 if self.strings is None else int(self.strings.next[state, token])

    def is_final(self, state: int) -> bool:
        """Returns whether a stop string has ended the text."""
        return self.strings is not None and bool(self.strings.final[state])

    def _written(self, content: set[bytes], stops: set[bytes]) -> str:
        """Returns a regular expression of what tokens other than stops can spell."""
        # A character that only the stop spells alone (".") can be written only as a part of other tokens ("..").
        lacking = {s for s in stops - content if len(s) == 1}
        if self.complete and not lacking:
            return ".*"
        units = {s for s in content if any(c in s for c in lacking)} if self.complete else content
        try:
            each = _escaped(units) + ([f"[^{''.join(_escaped(lacking))}]"] if self.complete else [])
        except UnicodeDecodeError:  # a token that is only a part of a character
            return ".*"
        return f"(?:{'|'.join(each)})*" if len(units) <= _SPELT_OUT else ".*"


_KNOWN: WeakKeyDictionary[Any, dict[Any, Endings]] = WeakKeyDictionary()


def endings(lm: LanguageModel, stop: Stop) -> Endings:
    """Returns the endings of a language model's texts under a stop; they are computed once."""
    ids, strings = as_lm(lm).stops(stop)
    stops = ids.tolist()
    known, key = _KNOWN.setdefault(lm.vocabulary, {}), (*stops, strings and strings.strings)
    if key not in known:
        known[key] = Endings(spelling(lm), stops, strings)
    return known[key]


def escaped(string: str) -> str:
    """Returns the regular expression that matches exactly this string."""
    return re.sub(r"([\\.+*?()|\[\]{}^$#&~-])", r"\\\1", string).replace("\n", r"\n")


def _escaped(spelled: Iterable[bytes]) -> list[str]:
    return sorted(escaped(s.decode()) for s in spelled)
