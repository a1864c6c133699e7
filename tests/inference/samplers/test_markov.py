"""Dynamic programming against brute force at short lengths; then sampling against dynamic programming at length 20."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from five_sigma import evidence_within
from hypothesis import given, settings
from hypothesis import strategies as st
from ngrams import ngram_lm
from reference import Law, Plain, tokens
from tiny import flat_lm
from torch import Tensor

from lmppl import LanguageModel, text
from lmppl.constraints import ban
from lmppl.distributions import Completion
from lmppl.inference.core.resampling import SCHEMES
from lmppl.inference.samplers.importance import Importance
from lmppl.inference.samplers.markov import Automaton, Markov
from lmppl.inference.samplers.smc.bounds import Sandwich
from lmppl.inference.samplers.smc.smc import SMC

V = 5  # <eos> . a b c
EOS, DOT, A, B, C = range(V)
KINDS = ("counting", "containing", "ending", "all")


def factor_of(kind: str, seed: int) -> Automaton:
    numbers = torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parts = {
        "counting": Automaton.counting(numbers),
        "containing": Automaton.containing(A, V, present=float(numbers[0])),
        "ending": Automaton.ending(numbers, empty=float(numbers[1])),
    }
    return parts["counting"] * parts["containing"] * parts["ending"] if kind == "all" else parts[kind]


def by_hand(factor: Automaton, z: tuple[int, ...], stops: tuple[int, ...]) -> float:
    """log psi by following the arrows."""
    a, total = 0, 0.0
    for v in z:
        if v in stops:
            break
        total += float(factor.step[a, v])
        a = int(factor.next[a, v])
    return total + float(factor.final[a])


# -- n-gram language models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2])
def test_an_ngram_is_a_language_model(order):
    """Sampling without a cache, scoring and prefix scores agree with plain loops over its table."""
    lm = ngram_lm(V, order)
    x = ["ab", "c", ""]
    fn = Completion(lm, lm.encode(x), max_tokens=3)
    z, log_p = fn.sample_and_log_prob((20,))
    torch.testing.assert_close(log_p, fn.log_prob(z).detach())
    prefix = fn.prefix_log_probs(z).detach()
    for b, prompt in enumerate(x):
        law = Law(Plain(lm), tokens(lm.encode(prompt)), 3)
        for i in range(20):
            assert float(log_p[i, b]) == pytest.approx(law.log_prob(tokens(z[i, b])), abs=1e-9)
            assert prefix[i, b].tolist() == pytest.approx(law.prefix_log_probs(tokens(z[i, b]), 4), abs=1e-9)


def test_an_ngram_depends_on_its_order_and_no_more():
    lm = ngram_lm(V, 2)
    last = [lm.forward(lm.encode([s])).logits[0, -1] for s in ("abc", "bbc", "bac", "bc")]
    assert torch.equal(last[0], last[1]) and not torch.equal(last[0], last[2])
    assert torch.equal(last[3], last[1])
    begins = lm.forward(lm.encode(["c"])).logits[0, -1]  # a row of its own
    assert not torch.equal(begins, last[0])


def test_an_ngram_is_saved_and_loaded(tmp_path):
    lm = ngram_lm(V, 1)
    lm.save_pretrained(tmp_path / "bigram")
    again = LanguageModel.from_pretrained(tmp_path / "bigram")
    assert torch.equal(again.model.table, lm.model.table) and again.model.config.order == 1


# -- dynamic programming against brute force -------------------------------------------------------------------------

RULES = {
    "plain": {},
    "bounds": {"min_tokens": 2, "temperature": 2.0},
    "several stops": {"stop": ["eos", "."]},
    "no stop": {"stop": None},
    "banned": {"allowed": [EOS, A, B]},
}


@settings(max_examples=5)
@given(
    seed=st.integers(0, 1000),
    order=st.integers(0, 2),
    prompt=st.sampled_from(["", "a", "cab"]),
    kind=st.sampled_from(KINDS),
)
@pytest.mark.parametrize("rules", RULES)
def test_evidence_marginals_and_twist_against_every_text(rules, seed, order, prompt, kind):
    lm = ngram_lm(V, order, seed)
    fn = Completion(lm, lm.encode(prompt), max_tokens=3, **RULES[rules])
    factor = factor_of(kind, seed)
    exact = Markov(fn, factor)

    z = fn.enumerate_support()  # (K, E)
    stops = tuple(fn.stop.tolist())
    log_psi = torch.tensor([by_hand(factor, tokens(row), stops) for row in z], dtype=torch.float64)
    torch.testing.assert_close(factor.log_factor(z, fn.stop), log_psi)
    log_p = fn.log_prob(z).detach()
    torch.testing.assert_close(log_p.logsumexp(0), torch.zeros((), dtype=torch.float64))
    log_w = log_p + log_psi
    if float(log_w.logsumexp(0)) == -math.inf:
        assert float(exact.log_evidence) == -math.inf
        with pytest.raises(ValueError, match="every text is impossible"):
            exact.sample(1)
        return
    torch.testing.assert_close(exact.log_evidence, log_w.logsumexp(0), rtol=1e-10, atol=1e-10)

    posterior = log_w.softmax(0)
    marginals = torch.stack([((z == v).double() * posterior[:, None]).sum(0) for v in range(V)], 1)  # (E, V)
    torch.testing.assert_close(exact.marginals, marginals, rtol=1e-9, atol=1e-12)

    for t in range(z.shape[1] + 1):  # the twist at every prefix of every text
        begins = (z[:, None, :t] == z[None, :, :t]).all(-1)  # (K, K)
        mass = torch.where(begins, log_p, -torch.inf).logsumexp(1)
        weight = torch.where(begins, log_w, -torch.inf).logsumexp(1)
        torch.testing.assert_close(exact.log_psi(z[:, :t]), weight - mass, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rules", RULES)
def test_samples_have_the_posterior_law(rules):
    lm = ngram_lm(V, 1, seed=3)
    fn = Completion(lm, lm.encode("a"), max_tokens=3, **RULES[rules])
    factor = factor_of("all", 3)
    z = fn.enumerate_support()
    p = (fn.log_prob(z).detach() + factor.log_factor(z, fn.stop)).softmax(0)
    n = 20_000
    drawn = Markov(fn, factor).sample(n)
    assert drawn.shape == (n, *fn.event_shape)
    both, kind = torch.unique(torch.cat([z, drawn]), dim=0, return_inverse=True)
    assert len(both) == len(z)  # no text outside the support
    count = torch.bincount(kind[len(z) :], minlength=len(z))[kind[: len(z)]]
    error = (p * (1 - p) / n).sqrt()
    assert bool(((count / n - p).abs() <= 5 * error + 1e-3).all())
    assert not bool(count[p == 0].any())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda lm: Markov(Completion(flat_lm(vocab=V), "a", max_tokens=3), factor_of("counting", 0), 1), "order"),
        (lambda lm: Markov(Completion(flat_lm(vocab=V), "a", max_tokens=3), factor_of("counting", 0)), "order"),
        (lambda lm: Markov(Completion(ngram_lm(V, 2), "a", max_tokens=3), factor_of("counting", 0), 1), "order"),
        (lambda lm: Markov(Completion(lm, ["a", "b"], max_tokens=3), factor_of("counting", 0)), "prior"),
        (lambda lm: Markov(Completion(lm, "a", max_tokens=3, allowed=lambda z: z), factor_of("counting", 0)), "prior"),
        (lambda lm: Markov(Completion(lm, "a", max_tokens=3), Automaton.containing(1, 4)), "factor"),
        (lambda lm: Automaton(torch.full((1, V), 1), torch.zeros(1, V), torch.zeros(1)), "next"),
        (lambda lm: Automaton(torch.zeros(1, V).long(), torch.zeros(1, 2), torch.zeros(1)), "step"),
    ],
)
def test_bad_input(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(ngram_lm(V, 1))


def test_a_wider_order_than_needed_gives_the_same():
    lm = ngram_lm(V, 1)
    fn, factor = Completion(lm, "a", max_tokens=6), factor_of("all", 1)
    torch.testing.assert_close(Markov(fn, factor, 3).log_evidence, Markov(fn, factor).log_evidence)


# -- length 20, where nothing can be enumerated ----------------------------------------------------------------------

LENGTH, RUNS = 20, 200
LM = ngram_lm(V, 1, seed=2, scale=0.7)
PRIOR = Completion(LM, "a", max_tokens=LENGTH, min_tokens=12)
Y = LM.encode("ba", stop="eos")


def observed() -> Automaton:
    """p(y | z) depends on the last token of z alone, for it is all that a bigram sees of it."""
    last = LM.encode(["a", ".", "a", "b", "c"])  # an eos is never last
    return Automaton.ending(Completion(LM, last, max_tokens=3).log_prob(Y).detach())


COUNTED = Automaton.counting(torch.tensor([0.0, 0.0, -0.3, 0.2, 0.15]))
LONG = COUNTED * Automaton.containing(DOT, V, present=0.0, absent=-2.0) * observed()


def model():
    """The same program written with sites: factors of z, and a text observed after it."""
    with pyro.plate("runs", RUNS):
        z = pyro.sample("z", PRIOR)
        factor = COUNTED * Automaton.containing(DOT, V, present=0.0, absent=-2.0)
        pyro.factor("likes", factor.log_factor(z, PRIOR.stop))
        pyro.sample("y", Completion(LM, LM.join("a", z), max_tokens=3), obs=Y)


def test_importance_sampling_at_length_20():
    found = Importance(model, num_particles=64).run()
    evidence_within(found.log_evidence, Markov(PRIOR, LONG).log_evidence, 0.05)


def likes(prefix: Tensor) -> Tensor:
    """What was counted so far, and whether the "." is there: no look ahead."""
    return (COUNTED * Automaton.containing(DOT, V, present=0.0, absent=-2.0)).log_factor(prefix, PRIOR.stop)


@pytest.mark.parametrize(
    ("scheme", "twist"),
    [*(("systematic", twist) for twist in (None, "stop", "flow", likes)), *((s, "optimal") for s in SCHEMES)],
)
def test_smc_at_length_20(scheme, twist):
    exact = Markov(PRIOR, LONG)
    posterior = SMC(model, None, 16, resampling=scheme, twist=exact.log_psi if twist == "optimal" else twist).run()
    evidence_within(posterior.log_evidence, exact.log_evidence, 0.1)


@pytest.mark.slow
def test_the_better_the_twist_the_less_evidence_varies():
    """The variance of log evidence: 1.15 with no twist, 0.58 with the factor so far, 0.36 with the optimal one."""
    factor = Automaton.counting(3 * COUNTED.step[0]) * Automaton.containing(DOT, V, present=0.0, absent=-2.0)
    prior = Completion(LM, "a", max_tokens=30, min_tokens=20)
    exact = Markov(prior, factor)

    def program():
        with pyro.plate("runs", RUNS):
            pyro.factor("likes", factor.log_factor(pyro.sample("z", prior), prior.stop))

    def so_far(prefix):
        return factor.log_factor(prefix, prior.stop)

    def variance(twist) -> float:
        smc = SMC(program, None, 16, 1.0, twist=twist)
        return sum(float(smc.run().log_evidence.var()) for _ in range(8)) / 8

    none, some, best = map(variance, (None, so_far, exact.log_psi))
    assert none > 1.2 * some > 1.2 * 1.2 * best  # each is known to 5%


def test_posterior_marginals_by_smc_at_length_20():
    """Weighted particles of all runs against forward-backward: E sum W f = Z E f, 5 standard errors."""
    exact = Markov(PRIOR, LONG)
    posterior = SMC(model, None, 32, twist=exact.log_psi).run()
    weight = (posterior.log_weights.double() - exact.log_evidence).exp()  # (N, runs)
    z = text.pad(posterior.samples["z"], LENGTH + 1)
    for t in (0, 7, 16, 20):
        of_each = torch.stack([(weight * (z[..., t] == v)).sum(0) for v in range(V)])  # (V, runs)
        error = of_each.std(1) / RUNS**0.5
        assert bool(((of_each.mean(1) - exact.marginals[t]).abs() <= 5 * error + 1e-9).all())


def test_the_sandwich_at_length_20():
    """Both bounds on their sides of the exact log Z, within 5 standard errors, from exact posterior draws."""
    exact = Markov(PRIOR, LONG)
    gaps = []
    for n in (4, 32):
        bounds = Sandwich(model, None, n, twist=exact.log_psi).run(exact_sample={"z": exact.sample(RUNS)})
        low, high = bounds.lower - exact.log_evidence, bounds.upper - exact.log_evidence  # (runs,)
        assert float(low.mean()) <= 5 * float(low.std()) / RUNS**0.5
        assert float(high.mean()) >= -5 * float(high.std()) / RUNS**0.5
        inverse = (-high).exp()
        assert abs(float(inverse.mean()) - 1) <= 5 * float(inverse.std()) / RUNS**0.5
        gaps.append(float(bounds.gap.mean()))
    assert 0 < gaps[1] < 0.5 * gaps[0]


def test_a_banned_token_in_the_proposal():
    """A guide that the constraint narrows: texts that must not have a "." are reached by it alone."""
    factor = Automaton.containing(DOT, V, present=-math.inf, absent=0.0)

    def program():
        with pyro.plate("runs", RUNS):
            z = pyro.sample("z", PRIOR)
            pyro.factor("hard", factor.log_factor(z, PRIOR.stop))

    def guide():
        with pyro.plate("runs", RUNS):
            allowed = ban(LM, ".")
            pyro.sample("z", Completion(LM, "a", max_tokens=LENGTH, min_tokens=12, allowed=allowed))

    exact = Markov(PRIOR, factor).log_evidence
    evidence_within(SMC(program, guide, 16, 0.5).run().log_evidence, exact, 0.1)
