"""Posteriors: marginals, prediction, nested inference, export and files, against enumeration and plain loops."""

from __future__ import annotations

import json
import math

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_lm
from torch import Tensor

from lmppl import text
from lmppl.distributions import Completion, NextToken, Table, TextTable
from lmppl.inference import SMC, Enumerated, Enumeration, Importance, MetropolisHastings, Posterior, ZeroEvidence
from lmppl.inference.posterior.log_weights import pareto_khat, smallest_sample
from lmppl.inference.posterior.predictive import Prediction

P = tiny_lm(vocab=5, seed=0, dtype=torch.float64)  # <eos> . a b c
Q = tiny_lm(vocab=5, seed=1, dtype=torch.float64)
X, Y = P.encode(["a", "", "ba"]), P.encode(["ab", "b", ""], stop="eos")
LABELS = ["a", "b", "cc"]


def prior(x, lm=P, **rules) -> Completion:
    return Completion(lm, x, **{"max_tokens": 2, **rules})


def answer(x, z) -> Completion:
    return Completion(P, P.join(x, z), max_tokens=2)


def model(x=X, y=None):
    with pyro.plate("data", 3):
        z = pyro.sample("z", prior(x))
        pyro.sample("y", answer(x, z), obs=y)


def guide(x=X, y=None):
    with pyro.plate("data", 3):
        pyro.sample("z", prior(x, Q, temperature=1.5))


def joint(y=Y[0]):
    """A category, a text that depends on it, an observation."""
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)))
    z = pyro.sample("z", prior(X[0], temperature=1.0 + k))
    pyro.sample("y", answer(X[0], z), obs=y)


@pytest.fixture(scope="module")
def exact() -> Enumerated:
    return Enumeration(model).run(X, Y)


@pytest.fixture(scope="module")
def particles() -> Posterior:
    pyro.set_rng_seed(1)
    return Importance(model, guide, num_particles=60).run(X, Y)


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


# -- prediction ------------------------------------------------------------------------------------------------------


def by_hand(posterior: Posterior) -> Tensor:
    """log p(y_c | x, z_n), (C, N, 3), by one call a candidate."""
    y = P.encode(LABELS, stop="eos")
    return torch.stack([answer(X, posterior.samples["z"]).log_prob(c) for c in y])


@torch.no_grad()
@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_candidates_are_averaged_with_the_weights(exact, particles, observed, as_text):
    for posterior in (exact, particles):
        candidates = P.encode(LABELS, stop="eos") if as_text else LABELS
        found = posterior.predict(model, candidates, X, Y if observed else None)
        expected, w = by_hand(posterior), posterior.probabilities
        assert found.names == LABELS and found.log_probs.shape == expected.shape
        torch.testing.assert_close(found.log_probs, expected)
        p = (w * expected.exp()).sum(1)
        torch.testing.assert_close(found.log_prob.exp(), p)
        torch.testing.assert_close(found.probabilities, p / p.sum(0))
        best = expected.argmax(0)
        vote = torch.stack([(w * (best == c)).sum(0) for c in range(3)])
        torch.testing.assert_close(found.vote, vote)


@torch.no_grad()
def test_with_every_answer_as_candidate_the_prediction_is_enumerated(exact):
    """y given x and the first observation: p(y2 | x, y) = sum_z p(z, y, y2) / p(y)."""
    everything = answer(X[0], P.encode("")).enumerate_support()
    found = exact.predict(model, everything, X, None)
    torch.testing.assert_close(found.log_prob.exp().sum(0), torch.ones(3, dtype=torch.float64))
    z = prior(X).enumerate_support()  # (K, 3, E)
    inner = prior(X).log_prob(z) + answer(X, z).log_prob(Y)
    both = inner + answer(X, z).log_prob(everything[:, None, None])  # (C, K, 3)
    log_p = both.logsumexp(1) - inner.logsumexp(0)
    torch.testing.assert_close(found.log_prob, log_p)
    torch.testing.assert_close(found.entropy, -(log_p.exp() * log_p).sum(0))
    # I(z; y2) = sum p(z, y2) log p(z, y2) / p(z) p(y2), from the joint alone.
    log_zy = both - inner.logsumexp(0)
    information = log_zy.exp() * (log_zy - log_zy.logsumexp(0) - log_zy.logsumexp(1, keepdim=True))
    torch.testing.assert_close(found.mutual_information, information.sum((0, 1)))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10_000))
def test_entropy_splits_into_its_expected_and_its_mutual_part(C, N, seed):
    g = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(C, N, 2, generator=g, dtype=torch.float64) * 3
    log_probs[torch.rand(C, N, 2, generator=g) < 0.2] = -torch.inf
    log_probs[0, 0] = -1.0  # something is possible
    found = Prediction(["?"] * C, log_probs, torch.randn(N, 2, generator=g, dtype=torch.float64).log_softmax(0))
    torch.testing.assert_close(found.entropy, found.expected_entropy + found.mutual_information)
    torch.testing.assert_close(found.probabilities.sum(0), torch.ones(2, dtype=torch.float64))
    assert bool((found.mutual_information > -1e-12).all()) and bool((found.expected_entropy > -1e-12).all())
    possible = (log_probs > -torch.inf).any(0)
    torch.testing.assert_close(found.vote.sum(0), (found.log_weights.exp() * possible).sum(0))


def test_ties_share_a_vote_and_nothing_possible_is_zero_evidence():
    log_weights = torch.tensor([0.25, 0.75]).log()
    found = Prediction(["a", "b"], torch.tensor([[-1.0, -2.0], [-1.0, -1.0]]), log_weights)
    assert found.vote.tolist() == pytest.approx([0.125, 0.875])
    with pytest.raises(ZeroEvidence):
        _ = Prediction(["a", "b"], torch.full((2, 2), -torch.inf), log_weights).probabilities


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["prior", "guide"])
def test_candidates_under_the_prior_and_the_guide(particles, sampler):
    n = 2000
    found = particles.predict(model, LABELS, X, None, sampler=sampler, num_particles=n)
    fn = prior(X) if sampler == "prior" else prior(X, Q, temperature=1.5)
    z = fn.enumerate_support()
    y = P.encode(LABELS, stop="eos")
    truth = torch.stack([(fn.log_prob(z) + answer(X, z).log_prob(c)).logsumexp(0).exp() for c in y])
    error = found.log_probs.exp().std(1) / n**0.5
    assert bool(((found.log_prob.exp() - truth).abs() < 5 * error).all())


def test_ordinary_sites_and_single_tokens_as_candidates():
    def program(z_is_known=None):
        z = pyro.sample("z", prior(X[0]))
        pyro.sample("t", NextToken(P, P.join(X[0], z)))
        pyro.sample("k", dist.Categorical(logits=text.length(z)[..., None] * torch.tensor([0.0, 0.3, -1.0])))

    posterior = Importance(program, num_particles=30).run()
    found = posterior.predict(program, ["a", "b"], site="t")
    z, w = posterior.samples["z"], posterior.probabilities
    p = (NextToken(P, P.join(X[0], z)).logits.exp().detach() * w[:, None]).sum(0)
    assert found.log_prob.exp().tolist() == pytest.approx([float(p[P.token_id("a")]), float(p[P.token_id("b")])])
    found = posterior.predict(program, torch.arange(3), site="k")
    p = ((text.length(z)[:, None] * torch.tensor([0.0, 0.3, -1.0])).softmax(-1) * w[:, None]).sum(0)
    assert found.probabilities.tolist() == pytest.approx(p.tolist(), rel=1e-5)
    assert found.names == ["0", "1", "2"]
    for bad, said in (
        (lambda: posterior.predict(program, ["a"], site="k"), "candidates"),
        (lambda: posterior.predict(program, [], site="k"), "candidates"),
        (lambda: posterior.predict(program, ["a"], site="q"), "site: 'q'"),
        (lambda: posterior.predict(program, ["a"], site="t", sampler="guide"), "without a guide"),
        (lambda: posterior.predict(program, ["a"], site="t", sampler="x"), "sampler"),
    ):
        with pytest.raises(ValueError, match=said):
            bad()


@torch.no_grad()
def test_predictive_uses_the_weights(exact, particles):
    for posterior in (exact, particles):
        found = posterior.predictive(model, X, Y)
        expected = answer(X, posterior.samples["z"]).log_prob(Y)
        torch.testing.assert_close(found.log_probs["y"], expected)
        torch.testing.assert_close(found.log_prob("y").exp(), (posterior.probabilities * expected.exp()).sum(0))
        assert dict(found.table("z", 0)) == pytest.approx(dict(posterior.table("z", 0)))
    with pytest.raises(ValueError, match="observed sites"):
        found.log_prob("z")


@torch.no_grad()
def test_the_vote_over_a_sampled_site_is_the_posterior_predictive(particles):
    many = particles.predictive(model, X, None, num_particles=3000)
    y = P.encode("b", stop="eos")
    truth = float((particles.probabilities[:, 1] * answer(X, particles.samples["z"]).log_prob(y)[:, 1].exp()).sum())
    share = dict(many.table("y", 1))["b"]
    assert abs(share - truth) < 5 * math.sqrt(truth * (1 - truth) / 3000) + 1 / 3000


@torch.no_grad()
def test_a_model_that_joins_the_plates_gets_joint_draws(particles):
    """Weights of one element say nothing of joint particles: these are resampled, and the answer is a product."""

    def joined():
        with pyro.plate("data", 3):
            z = pyro.sample("z", prior(X))
        pyro.factor("all", (text.length(z) - 2).sum(-1, keepdim=True).double())

    n = 4000
    found = particles.predictive(joined, num_particles=n)
    assert found.log_probs["all"].shape == (n,)
    truth = (particles.probabilities * (text.length(particles.samples["z"]) - 2).double().exp()).sum(0).prod()
    value = found.log_probs["all"].exp()
    assert abs(float(value.mean() - truth)) < 5 * float(value.std()) / n**0.5
    log_weights = particles.predictive(joined).log_weights
    torch.testing.assert_close(log_weights, torch.full((60,), -math.log(60), dtype=torch.float64))


@torch.no_grad()
def test_a_shared_latent_predicts_in_a_deeper_plate():
    def shared():
        z = pyro.sample("z", prior(X[0]))
        pyro.sample("y", answer(X[0], z), obs=Y[0])

    def deeper(questions):
        z = pyro.sample("z", prior(X[0]))
        with pyro.plate("questions", 3):
            pyro.sample("w", answer(questions, z), obs=Y)

    posterior = Importance(shared, num_particles=40).run()
    z, w = posterior.samples["z"], posterior.probabilities
    found = posterior.predict(deeper, LABELS, X, site="w")
    expected = answer(X, z[:, None]).log_prob(P.encode(LABELS, stop="eos")[:, None, None])  # (C, N, 3)
    torch.testing.assert_close(found.log_probs, expected)
    torch.testing.assert_close(found.log_weights.exp(), w[:, None].expand(-1, 3))


# -- arviz -----------------------------------------------------------------------------------------------------------


def test_arviz_has_equally_weighted_draws_and_named_plates(particles):
    data = particles.to_arviz()
    assert dict(data.posterior.sizes) == {"chain": 1, "draw": 60, "data": 3}
    assert dict(data.sample_stats["log_weight"].sizes) == {"chain": 1, "draw": 60, "data": 3}
    for i in range(3):
        table = dict(particles.table("z", i))
        texts, counts = np.unique(data.posterior["z"][0, :, i].values, return_counts=True)
        copies = len(particles.samples["z"])
        for s, count in zip(texts, counts, strict=True):  # systematic: within one of N times each particle's weight
            assert abs(count / 60 - table[s]) < copies / 60
        assert sum(counts) == 60 and set(texts) <= set(table)
    assert data.constant_data["log_evidence"].values == pytest.approx(particles.log_evidence.numpy())


def test_arviz_summarises_numeric_sites():
    posterior = Enumeration(joint).run().resample(500, "multinomial")
    data = posterior.to_arviz()
    assert float(arviz.ess(data, var_names=["k"])["k"]) == pytest.approx(500, rel=0.35)  # independent draws
    row = arviz.summary(data, var_names=["k"]).loc["k"]
    mean = sum(int(k) * p for k, p in posterior.table("k"))
    assert row["mean"] == pytest.approx(mean, abs=1e-3)
    assert data.posterior["z"].values.dtype.kind == "U"
    assert data.posterior["k"].values[0].tolist() == posterior.samples["k"].tolist()  # equal weights: as they are


def test_arviz_keeps_chains_apart():
    class Chains(Posterior):
        num_chains = 2

    k = torch.cat([torch.zeros(20), torch.ones(20)]) + 0.01 * torch.randn(40)  # stuck at two different values
    plain = Importance(lambda: pyro.sample("k", dist.Normal(0.0, 1.0)), num_particles=40).run()
    data = Chains({"k": k}, plain.log_weights, plain.log_evidence, plain.sites).to_arviz()
    assert np.array_equal(data.posterior["k"].values, k.view(2, 20).numpy())
    assert float(arviz.rhat(data)["k"]) > 1.5


# -- files -----------------------------------------------------------------------------------------------------------


def same(a: Posterior, b: Posterior, index) -> None:
    assert type(a) is type(b)
    for name in a.samples:
        assert torch.equal(a.samples[name], b.samples[name])
        assert a.table(name, index) == b.table(name, index)
    for key in ("log_weights", "log_evidence", "ess", "probabilities"):
        torch.testing.assert_close(getattr(a, key), getattr(b, key), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(a.khat.nan_to_num(9), b.khat.nan_to_num(9))
    both = []
    for posterior in (a, b):
        pyro.set_rng_seed(5)
        both.append(posterior.resample(20).table("z", index))
    assert both[0] == both[1]


def test_a_saved_posterior_answers_alike(tmp_path, exact, particles):
    for i, posterior in enumerate((exact, particles)):
        posterior.save(tmp_path / f"{i}")
        for lm in (None, P):
            loaded = Posterior.load(tmp_path / f"{i}", lm)
            same(posterior, loaded, 1)
            z = posterior.samples["z"]
            torch.testing.assert_close(loaded.distribution("z").log_prob(z), posterior.distribution("z").log_prob(z))
            assert type(loaded.distribution("z")) is (Table if lm is None else TextTable)
    loaded = Enumerated.load(tmp_path / "0")
    assert torch.equal(loaded.log_prob(z), exact.log_prob(z))
    assert all(map(torch.equal, loaded.log_evidence_bounds, exact.log_evidence_bounds))
    mixed = Enumeration(joint).run()
    mixed.save(tmp_path / "mixed")
    same(mixed, Posterior.load(tmp_path / "mixed"), None)
    found = loaded.predict(model, LABELS, X, None)  # decoding needs an lm, scoring needs the model's
    torch.testing.assert_close(found.log_prob, exact.predict(model, LABELS, X, None).log_prob)


def test_other_kinds_of_posterior_are_saved_as_far_as_they_are_tensors(tmp_path):
    chains = MetropolisHastings(model, num_chains=2, num_samples=10, warmup=5).run(X, Y)
    chains.save(tmp_path / "chains")
    loaded = Posterior.load(tmp_path / "chains")
    same(chains, loaded, 0)
    assert torch.equal(loaded.log_joint, chains.log_joint) and loaded.acceptance.keys() == chains.acceptance.keys()
    grown = SMC(model, num_particles=20, ess_threshold=1.0).run(X, Y)
    assert grown.ancestry
    grown.save(tmp_path / "grown")
    loaded = Posterior.load(tmp_path / "grown")
    assert type(loaded) is Posterior and loaded.table("z", 2) == grown.table("z", 2)


def test_a_posterior_replaces_one_of_its_kind_whole_and_nothing_else(tmp_path, exact, particles, monkeypatch):
    particles.save(tmp_path / "p")
    exact.save(tmp_path / "p")
    same(exact, Posterior.load(tmp_path / "p"), 0)

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    with monkeypatch.context() as m, pytest.raises(OSError):
        m.setattr("lmppl.inference.posterior.files.save_file", full_disk)
        particles.save(tmp_path / "p")
    same(exact, Posterior.load(tmp_path / "p"), 0)
    assert [f.name for f in tmp_path.iterdir()] == ["p"]
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match="is no saved posterior"):
        particles.save(tmp_path / "notes")


def test_broken_and_foreign_files(tmp_path, exact, particles):
    with pytest.raises(ValueError, match="is no saved posterior"):
        Posterior.load(tmp_path / "none")
    for i, (file, content) in enumerate(
        [
            ("posterior.json", b"{"),
            ("posterior.json", b"[]"),
            ("posterior.json", json.dumps({"format": "other"}).encode()),
            ("posterior.safetensors", b"nonsense"),
        ]
    ):
        particles.save(tmp_path / f"{i}")
        (tmp_path / f"{i}" / file).write_bytes(content)
        with pytest.raises(ValueError, match="can be read"):
            Posterior.load(tmp_path / f"{i}")
    particles.save(tmp_path / "swapped")
    exact.save(tmp_path / "exact")
    (tmp_path / "exact" / "posterior.safetensors").replace(tmp_path / "swapped" / "posterior.safetensors")
    loaded = Posterior.load(tmp_path / "swapped")  # the tensors of another run: whole, but its texts are not known
    assert loaded.num_particles == exact.num_particles
    particles.save(tmp_path / "less")
    rest = json.loads((tmp_path / "less" / "posterior.json").read_text())
    for key, value in (("class", "Enumerated"), ("event_dims", {"w": 1}), ("plates", {})):
        (tmp_path / "less" / "posterior.json").write_text(json.dumps({**rest, key: value}))
        with pytest.raises(ValueError, match="can be read"):
            Posterior.load(tmp_path / "less")
    with pytest.raises(ValueError, match="is no Enumerated"):
        Enumerated.load(tmp_path / "swapped")


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
