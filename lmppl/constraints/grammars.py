"""Constraints on the text itself: regular expressions, JSON schemas and context-free grammars, by llguidance.

The text is what its tokens spell. Every way to spell an accepted text is allowed, so the mask, as a proposal, reaches
every text that the condition on the whole text allows.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..encoding import Stop
from ..engine.tuning import TUNING
from ..language_model import LanguageModel
from ..text import PAD
from .arguments import as_list, as_lm
from .complaints import one_line, shown
from .endings import endings, escaped
from .endless import endless
from .masks import PrefixConstraint, distinct
from .spelling import llguidance

_FEW = 1024  # up to so many allowed tokens, all of them are tried
_WIDE = 8  # a prefix with more allowed tokens is assumed to lead to an end
_AHEAD, _TRIED = 16, 1024  # the number of tokens tried ahead, and of texts tried in all
_HEADER = '%llguidance {"no_forcing": true}\n'  # without it, only one way to spell a forced text is allowed


def regex(lm: LanguageModel, pattern: str, stop: Stop = "eos") -> Grammar:
    r"""Returns the constraint that the whole text matches a regular expression.

    :param lm: the language model whose tokens are constrained.
    :param pattern: in the syntax of Rust's regex crate, without look-around and back-references; "." is any character
        except a newline. A completion's first word begins with a space.
    :param stop: the same as that of the `Completion`, see `Grammar`.
    :returns: a `Grammar`.
    :raises ValueError: if the pattern is malformed, or matches no text that can be written and ended, or the empty text
        only.
    :raises ImportError: without the extra ``grammar``.

        >>> he = regex(lm, r" He [a-z ]+\.", stop=".")
        >>> d = Completion(lm, x, max_tokens=9, stop=".", allowed=he)
        >>> he.accepts(lm.encode([" He ran.", " She ran."]))
        tensor([ True, False])
    """
    as_lm(lm)  # before the second argument, so that arguments in the wrong order are named by their types
    if not isinstance(pattern, str):
        raise ValueError(f"pattern: expected a regular expression as a string, got {pattern!r}")
    if not pattern:
        raise ValueError("pattern: it is empty and matches only the empty text")
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise ValueError(f"pattern: {pattern!r}: it ends inside an escape")
    wrapped = llguidance().LLMatcher.grammar_from_regex(pattern)
    slashed = json.loads(wrapped)["grammars"][0]["lark_grammar"].removeprefix("start: ")
    return _of_terminal(lm, slashed, stop, name="pattern", written=repr(pattern))


def json_schema(lm: LanguageModel, schema: Mapping[str, Any] | str, stop: Stop = "eos") -> Grammar:
    """Returns the constraint that the whole text is JSON under a JSON schema.

    Whitespace between the parts is free. Properties come in the schema's order.

    :param lm: the language model whose tokens are constrained.
    :param schema: a mapping, or JSON as a string.
    :param stop: the same as that of the `Completion`, see `Grammar`.
    :returns: a `Grammar`.
    :raises ValueError: if the schema is not JSON, has a keyword that llguidance does not support, or allows no text.
    :raises ImportError: without the extra ``grammar``.

        >>> booleans = json_schema(lm, {"type": "array", "items": {"type": "boolean"}})
        >>> booleans.accepts(lm.encode(["[true, false]", "[1]"]))
        tensor([ True, False])
    """
    as_lm(lm)
    if not isinstance(schema, str | Mapping):
        raise ValueError(f"schema: expected a mapping, or JSON as a string, got {schema!r}")
    try:
        written = json.dumps(json.loads(schema) if isinstance(schema, str) else dict(schema), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"schema: it is not JSON ({error})") from error
    return Grammar(lm, f"start: %json {written}", stop, name="schema", written=written)


def grammar(lm: LanguageModel, lark: str, stop: Stop = "eos") -> Grammar:
    """Returns the constraint that the whole text belongs to a context-free grammar.

    :param lm: the language model whose tokens are constrained.
    :param lark: the grammar in the Lark dialect of llguidance; its first rule is ``start``.
    :param stop: the same as that of the `Completion`, see `Grammar`.
    :returns: a `Grammar`.
    :raises ValueError: if the grammar is malformed, allows no text, or has a rule that never ends.
    :raises ImportError: without the extra ``grammar``.

        >>> nested = grammar(lm, 'start: "(" start ")" start | ""')
        >>> nested.accepts(lm.encode(["(())()", "(()"]))
        tensor([ True, False])
    """
    found = Grammar(lm, lark, stop, name="lark")
    if rules := endless(lark):
        raise ValueError(
            f"lark: the rule {rules[0]!r} never ends: each of its alternatives contains a rule that never ends"
        )
    return found


def words(lm: LanguageModel, words: Iterable[str], stop: Stop = "eos") -> Grammar:
    """Returns the constraint that the whole text is a sequence of these strings, in any order and number.

    :param lm: the language model whose tokens are constrained.
    :param words: strings, each with its leading space if it has one. A stop other than eos is part of the text: list it
        too.
    :param stop: the same as that of the `Completion`, see `Grammar`.
    :returns: a `Grammar`.
    :raises ValueError: if ``words`` is a string, or has an empty string.
    :raises ImportError: without the extra ``grammar``.

        >>> fruit = words(lm, [" red", " green", " apple", "."], stop=".")
        >>> fruit.accepts(lm.encode([" red apple.", " red car."]))
        tensor([ True, False])
    """
    if isinstance(words, str | bytes):
        raise ValueError(f"words: expected a list of strings, got {words!r}; write [{words!r}]")
    some, slashed = _any_of(words, "words")
    return _of_terminal(lm, f"/(?:{slashed})*/", stop, name="words", written=f"the words {some}")


def without(lm: LanguageModel, strings: Iterable[str], stop: Stop = "eos") -> Grammar:
    """Returns the constraint that the text contains none of these strings, whatever tokens spell them.

    :param lm: the language model whose tokens are constrained.
    :param strings: the forbidden strings.
    :param stop: the same as that of the `Completion`, see `Grammar`.
    :returns: a `Grammar`.
    :raises ValueError: if there is no string, or an empty one.
    :raises ImportError: without the extra ``grammar``.

    >>> peaceful = without(lm, ["knife", "stone"], stop=".")
    >>> peaceful.accepts(lm.encode([" the apple.", " the knife."]))
    tensor([ True, False])
    """
    some, slashed = _any_of(strings, "strings")
    terminal = f"/(?s:.*)/ & ~/(?s:.*)(?:{slashed})(?s:.*)/"
    return _of_terminal(lm, terminal, stop, name="strings", written=f"any but {some}")


def _of_terminal(lm: LanguageModel, terminal: str, stop: Stop, **kwargs: Any) -> Grammar:
    """Returns the constraint for one terminal of the Lark dialect, restricted to what can be written and ended."""
    ends = endings(lm, stop).pattern()
    also = "" if ends is None else " & /{}/".format(ends.replace("/", r"\/"))
    return Grammar(lm, f"start: TEXT\nTEXT: {terminal}{also}", stop, **kwargs)


class Grammar(PrefixConstraint):
    """A constraint on the text that the tokens spell, from a grammar in the Lark dialect of llguidance.

    Usually made by `regex`, `json_schema`, `grammar`, `words` or `without`.

    An eos (any special token) that stops a text is no part of it. Any other stop, such as ".", is part of it, and so is
    a stop string. A stop is allowed only if the text that it ends is complete. Special tokens are allowed nowhere else.
    If there is no stop, a complete text has ended.

    A token is not allowed if nothing can follow it: if it spells what only the stop may spell ("%." before the stop
    "."), or what comes next cannot be spelled by the vocabulary, or only by such tokens. To find out, up to 16 tokens
    are tried ahead after every allowed token, if 1024 or fewer are allowed; if more, only after those that begin to
    spell a stop. A prefix with more than 8 allowed tokens is assumed to lead to an end. So in vocabularies that lack
    characters, a dead end may remain.

    The states of the last few thousand prefixes are kept: a growing text costs one token for each step, particles may
    be reordered, and equal prefixes are computed once.

    :param lm: the language model whose tokens are constrained.
    :param lark: the grammar.
    :param stop: the same as that of the `Completion`: "eos", a string, a token id, several, or None.
    :param name: the name of the argument, for messages.
    :param written: what the user wrote, for messages; None: the grammar itself.
    :raises ImportError: without the extra ``grammar``.
    :raises ValueError: if the grammar is malformed, too complex, or allows no text that can be written and ended, or
        the empty text only; or if the tokenizer's texts are not spelled by their tokens one after another.

        >>> digits = Grammar(lm, 'start: /[0-9]+/')
        >>> lm.decode(digits(lm.encode("1")).nonzero())[:3]  # what may follow "1"
        ['', '0', '1']
    """

    def __init__(
        self, lm: LanguageModel, lark: str, stop: Stop = "eos", *, name: str = "lark", written: str | None = None
    ):
        if not isinstance(lark, str):
            raise ValueError(f"{name}: expected a grammar as a string, got {lark!r}")
        self.vocab_size, self.name, self.written = as_lm(lm).vocab_size, name, written
        self.endings = endings(lm, stop)
        self.spelling = self.endings.spelling
        start = llguidance().LLMatcher(self.spelling.tokenizer, _HEADER + lark, log_level=0)
        self._checked(start)
        self._start = start
        self._matchers: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._masks: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()  # bits, 8 tokens a byte
        first = set(np.unpackbits(self._mask(()), count=self.vocab_size).nonzero()[0].tolist())
        if first and first <= set(self.endings.silent):
            raise ValueError(f"{name}: {shown(written or repr(lark))} allows only the empty text")
        if not first:
            raise ValueError(
                f"{name}: no text of {shown(written or repr(lark))} can be written with this vocabulary and "
                f"then ended by stop={stop!r} (eos is no part of the text; any other stop must be its last token and "
                "occur nowhere before)"
            )

    def __call__(self, prefix: Tensor) -> Tensor:
        rows, index = distinct(prefix)
        if not len(rows):
            return torch.ones(*prefix.shape[:-1], self.vocab_size, dtype=torch.bool, device=prefix.device)
        packed = np.stack([self._mask(tuple(row)) for row in rows.tolist()])
        bits = np.unpackbits(packed, axis=1, count=self.vocab_size).view(bool)
        mask = torch.from_numpy(bits).to(prefix.device)
        return mask[index].view(*prefix.shape[:-1], self.vocab_size)

    def accepts(self, text: Tensor) -> Tensor:
        """Returns whether texts, with or without an eos, are complete texts of the grammar.

        :param text: texts (..., L).
        :returns: BoolTensor (...).

        >>> Grammar(lm, 'start: /[0-9]+/').accepts(lm.encode(["12", "1a"]))
        tensor([ True, False])
        """
        rows, index = distinct(text)
        found = []
        for row in rows.tolist():
            content = [i for i in row if i != PAD]
            if content and content[-1] in self.endings.silent:
                del content[-1]
            matcher = self._matcher(tuple(content))
            found.append(matcher is not None and matcher.is_accepting())
        return torch.tensor(found, dtype=torch.bool, device=text.device)[index].view(text.shape[:-1])

    def _mask(self, prefix: tuple[int, ...]) -> np.ndarray:
        """Returns the packed mask of the tokens that may follow."""
        mask = _recall(self._masks, prefix)
        if mask is None:
            mask = _remember(self._masks, prefix, np.packbits(self._fresh_mask(self._matcher(prefix), prefix)))
        return mask

    def _fresh_mask(self, matcher: Any, prefix: tuple[int, ...]) -> np.ndarray:
        strings = self.endings.strings
        state = 0 if strings is None else strings.state(prefix)
        mask = self._next(matcher, state)
        if self.endings.certain:
            return mask
        (options,) = mask.nonzero()
        if len(options) > _FEW:
            options = options[self.endings.begins_stop[options]]
        tried: dict[bytes, bool] = {}
        for v in options.tolist():
            mask[v] = v in self.endings.stops or self._lasts(matcher, state, v, b"", tried)
        return mask

    def _next(self, matcher: Any, state: int) -> np.ndarray:
        """Returns the mask of the tokens that may follow, as far as the next token alone decides it."""
        if matcher is None:
            return np.zeros(self.vocab_size, dtype=bool)
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        self._checked(matcher)
        mask = np.unpackbits(bits, bitorder="little").view(bool)[self.spelling.index]
        mask[self.endings.silent] = matcher.is_accepting()
        for stop in (*self.endings.spoken, *self.endings.completing(state)):
            mask[stop] = mask[stop] and self._read(matcher, stop).is_accepting()
        return mask

    def _lasts(
        self, matcher: Any, state: int, token: int, said: bytes, tried: dict[bytes, bool], ahead: int = _AHEAD
    ) -> bool:
        """Returns whether the text can be ended some time after ``token``.

        ``said`` are the bytes since the text whose mask is computed.
        """
        said += self.endings.spelled[token]
        if said not in tried:
            after, state = self._read(matcher, token), self.endings.after(state, token)
            tried[said] = self.endings.is_final(state) or self._goes_on(after, state, said, tried, ahead)
        return tried[said]

    def _goes_on(self, matcher: Any, state: int, said: bytes, tried: dict[bytes, bool], ahead: int) -> bool:
        """Returns whether a text that no stop string has ended is complete, or leads to a complete one."""
        mask = self._next(matcher, state)
        if any(mask[stop] for stop in self.endings.stops):
            return True
        if not self.endings.stops and self.endings.strings is None and matcher.is_accepting():
            return True
        (options,) = mask.nonzero()
        if len(options) > _WIDE or not ahead or len(tried) >= _TRIED:
            return True  # assumed
        return any(self._lasts(matcher, state, v, said, tried, ahead - 1) for v in options.tolist())

    def _matcher(self, prefix: tuple[int, ...]) -> Any:
        """Returns the matcher that has read ``prefix``, or None if it cannot be read. Copy it before reading more."""
        at = len(prefix)
        while at and prefix[:at] not in self._matchers:
            at -= 1
        matcher = _recall(self._matchers, prefix[:at]) if at else self._start
        for t in range(at, len(prefix)):
            matcher = None if matcher is None else self._after(matcher, prefix[t])
            _remember(self._matchers, prefix[: t + 1], matcher)
        return matcher

    def _after(self, matcher: Any, token: int) -> Any:
        return None if token == PAD or self.spelling.is_silent(token) else self._read(matcher, token)

    def _read(self, matcher: Any, token: int) -> Any:
        after = matcher.deep_copy()
        read = after.try_consume_tokens([int(self.spelling.index[token])])
        self._checked(after)
        return after if read == 1 else None

    def _checked(self, matcher: Any) -> None:
        # The matcher also reports an error if no token of the vocabulary can follow: then the mask is empty.
        error = matcher.get_error()
        if error and not error.startswith("NoExtension"):
            own = None if self.written is not None else _HEADER.count("\n")
            given = "" if self.written is None else f"{shown(self.written)}: "
            raise ValueError(f"{self.name}: {given}{one_line(error, own)}")


def _any_of(strings: Iterable[str], name: str) -> tuple[list[str], str]:
    """Returns the strings, and a regular expression between slashes that matches any of them."""
    given = [strings] if isinstance(strings, str) else as_list(strings, name, "a list of strings")
    if not given or not all(isinstance(s, str) and s for s in given):
        raise ValueError(f"{name}: expected strings of one character or more, got {given!r}")
    return given, "|".join(escaped(s) for s in given).replace("/", r"\/")


def _recall(cache: OrderedDict, key: tuple[int, ...]) -> Any:
    if key not in cache:
        return None
    cache.move_to_end(key)
    return cache[key]


def _remember(cache: OrderedDict, key: tuple[int, ...], value: Any) -> Any:
    cache[key] = value
    if len(cache) > TUNING.matchers:
        cache.popitem(last=False)
    return value
