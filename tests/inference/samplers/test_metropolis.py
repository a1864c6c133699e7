"""Metropolis-Hastings: chains against enumeration, tempering, zeros, diagnostics and what a run costs."""

from __future__ import annotations

import math
from collections.abc import Callable

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from five_sigma import assert_counts
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import EOS, A, B
from problems import X as PROMPTS
from pyro import poutine
from tiny import flat_lm, tiny_lm
from torch import Tensor

from lmppl import text
from lmppl.distributions import Completion
from lmppl.inference import Enumeration, MetropolisHastings, ZeroEvidence

LM = flat_lm(vocab=4, dtype=torch.float64)

# -- chains against enumeration --------------------------------------------------------------------------------------


@st.composite
def programs(draw) -> tuple[Callable, Callable | None, list[str]]:
    """A small model, perhaps a guide, and the model's latent sites."""
    p, q = (flat_lm(draw(st.sampled_from(["gpt2", "llama"])), vocab=4, seed=draw(st.integers(0, 99))) for _ in range(2))
    x = p.encode(draw(st.lists(st.text("ab", max_size=3), min_size=2, max_size=2)))
    y = p.encode(draw(st.lists(st.text("ab", max_size=2), min_size=2, max_size=2)), stop="eos")
    plate, second, before, guided = (draw(st.booleans()) for _ in range(4))
    rules = {
        "max_tokens": draw(st.integers(1, 2)),
        "stop": draw(st.sampled_from(["eos", ["eos", "."]])),
        "min_tokens": draw(st.integers(0, 1)),
    }
    if not plate:
        x, y = x[0], y[0]
    probs = torch.tensor([0.3, 0.7])

    def program(lm, probs, temperature):
        k = pyro.sample("k", dist.Categorical(probs)) if before else torch.tensor(1)
        prompt = LM.join(x, LM.encode(["b", ""])[k])
        z = pyro.sample("z", Completion(lm, prompt, **{**rules, "temperature": temperature}))
        w = pyro.sample("w", Completion(lm, LM.join(z, prompt), max_tokens=1, temperature=2.5)) if second else x
        return z, w

    def data():
        return pyro.plate("data", 2) if plate else poutine.scale(scale=1.0)

    def model():
        with data():
            z, w = program(p, probs, 2.5)
            pyro.sample("y", Completion(p, LM.join(z, w), max_tokens=2, temperature=2.5), obs=y)
            pyro.factor("short", -0.5 * text.length(z))

    def guide():
        with data():
            program(q, probs.flip(0), 3.0)

    return model, guide if guided else None, ["k"] * before + ["z"] + ["w"] * second


@settings(max_examples=5)
@given(
    programs(),
    st.sampled_from(["regrowth", "branch", "independence", {"regrowth": 2.0, "independence": 1.0, "branch": 1.0}]),
    st.sampled_from([None, [1.0, 3.0], [1.0, 2.0, math.inf]]),
)
def test_chains_end_at_the_enumerated_posterior(programs, moves, temperatures):
    """The last states of 500 chains are independent draws, their joint frequencies within 5 standard errors."""
    model, guide, sites = programs
    exact = Enumeration(model).run()
    chains = MetropolisHastings(
        model, guide, num_chains=500, num_samples=1, warmup=30, moves=moves, temperatures=temperatures
    ).run()
    assert chains.log_weights.shape == (500, *exact.log_evidence.shape)
    elements = range(exact.log_evidence.numel()) if exact.log_evidence.dim() else [None]
    for i in elements:
        truth, found = dict(exact.table(sites, i)), dict(chains.table(sites, i))
        assert found.keys() <= truth.keys()
        p = torch.tensor(list(truth.values()), dtype=torch.float64)
        count = torch.tensor([500 * found.get(key, 0.0) for key in truth]).round()
        assert_counts(count, p, 500)


@pytest.mark.parametrize("moves", ["regrowth", "branch", "independence"])
def test_chains_end_at_a_posterior_far_from_the_proposals(moves):
    """Two nats for every A: the last states of 4,000 chains, each text's frequency within 5 standard errors."""

    def model():
        z = pyro.sample("z", Completion(LM, "ab", max_tokens=2, temperature=2.0))
        pyro.factor("like", 2.0 * (z == A).sum(-1))

    truth = dict(Enumeration(model).run().table("z"))
    chains = MetropolisHastings(model, num_chains=4_000, num_samples=1, warmup=30, moves=moves).run()
    found = dict(chains.table("z"))
    assert found.keys() <= truth.keys()
    count = torch.tensor([4_000 * found.get(key, 0.0) for key in truth]).round()
    assert_counts(count, torch.tensor(list(truth.values()), dtype=torch.float64), 4_000)


def test_what_a_run_answers():
    x = LM.encode(["ab", "b"])

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(LM, x, max_tokens=2, temperature=2.0))
            pyro.factor("like", 1.0 * (z == A).any(-1))

    chains = MetropolisHastings(model, num_chains=3, num_samples=40, warmup=5).run()
    assert chains.samples["z"].shape == (120, 2, 3) and chains.log_joint.shape == (3, 40, 2)
    assert torch.allclose(chains.log_weights, torch.full((120, 2), -math.log(120), dtype=torch.float64))
    assert bool(chains.log_evidence.isnan().all()) and bool(chains.khat.isnan().all())
    z = chains.samples["z"]
    log_joint = Completion(LM, x, max_tokens=2, temperature=2.0).log_prob(z) + 1.0 * (z == A).any(-1)
    torch.testing.assert_close(chains.log_joint, log_joint.detach().view(3, 40, 2))
    draws = chains.resample(50)
    assert draws.log_weights.exp().sum(0).tolist() == pytest.approx([1.0, 1.0])
    assert sum(p for _, p in chains.table("z", 0)) == pytest.approx(1.0)
    # A chain's neighbours in time differ by one move of one text: both share the cut's prefix or are the same.
    changed = (chains.log_joint[:, 1:] != chains.log_joint[:, :-1]).double().mean((0, 1))
    assert bool((changed <= chains.acceptance["regrowth"] + 1e-9).all())
    with pytest.raises(ValueError, match="subsampled"):
        MetropolisHastings(subsampled).run()


def subsampled():
    pyro.factor("outside", torch.tensor(0.0))
    with pyro.plate("data", 5, subsample_size=2):
        pyro.sample("z", Completion(LM, "a", max_tokens=1))


def test_each_move_costs_two_passes_over_the_text_and_one_over_what_follows():
    """Regrowing it, scoring the ending it had, and the observation after the new one; the prompt once in each."""
    lm = flat_lm(vocab=4)
    prompt = torch.randint(1, 4, (20,))

    def model():
        z = pyro.sample("z", Completion(lm, prompt, max_tokens=4))
        pyro.sample("y", Completion(lm, lm.join(z, "ab"), max_tokens=3), obs=lm.encode("aba", stop="eos"))

    def cost(warmup: int) -> int:
        before = lm.tokens_scored
        MetropolisHastings(model, num_chains=32, num_samples=1, warmup=warmup).run()
        return lm.tokens_scored - before

    seen = 32 * (4 + 2 + 3)  # z without its stop, "ab", and the observed text without its last token
    assert cost(20) - cost(10) <= 10 * (2 * (20 + 32 * 4) + seen)


# -- tempering, zeros and diagnostics --------------------------------------------------------------------------------


@pytest.mark.slow
def test_tempered_chains_reach_a_mode_that_others_do_not():
    """A wide basin around the prior's favourite text, and a narrow one, of larger mass, around its opposite.

    After 100 moves from the prior, the plain transition matrix has 25% of untempered chains in the second basin, whose
    posterior mass is 97%.
    """
    prior = Completion(tiny_lm(vocab=4), "ab", max_tokens=8, stop=None, allowed=[A, B], temperature=4.0)
    support = prior.enumerate_support()  # (256, 8)
    log_prior, by_token = prior.log_prob(support).detach(), prior.token_log_probs(support).detach()
    home = support[log_prior.argmax()]
    away = A + B - home  # no token in common with the first mode

    def score(z: Tensor) -> Tensor:
        near, far = ((z == mode).sum(-1).double() for mode in (home, away))
        return torch.maximum(2.0 * near, 7.0 * far - 33.5)

    def model():
        pyro.factor("two modes", score(pyro.sample("z", prior)))

    def in_second_basin(z: Tensor) -> Tensor:
        return (z == away).sum(-1) > 5

    moves, chains = 100, 150
    target = log_prior + score(support)
    p, K = target.softmax(0), torch.zeros(256, 256, dtype=torch.float64)
    for t in range(8):
        shares = (support[:, None, :t] == support[:, :t]).all(-1)
        log_q = by_token[:, t:].sum(-1)  # (256): of each text's ending
        alpha = (target - target[:, None] + log_q[:, None] - log_q).clamp(max=0).exp()
        K += torch.where(shares, log_q.exp() * alpha, 0.0) / 8
    K += torch.diag(1 - K.sum(1))
    assert float((p @ K - p).abs().max()) < 1e-10
    truth = float(p[in_second_basin(support)].sum())
    expected = float((log_prior.exp() @ torch.linalg.matrix_power(K, moves))[in_second_basin(support)].sum())
    assert truth > 0.95 and expected < 0.3

    def found(temperatures) -> float:
        run = MetropolisHastings(
            model, num_chains=chains, num_samples=1, warmup=moves - 1, temperatures=temperatures
        ).run()  # fmt: skip
        return float(in_second_basin(run.samples["z"]).double().mean())

    error = math.sqrt(expected * (1 - expected) / chains)
    assert abs(found(None) - expected) < 5 * error
    assert found([1, 2, 4, 20]) > expected + 5 * math.sqrt(0.25 / chains)


@pytest.mark.parametrize("moves", ["regrowth", "independence"])
def test_chains_that_start_at_probability_zero(moves):
    """The prior seldom says "b" twice, and in the second plate element nothing is possible."""

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(LM, "a", max_tokens=2, temperature=2.0))
            hard = torch.where((z == B).sum(-1) == 2, 0.0, -torch.inf)
            pyro.factor("hard", torch.stack([hard[..., 0], torch.full_like(hard[..., 0], -torch.inf)], -1))

    chains = MetropolisHastings(model, num_chains=20, num_samples=30, warmup=0, moves=moves).run()
    possible = (chains.samples["z"][:, 0] == B).sum(-1) == 2
    assert 0.1 < float(possible.double().mean()) < 1
    assert bool((chains.log_weights[:, 0].isfinite() == possible).all())
    assert float(chains.log_weights[:, 0].logsumexp(0)) == pytest.approx(0, abs=1e-9)
    of_chain = possible.view(20, 30).int()
    assert bool((of_chain.diff(dim=1) >= 0).all())  # no chain goes back
    assert chains.table("z", 0) == [("bb", pytest.approx(1.0))]
    assert chains.log_evidence[0].isnan() and chains.log_evidence[1] == -torch.inf
    assert chains.ess[0] > 0 and chains.ess[1] == 0
    with pytest.raises(ZeroEvidence):
        chains.table("z", 1)


def mixing(slope: float):
    """Texts of one token repeated are rewarded, the more alike the more: between them lies a valley."""

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample(
                "z", Completion(LM, PROMPTS, max_tokens=8, min_tokens=7, allowed=[A, B, EOS], temperature=10.0)
            )  # fmt: skip
            a, b = ((z == token).sum(-1) for token in (A, B))
            pyro.factor("alike", slope * torch.maximum(a, b) + torch.where(a < b, 1.0, 0.0))

    return model


@pytest.mark.parametrize(
    ("slope", "moves", "num_chains", "num_samples"), [(0.0, "independence", 6, 100), (15.0, "regrowth", 6, 40)]
)
def test_rhat_and_ess_are_those_of_arviz(slope, moves, num_chains, num_samples):
    """Independent draws mix; chains in the valleys' two sides do not."""
    size = {"num_chains": num_chains, "num_samples": num_samples, "warmup": 20}
    chains = MetropolisHastings(mixing(slope), moves=moves, **size).run()
    lengths = text.length(chains.samples["z"]).view(*chains.log_joint.shape)
    for i in range(2):
        for name, x in [("log_joint", chains.log_joint), ("length(z)", lengths)]:
            if bool((x[..., i] == x[0, 0, i]).all()):
                assert chains.rhat[name][i].isnan() and chains.mcmc_ess[name][i].isnan()
                continue
            draws = x[..., i].double().numpy()
            assert float(chains.rhat[name][i]) == pytest.approx(arviz.rhat(draws), rel=1e-12)
            assert float(chains.mcmc_ess[name][i]) == pytest.approx(arviz.ess(draws), rel=1e-12)
    ess = torch.stack(list(chains.mcmc_ess.values()))
    assert torch.equal(chains.ess, ess.nan_to_num(nan=torch.inf).amin(0))
    if moves == "independence":
        assert float(chains.acceptance["independence"].min()) > 0.3
        assert float(chains.rhat["log_joint"].max()) < 1.03 and float(chains.ess.min()) > 100
    else:
        mode = (
            ((chains.samples["z"] == A).sum(-1) > 4).view(num_chains, num_samples, 2).double().mean(1)
        )  # (chain, plate)
        assert float(mode[:, 0].min()) < 0.2 and float(mode[:, 0].max()) > 0.8
        assert float(chains.rhat["log_joint"][0]) > 1.5 and float(chains.ess[0]) < 20


def test_numbers_have_an_rhat_and_an_ess_of_their_own():
    """Two chains that never leave their own k: the log joint is the same everywhere, and only k tells."""

    def model():
        with pyro.plate("data", 2):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.factor("f", (v[..., 0] * k))

    chains = MetropolisHastings(model, num_chains=4, num_samples=200, warmup=20).run()
    assert set(chains.rhat) == {"log_joint", "k", "v"} and chains.rhat["v"].shape == (2, 3)
    v = chains.samples["v"].view(4, 200, 2, 3)
    assert float(chains.rhat["v"][1, 2]) == pytest.approx(arviz.rhat(v[:, :, 1, 2].double().numpy()), rel=1e-9)
    every = torch.cat([chains.mcmc_ess[name].view(2, -1) for name in ("log_joint", "k", "v")], 1)
    assert torch.equal(chains.ess, every.amin(1))


def test_diagnostics_that_are_not_defined():
    short = MetropolisHastings(mixing(0.0), num_chains=1, num_samples=3, warmup=0).run()
    assert bool(short.rhat["log_joint"].isnan().all()) and bool(short.ess.isnan().all())


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_chains": 0},
        {"num_samples": 0},
        {"warmup": -1},
        {"thin": 0},
        {"moves": "gibbs"},
        {"moves": {"regrowth": 0.0}},
        {"temperatures": [2.0, 4.0]},
        {"temperatures": [1.0, 1.0]},
    ],
)
def test_arguments_are_named_in_errors(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MetropolisHastings(mixing(0.0), **wrong)


def test_a_model_without_latents_is_named():
    lm = flat_lm(vocab=5)
    text = torch.tensor([[2, 0]])
    with pytest.raises(ValueError, match="model: it has no latent site"):
        MetropolisHastings(lambda: pyro.sample("y", Completion(lm, text[:, :1], max_tokens=1), obs=text)).run()
