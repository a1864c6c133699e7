"""Constraints under which there is no text are refused when they are made, and errors of grammars are one line."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from constraint_cases import AB, spelled_lm

from lmppl.constraints import Slots, grammar, json_schema, only, reaches, regex, without, words
from lmppl.constraints.endless import endless
from lmppl.distributions import Completion, DeadEnd

DOT = spelled_lm("a", "b", "ab", ".", " ")

UNREADABLE = [
    (lambda: regex(AB, "("), r"pattern: '\(': unclosed group"),
    (lambda: regex(AB, "a["), r"pattern: 'a\[': unclosed character class"),
    (lambda: regex(DOT, "a/(", "."), r"pattern: 'a/\(': unclosed group"),
    (lambda: regex(AB, "(?=a)b"), "look-around"),
    (lambda: regex(AB, r"(a)\1"), "backreferences are not supported"),
    (lambda: regex(DOT, "^a", "."), "pattern: "),
    (lambda: regex(AB, "a\\"), "it ends inside an escape"),
    (lambda: regex(AB, "(a{1000}){1000}b"), "pattern: "),
    (lambda: regex(AB, 5), "pattern: expected a regular expression as a string, got 5"),
    (lambda: regex(AB, None), "pattern: expected a regular expression as a string, got None"),
    (lambda: regex("a", AB), "lm: expected a LanguageModel, got 'a'"),
    (lambda: json_schema({"type": "null"}, AB), "lm: expected a LanguageModel, got dict"),
    (lambda: grammar(AB, "start: other"), 'lark: line 1, column 8: unknown name: "other"'),
    (lambda: grammar(AB, 'start: "a"\n  | "b" @'), "lark: line 2, column 10: lexer error"),
    (lambda: grammar(AB, "start: /(/"), "lark: line 1, column 8: unclosed group"),
    (lambda: grammar(AB, 'other: "a"'), "lark: no start rule found"),
    (lambda: grammar(AB, ["start"]), "lark: expected a grammar as a string"),
    (lambda: json_schema(AB, {"type": "foo"}), 'schema: {"type": "foo"}: Invalid type: foo'),
    (lambda: json_schema(AB, {"type": "string", "pattern": "("}), "unclosed group"),
    (lambda: json_schema(AB, {"type": "integer", "minimum": 5, "maximum": 2}), "Unsatisfiable schema"),
    (lambda: json_schema(AB, []), "schema: expected a mapping, or JSON as a string"),
    (lambda: json_schema(AB, {"const": float("nan")}), "schema: it is not JSON"),
]


@pytest.mark.parametrize(("make", "said"), UNREADABLE)
def test_what_cannot_be_read_is_said_in_one_line(make, said):
    """Without the library's listing, in which there are lines that the user did not write."""
    with pytest.raises(ValueError) as found:
        make()
    message = str(found.value)
    assert "\n" not in message and "TEXT" not in message and "no_forcing" not in message and len(message) < 300
    assert said.replace("\\", "") in message


@pytest.mark.parametrize("stop", ["eos", ".", None, ["eos", "."]])
@pytest.mark.parametrize("pattern", [r"[^\s\S]", "x", "a{0}", "()", "(|)", "x*"])
def test_an_impossible_or_empty_pattern_is_refused_when_it_is_made(pattern, stop):
    """No token spells "x": what may be left is the empty text."""
    with pytest.raises(ValueError, match="pattern: "):
        regex(DOT, pattern, stop)


@pytest.mark.parametrize(
    "make",
    [
        lambda stop: grammar(DOT, 'start: ""', stop),
        lambda stop: grammar(DOT, 'start: "x" | "y"', stop),
        lambda stop: grammar(DOT, "start: start", stop),
        lambda stop: json_schema(DOT, {"const": "a"}, stop),  # no token spells a quotation mark
        lambda stop: words(DOT, ["x"], stop),
        lambda stop: without(DOT, ["a", "b", ".", " "], stop),
    ],
)
@pytest.mark.parametrize("stop", ["eos", "."])
def test_an_impossible_or_empty_grammar_is_refused_when_it_is_made(make, stop):
    with pytest.raises(ValueError, match="^(lark|schema|words|strings): "):
        make(stop)


ENDLESS = {
    'start: "a" start': ["start"],
    'start: "a" start | "b" loop\nloop: "c" loop': ["start", "loop"],
    'start: "a" start | loop | ""\nloop: "b" loop': ["loop"],
    'start: "b" | one\none: "a" two\ntwo[capture]: one | ("b" two)+': ["one", "two"],
    'start: ("a" start){2} | <|x|> start': ["start"],
    'start: "a" start // | "b"': ["start"],
    'start: "a" start | ""': [],
    'start: "a" (start | "b") | /b:/': [],
    'start: "a" start? "b" | "b" start* | "a" [start]': [],
    'start: ("b" start){0,3} "a" ("b" start){0} "a"': [],
    '?start: sum\nsum.2: sum "+" term | term\nterm: NUMBER | "(" sum ")"\nNUMBER: /[0-9]+/\n%ignore / /': [],
    "%import common.INT\nstart: INT start | other": [],
    'start: %json {"type": "object"} start': [],  # not looked into
}


@pytest.mark.parametrize("lark", ENDLESS)
def test_rules_that_no_text_has(lark):
    """A rule has a text if and only if one of its alternatives needs only rules that have one, a least fixed point."""
    assert endless(lark) == ENDLESS[lark]


@pytest.mark.parametrize("lark", ['start: "a" start', 'start: "a" | "b" loop\nloop: "a" loop | "b" loop'])
def test_a_grammar_with_a_rule_that_never_ends_is_refused(lark):
    with pytest.raises(ValueError, match="^lark: the rule '(start|loop)' never ends"):
        grammar(AB, lark)


@pytest.mark.parametrize("pattern", ["a", "ab", "a|bab", "(ab)*", "a?b?", "[ab]{3}", "abab|b"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4])
def test_reaches_is_that_some_sequence_of_tokens_is_allowed_throughout(pattern, tokens):
    constraint, stops = regex(AB, pattern), AB.stop_ids("eos")
    ordinary = [v for v in range(AB.vocab_size) if v not in stops.tolist()]

    def is_allowed(z: tuple[int, ...]) -> bool:
        prefixes = (torch.tensor(z[:t], dtype=torch.long) for t in range(tokens))
        return all(bool(constraint(prefix)[v]) for prefix, v in zip(prefixes, z, strict=True))

    assert reaches(constraint, tokens, stops) == any(map(is_allowed, product(ordinary, repeat=tokens)))


def test_a_text_that_cannot_be_as_long_as_it_must_is_refused_when_it_is_made():
    """ "ab." has two tokens before its stop, "a" and "b", or one, "ab"."""
    ab = regex(DOT, r"ab\.", ".")
    Completion(DOT, "a", max_tokens=9, min_tokens=2, stop=".", allowed=ab)
    for allowed in (ab, Slots(DOT, [["a"], ["b"], ["."]])):
        with pytest.raises(ValueError, match="allowed: .* no text of 3 tokens before its stop") as found:
            Completion(DOT, "a", max_tokens=9, min_tokens=torch.tensor([1, 3]), stop=".", allowed=allowed)
        assert not isinstance(found.value, DeadEnd)
    with pytest.raises(ValueError, match="allowed: .* no text of 1 tokens"):
        Completion(DOT, "a", max_tokens=9, min_tokens=1, stop=".", allowed=only(DOT, ["."]))
    with pytest.raises(ValueError, match="allowed: .* no text of 5 tokens"):
        Completion(DOT, "a", max_tokens=5, stop=None, allowed=regex(DOT, "ab", None))
    asked = []

    def own(prefix):
        asked.append(prefix)
        return only(DOT, ["."])

    Completion(DOT, "a", max_tokens=5, min_tokens=2, stop=".", allowed=own)
    assert not asked  # a function of the user's own is not called before a text is drawn


def test_a_long_constraint_is_not_told_in_full():
    for make in (
        lambda: regex(AB, "c" * 5000),
        lambda: words(AB, [f"c{i}" for i in range(500)]),
        lambda: regex(AB, "(" * 5000),
    ):
        with pytest.raises(ValueError, match="^(pattern|words): ") as found:
            make()
        assert len(str(found.value)) < 400
