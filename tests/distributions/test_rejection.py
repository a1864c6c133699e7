"""Adaptive weighted rejection sampling against exhaustive expectations; `Check` against the mask it stands for."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from five_sigma import within
from hypothesis import given, settings
from hypothesis import strategies as st
from programs_by_hand import contains
from pyro import poutine
from tiny import tiny_lm
from torch import Tensor

from lmppl import LanguageModel
from lmppl.constraints import Check, ban, every, only
from lmppl.distributions import Completion, DeadEnd
from lmppl.distributions.rejection import Repeats, reject, scramble
from lmppl.inference import SMC, Importance
from lmppl.text import length

LM = tiny_lm(vocab=6)  # <eos> . a b c d
RUNS = 600


# -- one token -------------------------------------------------------------------------------------------------------


class Fork(Exception):
    """A course of draws is written down no further; ``args`` are the tokens that may come next."""


def course(probs: Tensor, passes: Tensor, script: tuple[int, ...], **kwargs) -> tuple[float, int, float, int]:
    """What happens when the draws are those of ``script``: its probability, the token, W-hat, the checks asked for."""
    chances, asked = [], []

    def choose(left: Tensor, row: Tensor, k: int) -> Tensor:
        p = left[0] / left[0].sum()
        if k == len(script):
            raise Fork(*p.nonzero()[:, 0].tolist())
        chances.append(float(p[script[k]]))
        return torch.tensor([script[k]])

    def ask(row: Tensor, token: Tensor) -> Tensor:
        asked.extend(token.tolist())
        return passes[token]

    token, log_mass = reject(probs[None], ask, choose, **kwargs)
    assert len(set(asked)) == len(asked), "a token was asked about twice"
    return math.prod(chances), int(token), float(log_mass.exp()), len(asked)


def paths(probs: Tensor, passes: Tensor, **kwargs) -> list[tuple[float, int, float, int]]:
    """Every course that the draws can take."""
    found, scripts = [], [()]
    while scripts:
        script = scripts.pop()
        try:
            found.append(course(probs, passes, script, **kwargs))
        except Fork as fork:
            scripts.extend((*script, v) for v in fork.args)
    return found


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.floats(1e-6, 1), st.booleans()), min_size=2, max_size=4).filter(
        lambda x: any(c for _, c in x)
    ),
    st.integers(2, 3),
    st.integers(1, 4),
)
def test_the_weight_is_proper(tokens, accepts, patience):
    """E[W-hat 1{x = v}] = p(v) c(v) and P(x = v) = p(v) c(v) / W for every v, summed over every course of the draws."""
    probs = torch.tensor([p for p, _ in tokens], dtype=torch.double)
    passes = torch.tensor([c for _, c in tokens])
    probs = probs / probs.sum()
    kept = probs * passes
    weighed, drawn = torch.zeros_like(probs), torch.zeros_like(probs)
    for chance, token, mass, _ in paths(probs, passes, accepts=accepts, patience=patience):
        assert 0 < mass <= 1 + 1e-9
        weighed[token] += chance * mass
        drawn[token] += chance
    torch.testing.assert_close(weighed, kept, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(drawn, kept / kept.sum(), rtol=1e-8, atol=1e-12)


def test_the_weight_varies_less_than_with_the_rejected_tokens_left_in():
    """Against (r - 1) / (N - 1) with N negative binomial: the same mean, and E[1 / (N - 1)^2] is no smaller."""
    probs, passes = torch.tensor([0.5, 0.2, 0.2, 0.1]).double(), torch.tensor([False, True, False, True])
    second = sum(chance * mass**2 for chance, _, mass, _ in paths(probs, passes))
    mass = 0.3
    plain = sum(n * mass**2 * (1 - mass) ** (n - 1) / n**2 for n in range(1, 400))
    assert mass**2 < second < 0.96 * plain


def test_a_check_that_passes_everything_costs_two_draws_and_keeps_all():
    probs = torch.tensor([0.9, 0.05, 0.05]).double()
    for _, _, mass, asked in paths(probs, torch.ones(3, dtype=torch.bool)):
        assert mass == pytest.approx(1) and asked <= 2


def test_nothing_passes():
    (only_path,) = {(v, m) for _, v, m, _ in paths(torch.tensor([0.5, 0.5]).double(), torch.zeros(2, dtype=torch.bool))}
    assert only_path == (-1, 0.0)


@given(st.floats(1e-12, 1 - 1e-6), st.integers(0, 30))
def test_the_expectation_of_repeats(mass, before):
    """``before`` draws with nothing known, then two with all but m known: E[1 / (before + 1 + K)] of K repeats, where
    P(K = k) = (k + 1) m^2 (1 - m)^k: by its series, or in closed form.
    """
    repeats = Repeats(1, torch.device("cpu"))
    row = torch.zeros(1, dtype=torch.long)
    for known in [1.0] * before + [mass] * 2:
        repeats.before(row, torch.tensor([known], dtype=torch.double))
    found = float(repeats.log_expectation(2).exp())
    if before == 1:
        rho = 1 - mass
        exact = (mass / rho) ** 2 * (math.log(mass) + rho / mass)
        if mass < 0.9:
            assert found == pytest.approx(exact, rel=1e-9)
    if mass > 0.02:
        k = torch.arange(20_000, dtype=torch.double)
        series = ((k + 1) * mass**2 * (1 - mass) ** k / (before + 1 + k)).sum()
        assert found == pytest.approx(float(series), rel=1e-9)
    if before == 0:  # E[1 / (1 + K)] = m, whatever m
        assert found == pytest.approx(mass, rel=1e-9)


def test_rows_do_not_depend_on_one_another():
    probs = torch.rand(20, 9).double()
    passes, uniform = torch.rand(20, 9) < 0.4, torch.rand(20)
    passes[:, 0] = True

    def run(rows: Tensor):
        def choose(left: Tensor, row: Tensor, k: int) -> Tensor:
            at = scramble(uniform[rows[row]], k)[:, None] * left.sum(1, keepdim=True)
            return torch.searchsorted(left.cumsum(1), at, right=True)[:, 0]

        return reject(probs[rows], lambda row, token: passes[rows[row], token], choose)

    together = run(torch.arange(20))
    for r in range(20):
        alone = run(torch.tensor([r]))
        assert int(alone.token) == int(together.token[r])
        torch.testing.assert_close(alone.log_mass[0], together.log_mass[r])


def test_the_stream_of_uniform_numbers():
    """Uniform and without correlation: means and covariances within 5 standard errors."""
    n = 100_000
    first = torch.rand(n)
    u = torch.stack([first.double(), *(scramble(first, k) for k in range(1, 6))]) - 0.5
    assert bool((u >= -0.5).all()) and bool((u < 0.5).all())
    assert bool((u.mean(1).abs() < 5 * (1 / 12 / n) ** 0.5).all())
    covariance = u @ u.T / n * 12 - torch.eye(6)
    assert bool((covariance.abs() < 5 / n**0.5).all())


# -- texts -----------------------------------------------------------------------------------------------------------


def no_repeat(prefix: Tensor, token: Tensor) -> Tensor:
    """Not the same token twice in a row, and a "d" only after a "c"."""
    if not prefix.shape[1]:
        return token != 5
    return (prefix[:, -1] != token) & ((token != 5) | (prefix[:, -1] == 4))


def check(**kwargs) -> Check:
    return Check(LM, no_repeat, **kwargs)


def same_as_mask(prefix: Tensor) -> Tensor:
    """The mask that the check stands for."""
    return check()(prefix)


def completion(**kwargs) -> Completion:
    return Completion(LM, "ab", **{"max_tokens": 3, "temperature": 3.0} | kwargs)


def evidence(log_p, following) -> float:
    with torch.no_grad():
        z = completion().enumerate_support()
        return float((log_p(z) + following(z)).double().logsumexp(0).exp())


@pytest.mark.parametrize("stop", ["eos", ["eos", "."]])
def test_log_prob_is_that_of_the_mask(stop):
    z = completion(stop=stop).enumerate_support()
    found, expected = (completion(stop=stop, allowed=c).log_prob(z).detach() for c in (check(), same_as_mask))
    torch.testing.assert_close(found, expected)
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("kwargs", [{}, {"stop": ["eos", "."], "min_tokens": 1}, {"stop": None}, {"patience": 1}])
def test_samples_come_from_exactly_the_masked_distribution(kwargs):
    """Frequencies of all texts, within 5 standard errors."""
    own = {k: v for k, v in kwargs.items() if k == "patience"}
    given = {"max_tokens": 2} | {k: v for k, v in kwargs.items() if k != "patience"}
    fn, n = completion(allowed=check(**own), **given), 10_000
    z = fn.sample((n,))
    texts, counts = torch.unique(z, dim=0, return_counts=True)
    p = fn.log_prob(texts).detach().double().exp()
    assert float(p.sum()) > 0.99
    error = (p * (1 - p) / n).sqrt()
    assert bool(((counts / n - p).abs() <= 5 * error + 1e-9).all())


def test_where_tokens_are_also_drawn_evenly_the_log_probability_is_no_estimate():
    """What is spread evenly goes to what passes, so that all of it must be known."""
    fn = completion(allowed=check()).broadened(epsilon=0.4)
    steps = fn.token_steps(torch.Size([50]))
    token, log_q = steps.propose(torch.rand(50))
    torch.testing.assert_close(log_q, steps.score(token).to(log_q.dtype))
    estimated = completion(allowed=check()).token_steps(torch.Size([50]))
    token, log_q = estimated.propose(torch.rand(50))
    assert bool(((log_q - estimated.score(token)).abs() > 1e-3).any())
    token, log_q = estimated.draw(torch.rand(50))
    torch.testing.assert_close(log_q, estimated.score(token).to(log_q.dtype))


def test_sample_and_log_prob_is_exact():
    fn = completion(allowed=check())
    z, log_prob = fn.sample_and_log_prob((40,))
    torch.testing.assert_close(log_prob, fn.log_prob(z).detach(), rtol=1e-9, atol=1e-9)
    z, log_prob = fn.regrow(z, 1)
    later = fn.token_log_probs(z).detach()[:, 1:].sum(1)
    torch.testing.assert_close(log_prob, later, rtol=1e-9, atol=1e-9)


def test_the_same_seed_gives_the_same_texts_however_they_are_chunked():
    fn, found = completion(allowed=check()), []
    for budget in (16_384, 20):
        LM.token_budget = budget
        pyro.set_rng_seed(3)
        found.append(fn.sample((30,)))
    LM.token_budget = 16_384
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "allowed",
    [
        check,
        lambda: check(accepts=4, patience=2),
        lambda: every(check(), only(LM, [0, 1, 2, 3, 4])),
        lambda: every(Check(LM, lambda p, v: v != 3), check(), ban(LM, ["."])),
    ],
    ids=["check", "patience", "within", "every"],
)
@pytest.mark.parametrize(("ess_threshold", "twist"), [(0.0, None), (0.9, None), (0.9, "stop")])
def test_smc_with_checked_proposals_is_unbiased(allowed, ess_threshold, twist):
    """The model is unconstrained, its factor asks for the same texts and likes an "a"."""
    proposal = allowed()

    def likes(z: Tensor) -> Tensor:
        return (2.0 * contains(z, 2)).masked_fill(~proposal.accepts(z), -torch.inf)

    def model():
        with pyro.plate("runs", RUNS):
            pyro.factor("likes", likes(pyro.sample("z", completion())))

    def guide():
        with pyro.plate("runs", RUNS):
            pyro.sample("z", completion(allowed=proposal))

    posterior = SMC(model, guide, 6, ess_threshold, twist=twist).run()
    within(posterior.log_evidence.exp(), evidence(completion().log_prob, likes), sharp=0.1)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_model_that_has_the_check_itself(scale):
    """Where model and proposal are one, the estimate cancels; where the sequence is tempered it must not be one."""

    def model():
        with pyro.plate("runs", RUNS), poutine.scale(scale=scale):
            z = pyro.sample("z", completion(allowed=check()))
            pyro.factor("likes", 2.0 * contains(z, 2).double())

    posterior = SMC(model, num_particles=6).run()
    with torch.no_grad():
        z = completion().enumerate_support()
        z = z[completion(allowed=check()).log_prob(z) > -torch.inf]
        log_joint = scale * (completion(allowed=check()).log_prob(z) + 2.0 * contains(z, 2))
    within(posterior.log_evidence.exp(), float(log_joint.logsumexp(0).exp()), sharp=0.1)
    apart = SMC(model, num_particles=6, ess_threshold=0.0).run()
    drawn = apart.samples["z"]
    log_p = completion(allowed=check()).log_prob(drawn).detach()
    u = scale * (log_p + 2.0 * contains(drawn, 2)) - log_p
    torch.testing.assert_close(apart.log_weights, u - math.log(6), rtol=1e-9, atol=1e-9)


def test_importance_sampling_with_a_check_weighs_exactly():
    def model():
        pyro.sample("z", completion(temperature=4.0))

    def guide():
        pyro.sample("z", completion(allowed=check()))

    posterior = Importance(model, guide, num_particles=30).run()
    z = posterior.samples["z"]
    u = completion(temperature=4.0).log_prob(z) - completion(allowed=same_as_mask).log_prob(z)
    torch.testing.assert_close(posterior.log_weights, (u - math.log(30)).detach(), rtol=1e-9, atol=1e-9)


def test_few_candidates_are_asked_about():
    """The embedded LM, and a check that keeps most of the mass: a few questions a token, where a mask asks V."""
    lm = LanguageModel.embedded("stories")
    the = lm.token_id(" the")
    allowed = Check(lm, lambda prefix, token: token != the)
    fn = Completion(lm, "Tom went to the kitchen.", max_tokens=8, stop=".", allowed=allowed)
    z = fn.sample((100,))
    tokens = int(length(z).sum())
    assert not bool(contains(z, the).any())
    assert allowed.evaluations < 3 * tokens < 0.05 * lm.vocab_size * tokens

    def model():
        pyro.sample("z", Completion(lm, "Tom went to the kitchen.", max_tokens=8, stop="."))

    def guide():
        pyro.sample("z", fn)

    allowed.evaluations = 0
    posterior = SMC(model, guide, 100, ess_threshold=0.0).run()
    assert allowed.evaluations < 3 * int(length(posterior.samples["z"]).sum())


def test_candidates_are_asked_about_once():
    asked = []

    def predicate(prefix: Tensor, token: Tensor) -> Tensor:
        asked.append(torch.cat([prefix, token[:, None]], 1))
        return no_repeat(prefix, token)

    checked = Check(LM, predicate)
    checked(torch.tensor([[2, 3], [2, 3], [3, 2]]))
    (together,) = asked
    checked.ask(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    assert (
        len(asked) == 1
        and len(together) == len(torch.unique(together, dim=0)) == checked.evaluations == 2 * LM.vocab_size
    )


@pytest.mark.parametrize("within", [None, only(LM, [2, 0])])
def test_where_nothing_passes_it_is_a_dead_end(within):
    fn = completion(allowed=Check(LM, lambda p, v: (v == 2) & (p.shape[1] < 1), within=within))
    with pytest.raises(DeadEnd, match="allowed"):
        fn.sample((3,))


def test_of_several_stops_at_the_limit_one_is_certain():
    """The check forbids both: they keep their relative probabilities, as under a mask."""
    fn = completion(stop=["eos", "."], max_tokens=1, min_tokens=1, allowed=Check(LM, lambda p, v: v > 1))
    z = fn.sample((2000,))
    assert bool((z[:, 1] <= 1).all())
    texts, counts = torch.unique(z, dim=0, return_counts=True)
    p = fn.log_prob(texts).detach().double().exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-9)
    assert bool(((counts / 2000 - p).abs() <= 5 * (p * (1 - p) / 2000).sqrt()).all())
