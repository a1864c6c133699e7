"""Stop strings: the law of a text that ends where what it spells ends with a string, by enumeration, everywhere."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from chunks import AB, EOS, WORDS, A, B, StringLaw, chunk_lm
from contracts import TextContract, assert_follows
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from pyro import poutine
from reference import Plain, tokens
from tiny import adapter, tiny_lm

from lmppl import text
from lmppl.constraints import regex
from lmppl.distributions import Completion
from lmppl.inference import (
    SMC,
    AutoGuide,
    Automaton,
    DetailedBalance,
    Enumeration,
    Importance,
    Markov,
    MetropolisHastings,
    PooledVarGrad,
    Posterior,
    Served,
    SiteMismatch,
    SubTB,
    VarGrad,
)
from lmppl.inference.core import programs
from lmppl.inference.core.query import Query
from lmppl.inference.core.sites import text_of
from lmppl.inference.core.weights import balance
from lmppl.stop_strings import StopStrings
from lmppl.text import PAD

PROMPT = torch.tensor([[A, PAD, PAD], [B, AB, A]])
PROMPTS = ((A,), (B, AB, A))


class TestBesideEos(TextContract):
    @pytest.fixture
    def lm(self):
        return chunk_lm()

    def make(self, lm):
        return Completion(lm, PROMPT, max_tokens=3, stop=["ab.", "eos", "ba"])

    def laws(self, plain):
        return [StringLaw(plain, p, 3, strings=("ab.", "ba")) for p in PROMPTS]


class TestAlone(TextContract):
    @pytest.fixture
    def lm(self):
        return chunk_lm()

    def make(self, lm):
        limits = {"max_tokens": torch.tensor([3, 2]), "min_tokens": torch.tensor([1, 0])}
        return Completion(lm, PROMPT, stop="abb", temperature=torch.tensor([0.7, 1.5], dtype=torch.float64), **limits)

    def laws(self, plain):
        return [
            StringLaw(plain, PROMPTS[0], 3, 1, (), None, 0.7, ("abb",)),
            StringLaw(plain, PROMPTS[1], 2, 0, (), None, 1.5, ("abb",)),
        ]


CASES = [
    (["aab"], 3, 0), (["aab", "eos"], 3, 2), (["eos", ".", "bb", "ba"], 3, 1), (["abab", "bab"], 3, 1), (["aa"], 2, 2),
    ("ab.", 3, 2), (["eos", "b..", "a.b"], 3, 0),
]  # fmt: skip


@pytest.mark.parametrize(("stop", "longest", "shortest"), CASES)
def test_the_law_by_brute_force(stop, longest, shortest):
    lm = chunk_lm()
    d = Completion(lm, PROMPT, max_tokens=longest, min_tokens=shortest, stop=stop)
    names = [stop] if isinstance(stop, str) else stop
    stops = tuple(EOS if s == "eos" else WORDS.index(s) for s in names if s == "eos" or s in WORDS)
    strings = tuple(s for s in names if s != "eos" and s not in WORDS)
    laws = [StringLaw(Plain(lm), p, longest, shortest, stops, strings=strings) for p in PROMPTS]
    assert d.stop_strings.strings == strings and d.event_shape == (longest + bool(stops),)
    assert_follows(d, laws)
    z, log_prob = d.sample_and_log_prob((200,))
    assert (d.log_prob(z) - log_prob).abs().max() < 1e-4
    for b, law in enumerate(laws):
        assert {tokens(row) for row in z[:, b]} <= law.support().keys()


def test_constraints_and_their_prefixes():
    """Asked about unfinished texts only."""
    lm, asked = chunk_lm(), []

    def no_repeat(prefix):
        asked.extend(prefix.tolist())
        mask = torch.ones(*prefix.shape[:-1], len(WORDS), dtype=torch.bool)
        return mask if prefix.shape[-1] == 0 else mask.scatter(-1, prefix[..., -1:], False)

    law = StringLaw(
        Plain(lm), PROMPTS[0], 3, 1, strings=("ab.", "ba"), allowed=lambda p: set(range(len(WORDS))) - set(p[-1:])
    )
    d = Completion(lm, PROMPT[:1], max_tokens=3, min_tokens=1, stop=["eos", "ab.", "ba"], allowed=no_repeat)
    assert_follows(d, [law])
    d.sample((50,))
    assert not any(law.completed(tuple(row[:t])) for row in asked for t in range(len(row) + 1))
    some = Completion(lm, PROMPT[:1], max_tokens=3, stop=["eos", "ab.", "ba"], allowed=[EOS, A, B, AB])
    assert_follows(some, [StringLaw(Plain(lm), PROMPTS[0], 3, strings=("ba",), allowed=lambda _: {EOS, A, B, AB})])


def test_prefix_scores_at_every_text():
    lm = chunk_lm()
    law = StringLaw(Plain(lm), PROMPTS[0], 3, 1, strings=("ab.", "ba"))
    d = Completion(lm, PROMPT[0], max_tokens=3, min_tokens=1, stop=["eos", "ab.", "ba"])
    texts = list(law.support())
    value = torch.tensor([z + (PAD,) * (4 - len(z)) for z in texts])
    log_probs, stops = d.prefix_scores(value)
    for z, found, stop in zip(texts, log_probs.tolist(), stops.tolist(), strict=True):
        assert found == pytest.approx(law.prefix_log_probs(z, 4), abs=2e-5)
        if law.completed(z):
            assert found[len(z)] == pytest.approx(law.log_prob(z), abs=2e-5) and stop[len(z)] == 0


def test_special_tokens_spell_nothing():
    lm = chunk_lm()
    d = Completion(lm, PROMPT[0], max_tokens=4, stop="aa")
    z = torch.tensor([A, EOS, EOS, A])
    assert d.log_prob(z) > -math.inf
    assert d.log_prob(torch.tensor([A, EOS, A])) > -math.inf  # ended
    assert d.log_prob(torch.tensor([A, EOS, A, B])) == -math.inf


def test_a_string_that_is_one_token_is_that_token():
    lm = chunk_lm()
    d = Completion(lm, PROMPT, max_tokens=2, stop="ab")
    assert d.stop_strings is None and d.stop.tolist() == [AB]


def test_regrow():
    """What is kept stays, what is drawn has the log-probability of its tokens, and an ended text comes back."""
    lm = chunk_lm()
    for stop in (["eos", "ab.", "ba"], ["ab.", "ba"]):
        d = Completion(lm, PROMPT, max_tokens=4, stop=stop)
        z = d.sample((50,))
        for keep in range(4):
            new, log_new = d.regrow(z, keep)
            assert (new[..., :keep] == z[..., :keep]).all() and (d.log_prob(new) > -math.inf).all()
            assert (d.token_log_probs(new)[..., keep:].sum(-1) - log_new).abs().max() < 1e-4
            whole = text.length(z) <= keep
            assert (new[whole] == z[whole]).all() and (log_new[whole] == 0).all()


def test_a_tool_may_complete_it():
    lm = chunk_lm()
    d = Completion(lm, PROMPT, max_tokens=4, stop=["eos", "bb"], tools=[lambda s: "bbaa" if s.endswith("a") else None])
    z = d.enumerate_support()
    assert d.log_prob(z).logsumexp(0).abs().max() < 1e-5
    possible = z[d.log_prob(z)[:, 0] > -math.inf][:, 0]
    law = StringLaw(Plain(lm), PROMPTS[0], 4, strings=("bb",))
    assert not any(law.over(row[:t]) for row in map(tokens, possible) for t in range(len(row)))
    assert "abb" in lm.decode(possible) and not any(s.startswith("abba") for s in lm.decode(possible))


def test_grammars_are_complete_where_a_string_ends_them():
    lm = chunk_lm()
    pattern = regex(lm, r"(?:a|b)*b\.", stop=["eos", "ab."])
    d = Completion(lm, PROMPT, max_tokens=4, stop=["eos", "ab."], allowed=pattern)
    z = d.sample((100,))
    ended = torch.tensor([[s.endswith("ab.") for s in row] for row in lm.decode(z)])
    assert ended.any() and pattern.accepts(z)[ended].all()
    never = regex(lm, r"(?:a|b|\.)*a", stop="ab.")
    z = Completion(lm, PROMPT, max_tokens=3, stop="ab.", allowed=never).sample((100,))
    assert not any(s.endswith("ab.") for row in lm.decode(z) for s in row)


# Inference


def program(lm, stop):
    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(lm, PROMPT, max_tokens=3, min_tokens=1, stop=stop))
            pyro.factor("f", score(z, lm))

    return model


def score(z, lm):
    return text.map(lambda s: -0.5 * s.count("b") + 1.0 * s.endswith("ba"), z, lm)


@pytest.mark.parametrize("stop", [["eos", "ab.", "ba"], ["ab.", "ba"]])
def test_evidence(stop):
    lm = chunk_lm()
    fn = Completion(lm, PROMPT, max_tokens=3, min_tokens=1, stop=stop)
    z = fn.enumerate_support()
    exact = (fn.log_prob(z) + score(z, lm)).logsumexp(0).detach()
    found = Enumeration(program(lm, stop)).run()
    assert (found.log_evidence - exact).abs().max() < 1e-5 and found.log_evidence_bounds is not None
    partly = Enumeration(program(lm, stop), mass=0.5).run()
    assert (partly.unexplored <= 0.5).all()
    pyro.set_rng_seed(0)
    for algorithm in (
        Importance(program(lm, stop), num_particles=50),
        Importance(program(lm, stop), program(adapter(lm, 1), stop), num_particles=50),
        SMC(program(lm, stop), num_particles=20),
        SMC(program(lm, stop), program(adapter(lm, 1), stop), num_particles=20, twist="stop"),
        SMC(program(lm, stop), program(adapter(lm, 1), stop), num_particles=20, twist="flow"),
    ):
        runs = torch.stack([algorithm.run().log_evidence.exp() for _ in range(16)])
        error = runs.std(0) / math.sqrt(len(runs))
        assert ((runs.mean(0) - exact.exp()).abs() < 5 * error + 1e-6).all()


@pytest.mark.parametrize("stop", [["eos", "ab.", "ba"], ["ab.", "ba"]])
def test_metropolis(stop):
    """The mean of the factor under the chains is the posterior's, to 5 standard errors over chains."""
    lm = chunk_lm()
    fn = Completion(lm, PROMPT, max_tokens=3, min_tokens=1, stop=stop)
    z = fn.enumerate_support()
    posterior = (fn.log_prob(z) + score(z, lm)).detach().softmax(0)
    exact = (posterior * score(z, lm)).sum(0)
    pyro.set_rng_seed(0)
    found = MetropolisHastings(program(lm, stop), num_chains=200, num_samples=10, warmup=10).run()
    by_chain = score(found.samples["z"], lm).view(200, 10, 2).mean(1)
    assert ((by_chain.mean(0) - exact).abs() < 5 * by_chain.std(0) / math.sqrt(200)).all()


def test_balance_is_u_of_the_stopped_prefixes():
    """Every column has the log-densities of the text that was cut there, computed one text at a time."""
    stop = ["eos", "ab.", "ba"]
    lm = chunk_lm()
    q_lm = adapter(lm, 1)
    p, q = (Completion(m, PROMPT, max_tokens=3, min_tokens=1, stop=stop) for m in (lm, q_lm))
    law = StringLaw(Plain(lm), PROMPTS[0], 3, 1, strings=("ab.", "ba"))
    pyro.set_rng_seed(0)
    model, guide = program(lm, stop), plain_guide(q_lm, stop)
    drawn = programs.trace(guide, (), {}, nesting=1, particles=40)
    b = balance(Query(model, guide), drawn, 40, "z")
    by_string = 0
    for n, row in enumerate(drawn.nodes["z"]["value"]):
        for i, cuts in enumerate(law.stopped(tokens(z)) for z in row):
            value = torch.tensor([z + (PAD,) * (4 - len(z)) for z in cuts])[:, None].expand(-1, 2, 4)
            log_q, log_p = q.log_prob(value)[:, i], p.log_prob(value)[:, i] + score(value, lm)[:, i]
            valid = b.valid[: len(cuts), n, i]
            assert (valid == (log_q > -math.inf)).all() and not b.valid[len(cuts) :, n, i].any()
            assert (b.log_q[: len(cuts), n, i] - log_q)[valid].abs().max() < 1e-4
            assert (b.log_p[: len(cuts), n, i] - log_p)[valid].abs().max() < 1e-4
            assert valid[-1] and b.last[len(cuts) - 1, n, i] and not b.last[: len(cuts) - 1, n, i].any()
            by_string += law.completed(cuts[-1])
    assert 10 < by_string < 70


def plain_guide(lm, stop):
    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", Completion(lm, PROMPT, max_tokens=3, min_tokens=1, stop=stop))

    return guide


@pytest.mark.parametrize("objective", [VarGrad, SubTB, DetailedBalance, PooledVarGrad])
@pytest.mark.parametrize("stop", [["eos", "ab.", "ba"], ["ab.", "ba"]])
def test_objectives_vanish_at_the_posterior_and_not_elsewhere(objective, stop):
    """Without a factor the prior is the posterior, however its prefixes are stopped."""
    lm = chunk_lm(dtype=torch.float64)
    pyro.set_rng_seed(0)
    loss = objective(num_particles=16)
    assert loss.loss(plain_guide(lm, stop), plain_guide(lm, stop)) < 1e-20
    assert loss.loss(program(lm, stop), plain_guide(lm, stop)) > 1e-3


def test_prefixes_of_other_stop_strings_are_refused():
    lm = chunk_lm()
    with pytest.raises(SiteMismatch, match=r"'z'.*'ab\.'.*'ba'"):
        SubTB(num_particles=4).loss(plain_guide(lm, ["eos", "ba"]), plain_guide(lm, ["eos", "ab."]))


def test_autoguide_carries_them_over():
    lm = chunk_lm()
    model = program(lm, ["eos", "ab.", "ba"])
    guide = AutoGuide(model, LoraConfig(r=2, target_modules="all-linear"), args=())
    fn = poutine.trace(guide).get_trace().nodes["z"]["fn"]
    assert fn.stop.tolist() == [EOS] and fn.stop_strings.strings == ("ab.", "ba")
    assert PooledVarGrad(num_particles=8).loss_and_grads(model, guide) > 0
    assert any(p.grad.abs().sum() > 0 for p in fn.lm.trainable_parameters())


def test_posteriors_keep_them(tmp_path):
    """Saved and loaded; their marginals score the prefixes as they are."""
    lm = chunk_lm()
    stop = ["eos", "ab.", "ba"]
    found = Enumeration(program(lm, stop)).run()
    found.save(tmp_path / "saved")
    assert Posterior.load(tmp_path / "saved", lm).sites.stops == {"z": [EOS, "ab.", "ba"]}
    fn = Completion(lm, PROMPT, max_tokens=3, min_tokens=1, stop=stop)
    prior = Enumeration(plain_guide(lm, stop)).run().distribution("z")
    z = fn.sample((20,))
    expected, own = fn.prefix_scores(z), prior.prefix_scores(z)
    assert (own.log_probs.exp() - expected.log_probs.exp()).abs().max() < 1e-5
    assert (own.stop_log_probs.exp() - expected.stop_log_probs.exp()).abs().max() < 1e-4


def test_what_cannot_take_them_says_so():
    lm = chunk_lm()
    fn = Completion(lm, PROMPT[0], max_tokens=3, stop=["eos", "ba"])
    with pytest.raises(ValueError, match="prior: a stop string"):
        Markov(fn, Automaton.counting(torch.zeros(lm.vocab_size)), order=1)
    with pytest.raises(ValueError, match=r"exploration: a server .*'ba'"):
        Served(lm, "http://localhost:1/v1", "guide").remote(text_of(fn))


# The automaton

LETTERS = st.text("ab", min_size=1, max_size=4)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.text("ab", max_size=3), min_size=1, max_size=5, unique=True),
    st.lists(LETTERS, min_size=1, max_size=3, unique=True),
    st.lists(st.integers(0, 4), max_size=12),
)
def test_ends_wherever_what_is_spelled_ends_with_a_string(words, strings, ids):
    words = [*words, "a", "b"]
    ids = [i % len(words) for i in ids]
    automaton = StopStrings([w.encode() for w in words], strings)
    spelled = ["".join(words[i] for i in ids[: t + 1]) for t in range(len(ids))]
    expected = [any(s.endswith(x) for x in strings) for s in spelled]
    value = torch.tensor([*ids, PAD], dtype=torch.long)
    assert automaton.ends(value).tolist() == [*expected, False]
    for t in range(len(ids)):
        assert automaton.final[automaton.states(value[: t + 1], t + 1)].tolist() == expected[t : t + 1]
        completing = automaton.completing(automaton.states(value[:t], t)[0])
        before = spelled[t - 1] if t else ""
        assert completing.tolist() == [any((before + w).endswith(x) for x in strings) for w in words]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.text("ab", max_size=3), min_size=1, max_size=4, unique=True), LETTERS)
def test_refused_if_and_only_if_no_tokens_spell_it(words, string):
    reached = {k for k in range(1, len(string) + 1) if any(w.endswith(string[:k]) for w in words)}
    for k in range(1, len(string) + 1):
        if any(j in reached and string[j:k] in words for j in range(1, k)):
            reached.add(k)
    if len(string) in reached:
        StopStrings([w.encode() for w in words], [string])
    else:
        with pytest.raises(ValueError, match=f"stop='{string}'"):
            StopStrings([w.encode() for w in words], [string])


@pytest.mark.parametrize(
    ("stop", "message"), [("", "stop=''"), ("xyz", "stop='xyz'"), (["eos", "ax"], "stop='ax'"), ([], "stop is empty")]
)
def test_bad_stops(stop, message):
    lm = tiny_lm(vocab=8)  # letters up to f
    with pytest.raises(ValueError, match=message):
        Completion(lm, "a", max_tokens=3, stop=stop)
    with pytest.raises(ValueError, match=message):
        regex(lm, "a*", stop=stop)


def test_where_a_token_is_expected():
    lm = tiny_lm(vocab=8)
    for ask in (lm.token_id, lm.stop_ids):
        with pytest.raises(ValueError, match="stop='ab' is written .*one token is expected"):
            ask("ab")
    assert lm.encode("ccc", stop="ab").tolist() == [*lm.encode("cccab")]
    for bad, message in (("xy", "stop.*'xy'"), ("", "stop='' is an empty string")):
        with pytest.raises(ValueError, match=message):
            lm.encode("ccc", stop=bad)
    d = Completion(lm, "a", max_tokens=5, stop="ab")
    assert d.log_prob(lm.encode("ccc", stop="ab")) > -math.inf == d.log_prob(lm.encode("ccc"))
