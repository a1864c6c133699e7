"""Constraints against brute force: every text of a small vocabulary, and what plain Python says of its string."""

from __future__ import annotations

import json
import re
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ngrams import written_lm
from reference import Law, Plain, Tokens
from tiny import tiny_config, tiny_lm
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lmppl import LanguageModel, constraints
from lmppl.constraints import Check, PrefixConstraint, ban, every, grammar, json_schema, only, regex, without, words
from lmppl.constraints.masks import keeps
from lmppl.constraints.spelling import spelling
from lmppl.distributions import Completion
from lmppl.distributions.token_steps import DeadEnd
from lmppl.inference import SMC, Enumeration, Importance
from lmppl.text import PAD, length, pad

GPT2 = Path(__file__).parents[2] / "shared" / "lms" / "gpt2-tokenizer"


def spelled_lm(*tokens: str, seed: int = 0) -> LanguageModel:
    """A tiny network whose tokens are eos (0) and these strings."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("<eos>", *tokens))}))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    return LanguageModel(tiny_lm(vocab=max(8, len(tokens) + 1), seed=seed).model, tokenizer)


AB = spelled_lm(".", "a", "b", "ab", "ba", "abb", "<eos")  # one text, many ways to cut it; the last is no eos
JSON = spelled_lm("true", "tr", "ue", "10", "-", "[", "]", ",")
BRACKETS = spelled_lm("(", ")", "()", "((", "x", ".", "))")
BOOLEANS = {"type": "array", "items": {"type": "boolean"}}


@dataclass(frozen=True)
class Case:
    """A constraint, and whether a text (its tokens; its string, eos dropped) is accepted, in plain Python."""

    lm: LanguageModel
    make: Callable[[], constraints.Constraint]
    accepts: Callable[[Tokens, str], bool]
    stop: str | list[str] = "eos"
    max_tokens: int = 3
    tight: bool = True  # whatever is allowed can be completed, within a token more than max_tokens

    @property
    def stops(self) -> Tokens:
        return tuple(self.lm.stop_ids(self.stop).tolist())

    def completion(self, **kwargs) -> Completion:
        given = {"max_tokens": self.max_tokens, "stop": self.stop, "allowed": self.make(), "temperature": 3.0}
        return Completion(self.lm, self.prompt, **given | kwargs)

    @property
    def prompt(self) -> Tensor:
        return torch.tensor([2, 3])

    def texts(self, most: int | None = None) -> list[Tokens]:
        """Every text of at most ``most`` tokens and a stop."""
        content = [v for v in range(self.lm.vocab_size) if v not in self.stops]
        lengths = range((self.max_tokens if most is None else most) + 1)
        return [(*body, s) for n in lengths for body in product(content, repeat=n) for s in self.stops]

    def says(self, z: Tokens) -> bool:
        return self.accepts(z, self.lm.vocabulary.decode(list(z)))


def matches(pattern: str) -> Callable[[Tokens, str], bool]:
    """No eos inside, and a match from beginning to end."""
    return lambda z, s: 0 not in z[:-1] and re.fullmatch(pattern, s, re.DOTALL) is not None


def is_json(of: Callable[[object], bool]) -> Callable[[Tokens, str], bool]:
    def accepts(z: Tokens, s: str) -> bool:
        try:
            return 0 not in z[:-1] and of(json.loads(s))
        except ValueError:
            return False

    return accepts


def balanced(z: Tokens, s: str) -> bool:
    while "()" in s:
        s = s.replace("()", "")
    return not s and 0 not in z[:-1]


def no_repeat(prefix: Tensor, token: Tensor) -> Tensor:
    return prefix[:, -1] != token if prefix.shape[1] else torch.ones_like(token, dtype=torch.bool)


def in_turn(z: Tokens, s: str) -> bool:
    return all(a != b for a, b in zip(z, z[1:], strict=False))


CASES = {
    "only": Case(AB, lambda: only(AB, ["a", "ab", 0]), lambda z, s: set(z) <= {0, 2, 4}),
    "ban": Case(AB, lambda: ban(AB, ["b", "."]), lambda z, s: not {1, 3} & set(z)),
    "regex": Case(AB, lambda: regex(AB, "(ab)+b?"), matches("(ab)+b?")),
    "regex, empty": Case(AB, lambda: regex(AB, "(?:a|ab)*"), matches("(?:a|ab)*")),
    "regex, spoken stop": Case(AB, lambda: regex(AB, r"(ab|b)+\.", "."), matches(r"(ab|b)+\."), "."),
    "regex, two stops": Case(
        AB, lambda: regex(AB, r"a[ab]*\.?", ["eos", "."]), matches(r"a[ab]*\.?"), ["eos", "."], tight=False
    ),
    "regex, spelled eos": Case(AB, lambda: regex(AB, "(<eos|a)+"), matches("(<eos|a)+")),
    "json": Case(
        JSON,
        lambda: json_schema(JSON, BOOLEANS),
        is_json(lambda x: isinstance(x, list) and all(b is True for b in x)),
        max_tokens=4,
    ),
    "json number": Case(
        JSON,
        lambda: json_schema(JSON, '{"type": "integer", "maximum": 10}'),
        is_json(lambda x: type(x) is int and x <= 10),
    ),
    "grammar": Case(BRACKETS, lambda: grammar(BRACKETS, 'start: "(" start ")" start | ""'), balanced, max_tokens=4),
    "words": Case(AB, lambda: words(AB, ["ab", "b."], ["eos"]), matches(r"(ab|b\.)*")),
    "without": Case(AB, lambda: without(AB, ["ba", "<"]), matches("((?!ba|<).)*")),
    "every": Case(
        AB,
        lambda: every(regex(AB, "(ab|ba)+"), without(AB, ["bb"]), ban(AB, ["<eos"])),
        matches("(?!.*bb)(ab|ba)+"),
        tight=False,
    ),
    "check": Case(AB, lambda: Check(AB, no_repeat), in_turn),
    "check within": Case(
        AB,
        lambda: every(Check(AB, no_repeat, patience=3), regex(AB, "[ab]+"), ban(AB, ["abb"])),
        lambda z, s: in_turn(z, s) and matches("[ab]+")(z, s) and 6 not in z,
    ),
    "function": Case(
        AB,
        lambda: (
            lambda prefix: (
                ~torch.nn.functional.one_hot(prefix[..., -1], 8).bool()
                if prefix.shape[-1]
                else torch.ones(8, dtype=torch.bool)
            )
        ),
        in_turn,
    ),
}


@pytest.fixture(params=CASES, ids=CASES)
def case(request) -> Case:
    return CASES[request.param]


def tensor(texts: list[Tokens]) -> Tensor:
    width = max(len(z) for z in texts)
    return torch.tensor([z + (PAD,) * (width - len(z)) for z in texts])


# -- the contract ----------------------------------------------------------------------------------------------------


def test_the_texts_allowed_token_by_token_are_the_texts_accepted(case):
    texts = case.texts()
    z, expected = tensor(texts), torch.tensor([case.says(z) for z in texts])
    assert bool(expected.any()) and not bool(expected.all())
    allowed = case.make()
    assert torch.equal(keeps(allowed, z, case.lm.vocab_size), expected)
    if isinstance(allowed, PrefixConstraint):
        assert torch.equal(allowed.accepts(z), expected)
        indicator = allowed.log_indicator(z.view(1, *z.shape))
        assert indicator.shape == (1, len(z)) and torch.equal(indicator[0].exp(), expected.float())


def test_what_is_allowed_can_be_completed(case):
    """A mask that looks no further than the next token would let texts into dead ends."""
    if not case.tight:
        return
    accepted = {z[:t] for z in case.texts(case.max_tokens + 1) if case.says(z) for t in range(len(z))}
    prefixes = [z[:-1] for z in case.texts(2)]
    kept = keeps(case.make(), tensor(prefixes), case.lm.vocab_size)
    for prefix, allowed in zip(prefixes, kept.tolist(), strict=True):
        assert allowed == (prefix in accepted), prefix


def test_masks_of_a_batch_are_those_of_its_rows_in_any_order(case):
    allowed = case.make()
    if isinstance(allowed, Tensor):
        assert allowed.shape == (case.lm.vocab_size,) and allowed.dtype == torch.bool
        return
    for t in range(3):
        prefix = torch.randint(1, case.lm.vocab_size, (2, 5, t))
        mask = allowed(prefix).expand(2, 5, -1)
        assert mask.shape == (2, 5, case.lm.vocab_size) and mask.dtype == torch.bool
        order = torch.randperm(5)
        assert torch.equal(allowed(prefix[:, order]).expand(2, 5, -1), mask[:, order])
        for i, j in product(range(2), range(5)):
            assert torch.equal(case.make()(prefix[i, j]).expand(case.lm.vocab_size), mask[i, j])


def test_the_masked_distribution_is_the_one_defined_by_loops(case):
    """It normalises over all texts, and each has the probability that a loop over tokens gives it."""
    allowed = case.make()

    def after(prefix: Tokens) -> set[int]:
        mask = allowed if isinstance(allowed, Tensor) else allowed(torch.tensor(prefix, dtype=torch.long))
        return set(mask.nonzero()[:, 0].tolist())

    fn = case.completion(max_tokens=2)
    law = Law(Plain(case.lm), tuple(case.prompt.tolist()), 2, stops=case.stops, allowed=after, temperature=3.0)
    texts = case.texts(2)
    with torch.no_grad():
        found = fn.log_prob(tensor(texts)).double()
    expected = torch.tensor([law.log_prob(z) for z in texts], dtype=torch.double)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-5)


def test_samples_are_accepted_unless_the_limit_cut_them(case):
    fn = case.completion()
    z = fn.sample((300,))
    cut = length(z) == case.max_tokens + 1
    kept = torch.tensor([case.says(tuple(i for i in row if i != PAD)) for row in z.tolist()])
    assert bool((kept | cut).all()) and bool(kept.any())
    value, log_prob = fn.sample_and_log_prob((50,))
    torch.testing.assert_close(log_prob, fn.log_prob(value).detach(), rtol=1e-4, atol=1e-4)


# -- grammars --------------------------------------------------------------------------------------------------------

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


def test_a_growing_text_costs_one_token_a_step_and_reordering_nothing(monkeypatch):
    allowed = regex(AB, "(ab|b)*")
    read, looked = [], []
    after, fresh = allowed._after, allowed._fresh_mask
    monkeypatch.setattr(allowed, "_after", lambda m, token: read.append(token) or after(m, token))
    monkeypatch.setattr(allowed, "_fresh_mask", lambda m: looked.append(m) or fresh(m))
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
    monkeypatch.setattr(
        "lmppl.constraints.grammars._STATES", 3
    )  # forgotten states are read again, with the same result
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
        (lambda: without(AB, ["a", ""]), "strings"),
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


def test_a_decoder_that_does_more_than_to_join_is_refused():
    lm = spelled_lm("a", "##b")
    lm.tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="decodes the tokens"):
        spelling(lm)


def test_a_stop_that_cannot_come_is_a_dead_end():
    """ "." is part of the text, and the pattern has none."""
    with pytest.raises(DeadEnd, match="allowed"):
        Completion(AB, "a", max_tokens=5, stop=".", allowed=regex(AB, "ab", stop=".")).sample((20,))


def test_what_the_vocabulary_cannot_spell_is_a_dead_end():
    """After "ab" only an "x" may come, which no token spells; after "ba" the text is complete."""
    allowed = regex(AB, "abx|ba")
    prefix = torch.tensor([[4], [5], [6]])
    assert allowed(prefix).nonzero().tolist() == [[1, 0]] and allowed.accepts(prefix).tolist() == [False, True, False]
    assert not bool(allowed(torch.tensor([4, 2])).any()) and not bool(allowed.accepts(torch.tensor([4, 2])))
    fn = Completion(AB, "a", max_tokens=3, allowed=allowed)
    assert (fn.log_prob(torch.tensor([[5, 0], [4, 0]])) > -torch.inf).tolist() == [True, False]
    with pytest.raises(DeadEnd):
        fn.sample((100,))


def test_every_is_a_mask_where_its_parts_are():
    assert torch.equal(every(ban(AB, "a"), ban(AB, "b")), ban(AB, ["a", "b"]))
    one = regex(AB, "a")
    assert every(one) is one


# -- the masked language model as a proposal --------------------------------------------------------------------------

RUNS = 400
CONDITION = regex(AB, "(?:ab|b)+")


def prior(**kwargs) -> Completion:
    return Completion(AB, "ab", **{"max_tokens": 3, "temperature": 3.0} | kwargs)


def conditioned():
    with pyro.plate("runs", RUNS):
        z = pyro.sample("z", prior())
        pyro.factor("condition", CONDITION.log_indicator(z))


def masked():
    with pyro.plate("runs", RUNS):
        pyro.sample("z", prior(allowed=CONDITION))


def test_the_weight_of_a_text_is_the_mass_that_the_mask_kept():
    """p(z) c(z) / q(z) = prod_t sum_v p(v | z_<t) c(v | z_<t), for texts that the limit did not cut."""
    plain, p, q = Law(Plain(AB), (4,), 3, temperature=3.0), prior(), prior(allowed=CONDITION)
    accepted = [z for z in CASES["ban"].texts(2) if bool(CONDITION.accepts(torch.tensor(z)))]
    assert len(accepted) > 5
    for z in accepted:
        expected = 0.0
        for t in range(len(z)):
            kept = CONDITION(torch.tensor(z[:t], dtype=torch.long))
            expected += float(plain.next(z[:t]).exp()[kept].sum().log())
        value = pad(torch.tensor(z), 4)
        assert float((p.log_prob(value) - q.log_prob(value)).detach()) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("particles", [1, 8])
@pytest.mark.parametrize("algorithm", [Importance, SMC])
def test_masked_proposals_estimate_the_evidence_of_the_condition(algorithm, particles):
    with torch.no_grad():
        z = prior().enumerate_support()
        joint = prior().log_prob(z) + CONDITION.log_indicator(z)
    exact = float(joint.exp().sum())
    estimates = algorithm(conditioned, masked, num_particles=particles).run().log_evidence.exp().double()
    error = float(estimates.std()) / RUNS**0.5
    assert abs(float(estimates.mean()) - exact) < 5 * error
    assert error < 0.1 * exact
    # Proposals that do not know the condition lose most particles to it.
    blind = algorithm(conditioned, num_particles=particles).run().log_evidence.exp()
    assert float(blind.std()) > 2 * float(estimates.std())


# -- a local mask is not a condition ----------------------------------------------------------------------------------


def two_tokens() -> LanguageModel:
    """First "a" 0.9 or "b" 0.1; after an "a" then "a" 0.8 or "b" 0.2; after a "b" then "a" 0.3 or "b" 0.7."""
    start, a, b = (torch.tensor([0, 0, *p]).log() for p in ((0.9, 0.1), (0.8, 0.2), (0.3, 0.7)))  # <eos> . a b
    return written_lm({(0,): start, (2,): a, (3,): b}, vocab=4, order=1)


def test_a_mask_and_a_condition_are_different_posteriors():
    """The text must end with "b".  p(ab) = 0.9 * 0.2 = 0.18 and p(bb) = 0.1 * 0.7 = 0.07: the condition gives "ab"
    0.18 / 0.25 = 0.72.  The mask forces the second token only: "ab" has 0.9, weight 0.2, and "bb" has 0.1, weight 0.7.
    """
    lm = two_tokens()
    ends = regex(lm, "[ab]b", stop=None)
    prompt = torch.tensor([0])

    def model():
        z = pyro.sample("z", Completion(lm, prompt, max_tokens=2, stop=None))
        pyro.factor("ends", ends.log_indicator(z))

    def local():
        pyro.sample("z", Completion(lm, prompt, max_tokens=2, stop=None, allowed=ends))

    condition, mask = Enumeration(model).run(), Enumeration(local).run()
    assert float(condition.log_evidence.exp()) == pytest.approx(0.25)
    assert dict(condition.table("z")) == pytest.approx({"ab": 0.72, "bb": 0.28})
    assert dict(mask.table("z")) == pytest.approx({"ab": 0.9, "bb": 0.1})
    posterior = SMC(model, local, num_particles=50, ess_threshold=0.0).run()
    by_text = dict(zip(lm.decode(posterior.samples["z"]), (posterior.log_weights.exp() * 50).tolist(), strict=True))
    assert by_text == pytest.approx({"ab": 0.2, "bb": 0.7})
