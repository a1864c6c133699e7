"""Posteriors: marginals, tables, nested inference and k-hat, against enumeration and plain loops."""

from __future__ import annotations

import math

import arviz
import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plate_of_three import P, X, Y, answer, joint, prior

from lmppl import text
from lmppl.distributions import Completion, Table, TextTable
from lmppl.inference import SMC, Enumeration, Importance
from lmppl.inference.posterior.log_weights import pareto_khat, smallest_sample

# -- marginals -------------------------------------------------------------------------------------------------------


def test_a_joint_table_adds_up_to_its_marginals():
    posterior = Enumeration(joint).run()
    rows = posterior.table(["k", "z"])
    assert sum(p for _, p in rows) == pytest.approx(1.0)
    assert [p for _, p in rows] == sorted((p for _, p in rows), reverse=True)
    for i, site in enumerate(("k", "z")):
        for value, p in posterior.table(site):
            assert sum(q for key, q in rows if key[i] == value) == pytest.approx(p)
    with pytest.raises(ValueError, match="site: 'w'"):
        posterior.table(["k", "w"])


def test_the_distribution_of_a_site_is_its_marginal(exact, particles):
    for posterior in (exact, particles):
        fn = posterior.distribution("z")
        assert isinstance(fn, TextTable) and fn.batch_shape == (3,) and fn.event_shape == (3,)
        z, w = posterior.samples["z"], posterior.probabilities
        same = text.equal(z[:, None], z[None])  # (N, N, plates)
        torch.testing.assert_close(fn.log_prob(z).exp(), (same * w[None]).sum(1))
        support = fn.enumerate_support()
        torch.testing.assert_close(fn.log_prob(support).exp().sum(0), torch.ones(3, dtype=torch.float64))
    assert bool((exact.distribution("z").log_prob(P.encode("abc", stop="eos")) == -torch.inf).all())  # too long
    k = Enumeration(joint).run()
    fn = k.distribution("k")
    assert type(fn) is Table and fn.batch_shape == () and fn.event_shape == ()
    expected = [dict(k.table("k"))[str(i)] for i in range(3)]
    assert fn.log_prob(torch.arange(3)).exp().tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="is none of the latent sites"):
        k.distribution(["k", "z"])


def test_draws_of_the_distribution_follow_the_weights(particles):
    fn = particles.distribution("z").expand((4000, 3))
    drawn, log_p = fn.sample_and_log_prob()
    torch.testing.assert_close(log_p, fn.log_prob(drawn))
    z = particles.samples["z"][0]
    p = particles.distribution("z").log_prob(z).exp()
    share = text.equal(drawn, z).double().mean(0)
    assert bool(((share - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt()).all())


@torch.no_grad()
def test_prefix_scores_of_a_table_are_those_of_the_distribution_it_lists():
    """A Completion with two stops, written down: every prefix has the same scores, impossible ones included."""
    fn = Completion(P, X[:2], max_tokens=3, min_tokens=1, stop=("eos", "."))
    support = fn.enumerate_support()[:, 0]
    table = TextTable(P, support, fn.log_prob(support[:, None]).T, fn.stop)
    assert table.min_tokens == 1
    value = fn.sample((50,))
    for found, expected in zip(table.prefix_scores(value), fn.prefix_scores(value), strict=True):
        reached = torch.arange(4) < text.length(value)[..., None]
        torch.testing.assert_close(found[reached], expected[reached])
    torch.testing.assert_close(table.log_prob(value), fn.log_prob(value))


def test_bad_tables():
    for args, said in (
        ((torch.arange(3), torch.zeros(2)), "shapes"),
        ((torch.tensor([1, 1]), torch.zeros(2)), "occurs twice"),
        ((torch.arange(2), torch.full((4, 2), -torch.inf)), "impossible"),
    ):
        with pytest.raises(ValueError, match=said):
            Table(*args)


# -- nested inference ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("algorithm", ["enumeration", "importance", "smc"])
def test_the_posterior_of_one_model_is_the_prior_of_another(exact, algorithm):
    """p(z | y, w) by hand: the inner joint, normalised, times the outer likelihood."""
    inner, w = exact.distribution("z"), P.encode(["b", "b", "c"], stop="eos")

    def outer():
        with pyro.plate("data", 3):
            z = pyro.sample("z", inner)
            pyro.sample("w", Completion(P, P.join(z, "b"), max_tokens=1), obs=w)

    z = prior(X).enumerate_support()
    log_joint = prior(X).log_prob(z) + answer(X, z).log_prob(Y)
    log_joint = log_joint - log_joint.logsumexp(0) + Completion(P, P.join(z, "b"), max_tokens=1).log_prob(w)
    log_evidence = log_joint.logsumexp(0)
    if algorithm == "enumeration":
        found = Enumeration(outer).run()
        torch.testing.assert_close(found.log_evidence, log_evidence)
        torch.testing.assert_close(found.log_prob(z).exp(), (log_joint - log_evidence).exp())
        assert dict(found.table("z", 1)).keys() <= set(P.decode(z[:, 1]))  # texts are decoded
    else:
        n = 3000
        found = (SMC if algorithm == "smc" else Importance)(outer, num_particles=n).run()
        weights = (found.log_weights + math.log(n)).exp()
        assert bool(((weights.mean(0) - log_evidence.exp()).abs() < 5 * weights.std(0) / n**0.5).all())


@torch.no_grad()
def test_a_text_along_a_plate_that_is_not_kept_is_one_event():
    def program():
        with pyro.plate("parts", 2):
            z = pyro.sample("z", prior(X[:2], max_tokens=1))
        pyro.factor("alike", 1.0 * text.equal(z[..., 0, :], z[..., 1, :])[..., None])

    posterior = Importance(program, num_particles=20).run()
    fn = posterior.distribution("z")
    assert fn.batch_shape == () and fn.event_shape == (2, 2)
    same = (posterior.samples["z"][:, None] == posterior.samples["z"]).all(-1).all(-1)
    torch.testing.assert_close(fn.log_prob(posterior.samples["z"]).exp(), same.to(fn.logits) @ posterior.probabilities)


# -- k-hat -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(50, 2000), st.floats(0.05, 3.0), st.integers(0, 10_000))
def test_khat_is_that_of_arviz(n, spread, seed):
    log_weights = spread * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, expected = arviz.psislw(log_weights.numpy())
    assert pareto_khat(log_weights) == pytest.approx(float(expected), abs=1e-6)


def test_khat_finds_the_shape_of_a_tail():
    """w = u^-k has a Pareto tail of shape k. The estimate's spread is some (1 + k) / sqrt(tail)."""
    n = 20_000
    for k in (0.3, 0.6, 1.2):
        log_weights = -k * torch.rand(n, dtype=torch.float64).log()
        assert abs(pareto_khat(log_weights) - k) < 5 * (1 + k) / math.sqrt(3 * n**0.5)
    assert math.isnan(pareto_khat(torch.randn(49))) and pareto_khat(torch.zeros(60)) == -math.inf


def test_the_smallest_sample():
    assert [smallest_sample(k) for k in (-0.5, 0.0, 0.5, 1.0)] == [10, 10, 100, math.inf]
    assert smallest_sample(0.7) == pytest.approx(2154, rel=1e-3)
