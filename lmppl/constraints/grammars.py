r"""Constraints on the detokenised text: regular expressions, JSON schemas and context-free grammars, by llguidance.

The text is what its tokens spell, however it is cut into tokens: every way to write an accepted text is allowed, so
that the mask, as a proposal, reaches all that the condition on the whole text reaches.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..language_model import LanguageModel, Stop
from ..text import PAD
from .masks import PrefixConstraint, distinct
from .spelling import Spelling, llguidance, spelling

_STATES = 4096  # matchers and masks remembered
_HEADER = '%llguidance {"no_forcing": true}\n'  # else only one way to cut a forced text into tokens is allowed


def regex(lm: LanguageModel, pattern: str, stop: Stop = "eos") -> Grammar:
    r"""The texts that match a regular expression from beginning to end.

    :param pattern: in the syntax of Rust's regex crate (no look-around, no back-references); "." is any character but
        a newline.  A completion's first word has its leading space.
    :param stop: as of the `Completion`, see `Grammar`.
    :raises ValueError: for a pattern that cannot be read.

        >>> Completion(lm, x, max_tokens=9, stop=".", allowed=regex(lm, r" He [a-z ]+\.", stop="."))
    """
    wrapped = llguidance().LLMatcher.grammar_from_regex(pattern)
    return Grammar(lm, json.loads(wrapped)["grammars"][0]["lark_grammar"], stop, name="pattern")


def json_schema(lm: LanguageModel, schema: Mapping[str, Any] | str, stop: Stop = "eos") -> Grammar:
    """The texts that are JSON under a JSON schema (a mapping, or JSON itself).

    Whitespace between the parts is free, and properties come in the schema's order.

    :raises ValueError: for a schema that is no JSON, or has what llguidance does not know.

        >>> json_schema(lm, {"type": "array", "items": {"type": "boolean"}})
    """
    try:
        written = json.dumps(json.loads(schema) if isinstance(schema, str) else dict(schema))
    except (TypeError, ValueError) as error:
        raise ValueError(f"schema: it is not JSON ({error})") from error
    return Grammar(lm, f"start: %json {written}", stop, name="schema")


def grammar(lm: LanguageModel, lark: str, stop: Stop = "eos") -> Grammar:
    r"""The texts of a context-free grammar in the Lark dialect of llguidance, from its rule ``start``.

    :raises ValueError: for a grammar that cannot be read.

        >>> grammar(lm, 'start: "(" start ")" start | ""')
    """
    return Grammar(lm, lark, stop, name="lark")


def words(lm: LanguageModel, words: Iterable[str], stop: Stop = "eos") -> Grammar:
    """The texts that are a sequence of these strings, any number of them, each as it is written: with its space.

    A stop other than eos is part of the text: name it too.

        >>> words(lm, [" red", " green", " apple", "."], stop=".")
    """
    return regex(lm, f"(?:{_any_of(words, 'words')})*", stop)


def without(lm: LanguageModel, strings: Iterable[str], stop: Stop = "eos") -> Grammar:
    """The texts that contain none of these strings, however they are cut into tokens.

    >>> without(lm, ["knife", "stone"], stop=".")
    """
    some = _any_of(strings, "strings").replace("/", r"\/")
    return Grammar(lm, f"start: TEXT\nTEXT: /(?s:.*)/ & ~/(?s:.*)(?:{some})(?s:.*)/", stop, name="strings")


class Grammar(PrefixConstraint):
    """A constraint on the text that tokens spell, from a grammar in the Lark dialect of llguidance.

    An eos (any special token) that stops a text is no part of it; any other stop, such as ".", is, and so is a string
    of several tokens.  A stop is allowed only where the text so ended is complete.  Special tokens are allowed nowhere
    else.  What is allowed can be completed, if the vocabulary can spell it: one that lacks some characters, as the
    embedded ones do, may have tokens to which nothing can be added (ban them, or meet a `DeadEnd`).

    Matchers have state: those of the last few thousand prefixes are kept, so that a text that grows costs one token a
    step, particles may be reordered, and prefixes that occur several times are asked about once.

    :param lm: the language model whose tokens are constrained.
    :param lark: the grammar.
    :param stop: as of the `Completion`: "eos", a string, a token, several, or None.
    :raises ImportError: without the extra ``grammar``.
    :raises ValueError: for a grammar that cannot be read or becomes too complex, or a tokenizer whose texts are not
        spelled by their tokens one after another.
    """

    def __init__(self, lm: LanguageModel, lark: str, stop: Stop = "eos", *, name: str = "lark"):
        self.vocab_size, self.name = lm.vocab_size, name
        self.spelling: Spelling = spelling(lm)
        ids, self.stop_strings = lm.stops(stop)
        stops = ids.tolist()
        self.silent_stops = [s for s in stops if self.spelling.is_silent(s)]
        self.spoken_stops = [s for s in stops if not self.spelling.is_silent(s)]
        start = llguidance().LLMatcher(self.spelling.tokenizer, _HEADER + lark, log_level=0)
        self._checked(start)
        self._start = start
        self._matchers: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._masks: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()  # bits, 8 tokens a byte

    def __call__(self, prefix: Tensor) -> Tensor:
        rows, index = distinct(prefix)
        if not len(rows):
            return torch.ones(*prefix.shape[:-1], self.vocab_size, dtype=torch.bool, device=prefix.device)
        packed = np.stack([self._mask(tuple(row)) for row in rows.tolist()])
        bits = np.unpackbits(packed, axis=1, count=self.vocab_size).view(bool)
        mask = torch.from_numpy(bits).to(prefix.device)
        return mask[index].view(*prefix.shape[:-1], self.vocab_size)

    def accepts(self, text: Tensor) -> Tensor:
        """Whether whole texts (..., L), with or without an eos, are complete, BoolTensor (...)."""
        rows, index = distinct(text)
        found = []
        for row in rows.tolist():
            content = [i for i in row if i != PAD]
            if content and content[-1] in self.silent_stops:
                del content[-1]
            matcher = self._matcher(tuple(content))
            found.append(matcher is not None and matcher.is_accepting())
        return torch.tensor(found, dtype=torch.bool, device=text.device)[index].view(text.shape[:-1])

    def _mask(self, prefix: tuple[int, ...]) -> np.ndarray:
        """The packed mask of what may follow."""
        mask = _recall(self._masks, prefix)
        if mask is None:
            matcher = self._matcher(prefix)
            fresh = self._fresh_mask(matcher)
            for token in self._completing(prefix):
                fresh[token] = fresh[token] and self._after(matcher, token).is_accepting()
            mask = _remember(self._masks, prefix, np.packbits(fresh))
        return mask

    def _fresh_mask(self, matcher: Any) -> np.ndarray:
        if matcher is None:
            return np.zeros(self.vocab_size, dtype=bool)
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        self._checked(matcher)
        mask = np.unpackbits(bits, bitorder="little").view(bool)[self.spelling.index]
        mask[self.silent_stops] = matcher.is_accepting()
        for stop in self.spoken_stops:
            mask[stop] = mask[stop] and self._after(matcher, stop).is_accepting()
        return mask

    def _completing(self, prefix: tuple[int, ...]) -> list[int]:
        """The tokens that complete a stop string after ``prefix``."""
        if self.stop_strings is None:
            return []
        read = torch.tensor(prefix, dtype=torch.long, device=self.stop_strings.next.device)
        completing = self.stop_strings.completing(self.stop_strings.states(read, len(prefix))[0])
        return completing.nonzero()[:, 0].tolist()

    def _matcher(self, prefix: tuple[int, ...]) -> Any:
        """The matcher that has read ``prefix``, None where it cannot be read; to be copied, not fed."""
        at = len(prefix)
        while at and prefix[:at] not in self._matchers:
            at -= 1
        matcher = _recall(self._matchers, prefix[:at]) if at else self._start
        for t in range(at, len(prefix)):
            matcher = None if matcher is None else self._after(matcher, prefix[t])
            _remember(self._matchers, prefix[: t + 1], matcher)
        return matcher

    def _after(self, matcher: Any, token: int) -> Any:
        if token == PAD or self.spelling.is_silent(token):
            return None
        after = matcher.deep_copy()
        read = after.try_consume_tokens([int(self.spelling.index[token])])
        self._checked(after)
        return after if read == 1 else None

    def _checked(self, matcher: Any) -> None:
        # Where no token of the vocabulary can follow, the matcher counts as in error too: there the mask is empty.
        error = matcher.get_error()
        if error and not error.startswith("NoExtension"):
            raise ValueError(f"{self.name}: {error.strip()}")


def _any_of(strings: Iterable[str], name: str) -> str:
    given = [strings] if isinstance(strings, str) else list(strings)
    if not given or not all(isinstance(s, str) and s for s in given):
        raise ValueError(f"{name}: expected strings of one character or more, got {given!r}")
    return "|".join(re.sub(r"([\\.+*?()|\[\]{}^$#&~-])", r"\\\1", s).replace("\n", r"\n") for s in given)


def _recall(cache: OrderedDict, key: tuple[int, ...]) -> Any:
    if key not in cache:
        return None
    cache.move_to_end(key)
    return cache[key]


def _remember(cache: OrderedDict, key: tuple[int, ...], value: Any) -> Any:
    cache[key] = value
    if len(cache) > _STATES:
        cache.popitem(last=False)
    return value
