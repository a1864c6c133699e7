"""Posteriors: marginals, tables, nested inference and k-hat, against enumeration and plain loops."""

from __future__ import annotations

import math

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plate_of_three import P, X, Y, answer, guide, joint, model, prior

from lmppl import text
from lmppl.distributions import Completion, Table, TextTable
from lmppl.inference import SMC, Enumeration, Importance, MetropolisHastings, Posterior, Prompting
from lmppl.inference.posterior.log_weights import pareto_khat, smallest_sample

# -- what was asked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "asked"),
    [
        (Enumeration(model), None),
        (Importance(model, num_particles=5), None),
        (Importance(model, guide, num_particles=5), guide),
        (SMC(model, guide, num_particles=5), guide),
        (Prompting(model, guide, num_particles=5), guide),
        (MetropolisHastings(model, guide, num_chains=2, num_samples=3, warmup=0), guide),
    ],
)
def test_a_posterior_keeps_what_was_asked(algorithm, asked, tmp_path):
    """Its programs and arguments; resampled too; and in a file the arguments."""
    posterior = algorithm.run(X, y=Y)
    for found in (posterior, posterior.resample(3)):
        query = found.sites.query
        assert query.model is model and query.guide is found.guide is asked
        assert query.args == (X,) and query.kwargs == {"y": Y} and query.nesting == 1
    posterior.save(tmp_path / "saved")
    loaded = Posterior.load(tmp_path / "saved")
    assert torch.equal(loaded.sites.query.args[0], X) and torch.equal(loaded.sites.query.kwargs["y"], Y)
    with pytest.raises(ValueError, match="a posterior from a file does not know its program"):
        loaded.sites.query.run(particles=1)


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


def documents():
    """A number; in a plate that is not kept a topic and a text each, of three documents."""
    pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("docs", 3):
        t = pyro.sample("t", dist.Categorical(torch.ones(2)))
        pyro.sample("z", prior(X[0], max_tokens=1, temperature=1.0 + t))


def test_a_table_of_one_element_of_a_plate_that_is_not_kept():
    posterior = Importance(documents, num_particles=30).run()
    t, z = posterior.samples["t"], posterior.samples["z"]
    for i in (0, 2, -1):
        share = t[:, i].double().mean()
        assert dict(posterior.table("t", i)) == pytest.approx({0: 1 - float(share), 1: float(share)})
        strings = P.decode(z[:, i])
        assert dict(posterior.table("z", i)) == pytest.approx({s: strings.count(s) / 30 for s in set(strings)})
        pairs = list(zip(t[:, i].tolist(), strings, strict=True))
        assert dict(posterior.table(["t", "z"], i)) == pytest.approx({p: pairs.count(p) / 30 for p in set(pairs)})
    assert all(len(topics) == 3 for topics, _ in posterior.table("t"))  # of all documents together: a tuple
    assert sorted(w for w, _ in posterior.table("w")) == sorted(posterior.samples["w"].tolist())
    assert len(posterior.table(["w", "t"], 1)) == 30
    for index in (3, (0, 0), "first"):
        with pytest.raises(ValueError, match=r"index: expected 1 numbers within plates of shape \(3,\)"):
            posterior.table("t", index)


def test_a_table_goes_on_from_kept_plates_to_others():
    def program(documents=2):
        with pyro.plate("authors", 2, dim=-2):
            s = pyro.sample("s", dist.Bernoulli(torch.tensor(0.5)))
            with pyro.plate("docs", documents, dim=-1):
                pyro.sample("t", dist.Categorical(torch.ones(3) + s[..., None]))

    posterior = Importance(program, num_particles=20).run()
    t = posterior.samples["t"]  # (20, authors, docs)
    assert t.shape == (20, 2, 2) and posterior.log_weights.shape == (20, 2)
    assert dict(posterior.table("t", (1, 0))) == pytest.approx(
        {k: float((t[:, 1, 0] == k).double().mean()) for k in set(t[:, 1, 0].tolist())}
    )
    assert {type(k) for k, _ in posterior.table("t", 1)} == {tuple}
    assert {k for k, _ in posterior.table("s", 1)} <= {0.0, 1.0}
    assert posterior.table(["s", "t"], (0, 1)) and all(len(k) == 2 for k, _ in posterior.table(["s", "t"], (0, 1)))
    one = Importance(program, num_particles=20).run(documents=1)  # a plate of one element counts as one
    assert one.table("t", (1, 0)) == one.table("t", 1)


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
    expected = [dict(k.table("k"))[i] for i in range(3)]
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


def test_a_posterior_and_a_prediction_are_shown_on_one_line():
    """Not their tensors: the sites, how many particles there are, and which plates are kept."""
    enumerated, drawn = Enumeration(joint).run(), SMC(joint, num_particles=7).run()
    assert repr(enumerated).startswith("Enumerated(k, z: ") and repr(enumerated).endswith(" particles)")
    assert repr(drawn) == "Sequential(k, z: 7 particles)"
    assert "\n" not in repr(drawn.predict(joint, drawn.values["z"][:2], site="z"))
