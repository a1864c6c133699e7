"""Grammars: regular expressions against `re`, tokenizers, the cost of growing, and what is refused."""

from __future__ import annotations

import re
import string
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from constraint_cases import AB, Case, in_turn, matches, no_repeat, spelled_lm, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import GPT2, tiny_config
from tokenizers import decoders
from transformers import AutoTokenizer

from lmppl import LanguageModel
from lmppl.constraints import Check, ban, every, grammar, json_schema, only, regex, without, words
from lmppl.constraints.masks import keeps
from lmppl.distributions import Completion
from lmppl.engine.tuning import TUNING
from lmppl.text import length, pad

PATTERNS = st.recursive(
    st.sampled_from(["a", "b", "ab", "[ab]", "."]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        inner.map(lambda one: f"(?:{one})*"),
        inner.map(lambda one: f"(?:{one})?"),
    ),
    max_leaves=5,
)


@settings(max_examples=30)
@given(PATTERNS)
def test_any_regular_expression(pattern):
    allowed = regex(AB, pattern)
    texts = Case(AB, lambda: allowed, matches(pattern)).texts(2)
    expected = torch.tensor([matches(pattern)(z, AB.vocabulary.decode(list(z))) for z in texts])
    assert torch.equal(keeps(allowed, tensor(texts), 8), expected)
    assert torch.equal(allowed.accepts(tensor(texts)), expected)


@pytest.mark.parametrize("first", [0, 14, 28])
def test_words_are_taken_as_they_are_written(first):
    """No character of a word is a sign of the pattern's."""
    marks = [*string.punctuation, " ", "\n", "\t", "é", "→", "\\n", "a/b", '"/'][first : first + 14]
    lm = spelled_lm(*marks)
    texts = torch.arange(1, len(marks) + 1)[:, None]
    for i, mark in enumerate(marks):
        assert words(lm, [mark]).accepts(texts).nonzero().tolist() == [[i]], mark
        assert without(lm, [mark]).accepts(texts).tolist() == [mark not in other for other in marks], mark


def test_a_text_without_a_stop_and_a_text_with_its_eos_are_the_same_text():
    allowed = regex(AB, "(ab)+")
    z = tensor([(4,), (4, 0), (2, 3, 0), (2, 3, 4), (2, 0), ()])
    assert allowed.accepts(z).tolist() == [True, True, True, True, False, False]
    assert allowed.accepts(pad(z, 9).view(2, 3, 9)).shape == (2, 3)


def test_without_a_stop_every_beginning_can_go_on():
    fn = Completion(AB, "ab", max_tokens=2, stop=None, allowed=regex(AB, "(?:abb|ba)+", stop=None))
    support = [z for z in product(range(8), repeat=2) if fn.log_prob(torch.tensor(z)) > -torch.inf]
    begin = {
        s[:n] for k in range(5) for w in product(("abb", "ba"), repeat=k) for s in ["".join(w)] for n in range(len(s))
    }
    expected = [z for z in product(range(1, 8), repeat=2) if AB.vocabulary.decode(list(z)) in begin]
    assert support == expected


class Asked:
    """Another object, which notes each time that one attribute of it is asked for."""

    def __init__(self, of, name, times):
        self.of, self.name, self.times = of, name, times

    def __getattr__(self, name):
        if name == self.name:
            self.times.append(name)
        return getattr(self.of, name)


def test_a_growing_text_costs_one_token_a_step_and_reordering_nothing(monkeypatch):
    allowed = regex(AB, "(ab|b)*")
    read, looked = [], []  # a token is read once it is known to spell something; a mask is made for the endings at hand
    allowed.spelling, allowed.endings = (
        Asked(allowed.spelling, "is_silent", read),
        Asked(allowed.endings, "certain", looked),
    )
    prefix = torch.zeros(6, 0, dtype=torch.long)
    for _ in range(4):
        allowed(prefix)
        prefix = torch.cat([prefix, torch.tensor([4, 4, 4, 3, 3, 3])[:, None]], 1)
        prefix = prefix[torch.tensor([5, 4, 3, 2, 1, 0])]
        read.clear(), looked.clear()
        allowed(prefix)
        different = len({tuple(p) for p in prefix.tolist()})
        assert len(read) == len(looked) == different
        read.clear(), looked.clear()
        allowed(prefix.flip(0))
        allowed.accepts(prefix)
        assert not read and not looked
    monkeypatch.setattr(TUNING, "matchers", 3)  # forgotten states are read again, with the same result
    forgetful = regex(AB, "(ab|b)*")
    everything = torch.tensor([z[:-1] for z in Case(AB, lambda: None, in_turn).texts(3) if len(z) == 4])
    assert torch.equal(forgetful(everything), allowed(everything))


def test_the_embedded_language_model():
    lm = LanguageModel.embedded("stories")
    allowed = regex(lm, r" (He|She) [a-z ]+\.", stop=".")
    fn = Completion(lm, "Tom went to the kitchen.", max_tokens=8, stop=".", allowed=allowed)
    z = fn.sample((20,))
    whole = length(z) < 9
    assert bool(whole.any()) and torch.equal(allowed.accepts(z)[whole], whole[whole])
    said = lm.decode(z[whole])
    assert all(re.fullmatch(r" (He|She) [a-z ]+\.", s) for s in said), said


def of_tokenizer(path: Path) -> LanguageModel:
    """A tiny network under a real tokenizer."""
    if not path.is_dir():
        pytest.skip(f"no tokenizer at {path}")
    import transformers

    tokenizer = AutoTokenizer.from_pretrained(path)
    config = tiny_config("gpt2", len(tokenizer))
    return LanguageModel(transformers.AutoModelForCausalLM.from_config(config), tokenizer)


@pytest.mark.parametrize("path", [GPT2, GPT2.parent / "stories"], ids=lambda p: p.name)
def test_byte_pair_tokenizers(path):
    """Characters may be cut into bytes, and every way to cut a text is allowed."""
    lm = of_tokenizer(path)
    known = lm.vocabulary.decode
    allowed = regex(lm, "[a-z ]{2,}")
    spelled = [known([v]) for v in range(lm.vocab_size)]
    for prefix in ("", "a", " the"):
        ids = lm.encode(prefix)
        expected = [bool(re.fullmatch("[a-z ]+", s)) for s in spelled]
        expected[lm.eos_id] = len(prefix) >= 2
        assert allowed(ids).tolist() == expected
    text = " né→ cat"
    exact = regex(lm, text)
    for ids in (lm.encode(text), torch.cat([lm.encode(c) for c in text])):
        assert bool(exact.accepts(ids)) and bool(keeps(exact, torch.cat([ids, lm.stop_ids("eos")]), lm.vocab_size))
    assert not bool(exact.accepts(lm.encode(" ne→ cat")))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: regex(AB, "a("), "pattern"),
        (lambda: regex(AB, "a(?=b)"), "pattern"),
        (lambda: json_schema(AB, {"type": "colour"}), "schema"),
        (lambda: json_schema(AB, "{"), "schema"),
        (lambda: json_schema(AB, {"type": {1, 2}}), "schema"),
        (lambda: grammar(AB, "start: other"), "lark"),
        (lambda: words(AB, []), "words"),
        (lambda: words(AB, ["x"], "."), r"words: no text of the words \['x'\]"),
        (lambda: without(AB, ["a", ""]), "strings"),
        (lambda: without(AB, ["."], "."), r"strings: no text of any but \['.'\]"),
        (lambda: regex(AB, "a", stop=99), "stop"),
        (lambda: every(), "constraints"),
        (lambda: every(only(AB, ["a"]), only(AB, ["b"])), "constraints"),
        (lambda: every(only(AB, ["a"]), torch.ones(3, dtype=torch.bool)), "constraints"),
        (lambda: Check(AB, no_repeat, accepts=1), "accepts"),
        (lambda: Check(AB, lambda p, v: v)(torch.tensor([2])), "predicate"),
    ],
)
def test_bad_input_names_its_argument(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install pyro-lmppl\[grammar\]"):
        regex(AB, "a")


def test_a_decoder_that_does_more_than_to_join_is_taken_token_by_token():
    """WordPiece puts a space before what does not continue a word, and a pattern sees it there."""
    lm = spelled_lm("a", "##b")
    lm.tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    assert lm.decode(torch.tensor([1, 2, 1])) == " ab a"
    assert regex(lm, " ab a").accepts(torch.tensor([[1, 2, 1], [1, 1, 2]])).tolist() == [True, False]


def test_a_stop_that_cannot_come_is_refused():
    """ "." is part of the text, and the pattern has none."""
    with pytest.raises(ValueError, match=r"pattern.*'ab'"):
        regex(AB, "ab", stop=".")


def test_what_the_vocabulary_cannot_spell_is_not_begun():
    """After "ab" only an "x" may come, which no token spells; after "ba" the text is complete."""
    allowed = regex(AB, "abx|ba")
    assert allowed(torch.tensor([], dtype=torch.long)).nonzero()[:, 0].tolist() == [3, 5]
    prefix = torch.tensor([[4], [5], [6]])
    assert allowed(prefix).nonzero().tolist() == [[1, 0]] and allowed.accepts(prefix).tolist() == [False, True, False]
    fn = Completion(AB, "a", max_tokens=3, allowed=allowed)
    assert (fn.log_prob(torch.tensor([[5, 0], [4, 0]])) > -torch.inf).tolist() == [True, False]
    assert set(AB.decode(fn.sample((100,)))) == {"ba"}


def test_every_is_a_mask_where_its_parts_are():
    assert torch.equal(every(ban(AB, "a"), ban(AB, "b")), ban(AB, ["a", "b"]))
    one = regex(AB, "a")
    assert every(one) is one
