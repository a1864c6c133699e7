"""Importance sampling: u is what the definition says, term by term, and its average the enumerated evidence."""

from __future__ import annotations

import gc
import math
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from five_sigma import within
from hypothesis import given, settings
from hypothesis import strategies as st
from plate_of_three import P, Q, X, Y
from pyro import poutine
from torch import Tensor

from lmppl import text
from lmppl.distributions import Completion, NextToken
from lmppl.inference import AxesError, Enumeration, Importance, SiteMismatch, ZeroEvidence


def prior(lm, x, **rules) -> Completion:
    return Completion(lm, x, **{"max_tokens": 3, **rules})


def likelihood(x, z) -> Completion:
    return Completion(P, P.join(x, z), max_tokens=3)


def one(x=X[0], y=Y[0], scale: float = 1.0):
    def model():
        with poutine.scale(scale=scale):
            z = pyro.sample("z", prior(P, x))
        pyro.sample("y", likelihood(x, z), obs=y)

    return model


def guide_of_one(x=X[0]):
    def guide():
        pyro.sample("z", prior(Q, x, temperature=1.5))

    return guide


def several(scale: float = 1.0):
    def model():
        with pyro.plate("data", 3), poutine.scale(scale=scale):
            z = pyro.sample("z", prior(P, X))
            pyro.sample("y", likelihood(X, z), obs=Y)

    return model


def guide_of_several():
    with pyro.plate("data", 3):
        pyro.sample("z", prior(Q, X))


def u_of(posterior) -> Tensor:
    return posterior.log_weights + math.log(posterior.num_particles)


@torch.no_grad()
@settings(max_examples=15)
@given(st.sampled_from([1.0, 0.25, 2.0]), st.booleans(), st.integers(1, 9))
def test_u_is_the_definition_term_by_term(scale, guided, n):
    posterior = Importance(one(scale=scale), guide_of_one() if guided else None, num_particles=n).run()
    for z, u in zip(posterior.samples["z"], u_of(posterior), strict=True):
        log_p = prior(P, X[0]).log_prob(z)
        log_q = prior(Q, X[0], temperature=1.5).log_prob(z) if guided else log_p
        expected = scale * log_p + likelihood(X[0], z).log_prob(Y[0]) - log_q
        assert float(u) == pytest.approx(float(expected), abs=1e-9)
    assert float(posterior.log_weights.logsumexp(0)) == pytest.approx(float(posterior.log_evidence), abs=1e-12)


@torch.no_grad()
def test_each_datum_of_a_kept_plate_has_its_own_weights():
    for guide in (None, guide_of_several):
        for scale in (1.0, 0.5):
            posterior = Importance(several(scale), guide, num_particles=6).run()
            z = posterior.samples["z"]
            assert posterior.log_weights.shape == (6, 3)
            assert posterior.log_evidence.shape == posterior.ess.shape == posterior.khat.shape == (3,)
            log_p = prior(P, X).log_prob(z)
            log_q = log_p if guide is None else prior(Q, X).log_prob(z)
            expected = scale * (log_p + likelihood(X, z).log_prob(Y)) - log_q
            assert torch.allclose(u_of(posterior), expected)
            assert torch.allclose(posterior.log_weights.logsumexp(0), posterior.log_evidence)


@torch.no_grad()
@pytest.mark.parametrize("guide", [None, guide_of_several])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_evidence_is_the_enumerated_one(guide, scale):
    """Within 5 standard errors, and the self-normalised posterior means too."""
    n = 4000
    posterior = Importance(several(scale), guide, num_particles=n).run()
    exact = Enumeration(several(scale)).run()
    weights = u_of(posterior).exp()  # (n, 3)
    error = weights.std(0) / math.sqrt(n)
    assert bool(((weights.mean(0) - exact.log_evidence.exp()).abs() < 5 * error).all())
    length = text.length(posterior.samples["z"]).double()
    mean = (posterior.probabilities * length).sum(0)
    spread = (posterior.probabilities**2 * (length - mean) ** 2).sum(0).sqrt()
    truth = (exact.probabilities * text.length(exact.samples["z"])).sum(0)
    assert bool(((mean - truth).abs() < 5 * spread).all())


@torch.no_grad()
def test_a_hard_constraint_is_weighed_without_bias():
    def model():
        z = pyro.sample("z", prior(P, X[0]))
        pyro.factor("short", torch.where(text.length(z) <= 2, 0.0, -math.inf).double())

    n = 4000
    weights = u_of(Importance(model, num_particles=n).run()).exp()
    truth = Enumeration(model).run().log_evidence.exp()
    assert 0.05 < truth < 0.95
    assert abs(float(weights.mean() - truth)) < 5 * float(weights.std()) / math.sqrt(n)


@torch.no_grad()
def test_masks_are_kept_in_p_and_in_q():
    mask = torch.tensor([True, False, True])

    def model(latent: bool):
        with pyro.plate("data", 3):
            with poutine.mask(mask=mask if latent else torch.ones(3, dtype=torch.bool)):
                z = pyro.sample("z", prior(P, X))
            with poutine.mask(mask=mask):
                pyro.sample("y", likelihood(X, z), obs=Y)

    def guide(latent: bool):
        with pyro.plate("data", 3), poutine.mask(mask=mask if latent else torch.ones(3, dtype=torch.bool)):
            pyro.sample("z", prior(Q, X))

    for latent in (False, True):
        for q in (None, guide):
            posterior = Importance(model, q, num_particles=5).run(latent)
            z = posterior.samples["z"]
            rest = torch.where(mask, likelihood(X, z).log_prob(Y), 0.0)
            ratio = prior(P, X).log_prob(z) - prior(P if q is None else Q, X).log_prob(z)
            expected = rest + (torch.where(mask, ratio, 0.0) if latent else ratio)
            assert torch.allclose(u_of(posterior), expected)


@torch.no_grad()
def test_one_factor_outside_a_plate_makes_the_weights_joint():
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", prior(P, X))
            pyro.sample("y", likelihood(X, z), obs=Y)
        pyro.factor("total", 0.1 * text.length(z).sum(-1, keepdim=True).double())

    def total_without_axis():
        with pyro.plate("data", 3):
            z = pyro.sample("z", prior(P, X))
        pyro.factor("total", -0.1 * text.length(z).sum().double())

    posterior = Importance(model, num_particles=7).run()
    z = posterior.samples["z"]
    assert posterior.log_weights.shape == (7,) and posterior.log_evidence.shape == ()
    assert z.shape == (7, 3, 4)
    expected = likelihood(X, z).log_prob(Y).sum(-1) + 0.1 * text.length(z).sum(-1)
    assert torch.allclose(u_of(posterior), expected)
    assert posterior.resample(9).samples["z"].shape == (9, 3, 4)
    with pytest.raises(AxesError, match="'total'"):
        Importance(total_without_axis, num_particles=7).run()


@pytest.mark.parametrize("seed", range(8))
def test_a_largest_value_over_particles_is_found_though_one_particle_has_it(seed):
    """Run alone, a particle with the largest value has the same density as among others; one with a smaller has not."""

    def model():
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.1, 0.9])))
        pyro.factor("largest", -k.max().double())

    pyro.set_rng_seed(seed)
    with pytest.raises(AxesError, match="'largest'"):
        Importance(model, num_particles=64).run()


@pytest.mark.parametrize("seed", range(8))
def test_a_largest_value_is_found_at_a_site_that_differs_less_often_than_another(seed):
    def model():
        pyro.sample("m", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.8])))
        pyro.factor("largest", -k.max().double())

    pyro.set_rng_seed(seed)
    with pytest.raises(AxesError, match="'largest'"):
        Importance(model, num_particles=64).run()


def test_a_model_may_estimate_its_own_density():
    """p(y) of an inner model, estimated anew in each run; the mean of the outer evidence is p(y) nonetheless."""

    def inner():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5).double()))
        pyro.factor("y", torch.where(z == 1, 0.9, 0.1).double().log())

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("f", Importance(inner, num_particles=4).run().log_evidence + 0.0 * a)

    pyro.set_rng_seed(0)
    runs = torch.stack([Importance(model, num_particles=3).run().log_evidence.exp() for _ in range(150)])
    within(runs, 0.5, sharp=0.05)


def test_a_posterior_of_positive_evidence_holds_no_traces():
    """A guide's posterior needs none of the model's tensors."""
    seen = []

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("f", f := 2 * a)
        seen.append(weakref.ref(f))

    posterior = Importance(model, lambda: pyro.sample("a", dist.Normal(0.0, 1.0)), num_particles=3).run()
    gc.collect()
    assert posterior.num_particles == 3 and not any(f() is not None and f().dim() and len(f()) == 3 for f in seen)


@torch.no_grad()
def test_subsampling_is_divided_out_along_kept_plates_and_refused_elsewhere():
    chosen = torch.tensor([2, 0])

    def kept():
        with pyro.plate("data", 3, subsample=chosen) as i:
            z = pyro.sample("z", prior(P, X[i]))
            pyro.sample("y", likelihood(X[i], z), obs=Y[i])

    def kept_guide():
        with pyro.plate("data", 3, subsample=chosen) as i:
            pyro.sample("z", prior(Q, X[i]))

    for guide in (None, kept_guide):
        posterior = Importance(kept, guide, num_particles=4).run()
        z = posterior.samples["z"]
        log_q = prior(P if guide is None else Q, X[chosen]).log_prob(z)
        expected = prior(P, X[chosen]).log_prob(z) + likelihood(X[chosen], z).log_prob(Y[chosen]) - log_q
        assert torch.allclose(u_of(posterior), expected)

    def not_kept():
        z = pyro.sample("z", prior(P, X[0]))
        with pyro.plate("data", 3, subsample_size=2) as i:
            pyro.sample("y", likelihood(X[0], z), obs=Y[i])

    def sequential():
        for i in pyro.plate("data", 3, subsample_size=2):
            z = pyro.sample(f"z{i}", prior(P, X[i]))
            pyro.sample(f"y{i}", likelihood(X[i], z), obs=Y[i])

    for model in (not_kept, sequential):
        with pytest.raises(ValueError, match="the plate 'data' is subsampled"):
            Importance(model, num_particles=4).run()


@torch.no_grad()
def test_sequential_plates_are_joint():
    def model():
        for i in pyro.plate("data", 3):
            z = pyro.sample(f"z{i}", prior(P, X[i]))
            pyro.sample(f"y{i}", likelihood(X[i], z), obs=Y[i])

    posterior = Importance(model, num_particles=5).run()
    assert posterior.log_weights.shape == (5,)
    expected = sum(likelihood(X[i], posterior.samples[f"z{i}"]).log_prob(Y[i]) for i in range(3))
    assert torch.allclose(u_of(posterior), expected)


@torch.no_grad()
def test_nested_plates_keep_the_outer_one():
    y = torch.stack([Y, Y.flip(0)])  # (2, 3, L)

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", prior(P, X))
            with pyro.plate("readers", 2):
                pyro.sample("y", likelihood(X, z), obs=y)

    posterior = Importance(model, num_particles=5).run()
    z = posterior.samples["z"]
    assert posterior.log_weights.shape == (5, 3) and z.shape == (5, 3, 4)
    expected = sum(likelihood(X, z).log_prob(y[r]) for r in range(2))
    assert torch.allclose(u_of(posterior), expected)
    exact = Enumeration(model).run()
    assert exact.log_evidence.shape == (3,)
    assert torch.allclose(exact.log_prob({"z": z[0]}).exp(), exact.log_prob(z).exp()[0])


@torch.no_grad()
def test_several_sites_and_ordinary_ones_beside_text():
    table = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

    def gamma(shape, rate):
        return dist.Gamma(torch.tensor(shape, dtype=torch.float64), rate)

    def model():
        rate = pyro.sample("rate", gamma(2.0, 1.0))
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Categorical(table))
            a = pyro.sample("a", prior(P, X, temperature=1.0 + k))
            b = pyro.sample("b", NextToken(P, P.join(X, a)))
            z = pyro.sample("z", prior(P, P.join(X, a, b[..., None]), max_tokens=1))
            pyro.sample("y", likelihood(X, P.join(a, z)), obs=Y)
            pyro.sample("count", dist.Poisson(rate), obs=torch.tensor([1.0, 0.0, 3.0]).double())

    def guide():
        pyro.sample("rate", gamma(3.0, 2.0))
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Categorical(table.flip(0)))
            a = pyro.sample("a", prior(Q, X, temperature=1.0 + k))
            b = pyro.sample("b", NextToken(Q, Q.join(X, a)))
            pyro.sample("z", prior(Q, Q.join(X, b[..., None]), max_tokens=1))

    posterior = Importance(model, guide, num_particles=6).run()
    s = posterior.samples
    assert posterior.log_weights.shape == (6,) and s["rate"].shape == (6,) and s["k"].shape == (6, 3)
    for n in range(6):
        rate = s["rate"][n]
        u = gamma(2.0, 1.0).log_prob(rate) - gamma(3.0, 2.0).log_prob(rate)
        for i in range(3):
            k, a, b, z = (s[name][n, i] for name in "kabz")
            u = u + table[k].log() - table.flip(0)[k].log()
            u = u + prior(P, X[i], temperature=1.0 + k).log_prob(a) - prior(Q, X[i], temperature=1.0 + k).log_prob(a)
            u = u + NextToken(P, P.join(X[i], a)).log_prob(b) - NextToken(Q, Q.join(X[i], a)).log_prob(b)
            u = u + prior(P, P.join(X[i], a, b[None]), max_tokens=1).log_prob(z)
            u = u - prior(Q, Q.join(X[i], b[None]), max_tokens=1).log_prob(z)
            u = u + likelihood(X[i], P.join(a, z)).log_prob(Y[i])
            u = u + dist.Poisson(rate).log_prob(torch.tensor([1.0, 0.0, 3.0]).double()[i])
        assert float(u_of(posterior)[n]) == pytest.approx(float(u), abs=1e-9)


def test_zero_evidence_is_minus_infinity_and_refuses_to_be_used():
    posterior = Importance(one(y=P.encode("ab")), num_particles=8).run()  # no stop: not a whole text
    assert posterior.log_evidence == -torch.inf and posterior.ess == 0
    for use in (
        lambda: posterior.table("z"),
        lambda: posterior.resample(3),
        lambda: posterior.predictive(one()),
    ):
        with pytest.raises(ZeroEvidence):
            use()


def test_a_looser_guide_draws_impossible_values_at_weight_zero():
    def guide():
        pyro.sample("z", prior(Q, X[0], stop=("eos", ".")))

    posterior = Importance(one(), guide, num_particles=40).run()
    ends = torch.isin(posterior.samples["z"], torch.tensor([P.token_id(".")])).any(-1)
    impossible = prior(P, X[0]).log_prob(posterior.samples["z"]) == -torch.inf
    assert bool(impossible.any()) and bool((impossible <= ends).all())
    assert bool(((posterior.log_weights == -torch.inf) == impossible).all())
    assert bool(posterior.log_evidence.isfinite())


def test_sites_that_do_not_match():
    def missing():
        pass

    def more():
        guide_of_one()()
        pyro.sample("w", dist.Normal(0.0, 1.0))

    def observed():
        guide_of_one()()
        pyro.sample("y", prior(Q, X[0]))

    for guide, said in (
        (missing, "does not sample 'z'"),
        (more, "samples 'w', but the model has no such site"),
        (observed, "samples 'y', but the model observes that site"),
    ):
        with pytest.raises(SiteMismatch, match=said):
            Importance(one(), guide, num_particles=3).run()
    with pytest.raises(ValueError, match="num_particles"):
        Importance(one(), num_particles=0)


def test_table_resample_and_predictive_in_a_plate():
    posterior = Importance(several(), guide_of_several, num_particles=300).run()
    for i in range(3):
        table = posterior.table("z", i)
        assert sum(p for _, p in table) == pytest.approx(1.0)
        assert [p for _, p in table] == sorted((p for _, p in table), reverse=True)
        assert len({s for s, _ in table}) == len(table)
        strings = P.decode(posterior.samples["z"][:, i])
        first = sum(float(p) for s, p in zip(strings, posterior.probabilities[:, i], strict=True) if s == table[0][0])
        assert first == pytest.approx(table[0][1])
    with pytest.raises(ValueError, match="index"):
        posterior.table("z")
    with pytest.raises(ValueError, match="site"):
        posterior.table("w", 0)

    draws = posterior.resample(1000)
    assert draws.samples["z"].shape == (1000, 3, 4)
    assert torch.allclose(draws.log_evidence, posterior.log_evidence)
    assert torch.allclose(draws.log_weights.logsumexp(0), posterior.log_evidence)
    for i in range(3):  # systematic: within one of n times the weight, element by element
        expected, found = dict(posterior.table("z", i)), dict(draws.table("z", i))
        copies = len(posterior.samples["z"])
        for s, p in expected.items():
            assert abs(found.get(s, 0.0) - p) < copies / 1000

    predictive = posterior.predictive(several(), num_particles=50)
    assert predictive.log_probs["y"].shape == (50, 3) and predictive.log_prob("y").shape == (3,)
    assert torch.allclose(
        predictive.log_probs["y"], likelihood(X, predictive.samples["z"]).log_prob(Y).detach(), atol=1e-9
    )
    for sampler, lm in (("prior", P), ("guide", Q)):
        drawn = posterior.predictive(several(), sampler=sampler, num_particles=400)
        length = text.length(drawn.samples["z"]).double()
        support = prior(lm, X[0]).enumerate_support()
        truth = float((prior(lm, X[0]).log_prob(support).detach().exp() * text.length(support)).sum())
        error = float(length[:, 0].std()) / math.sqrt(400)
        assert abs(float(length[:, 0].mean()) - truth) < 5 * error


def test_the_same_seed_gives_the_same_particles():
    runs = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        runs.append(Importance(several(), guide_of_several, num_particles=5).run())
    assert torch.equal(runs[0].samples["z"], runs[1].samples["z"])
    assert torch.equal(runs[0].log_weights, runs[1].log_weights)
