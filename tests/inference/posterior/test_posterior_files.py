"""Posteriors in arviz and in files: they answer alike when they come back, and broken files are refused."""

from __future__ import annotations

import json
import os

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from plate_of_three import LABELS, P, X, Y, joint, model, prior

from lmppl import text
from lmppl.distributions import Table, TextTable
from lmppl.inference import SMC, Enumerated, Enumeration, Importance, MetropolisHastings, Posterior

# -- arviz -----------------------------------------------------------------------------------------------------------


def test_arviz_has_equally_weighted_draws_and_named_plates(particles):
    data = particles.to_arviz()
    assert dict(data.posterior.sizes) == {"chain": 1, "draw": 60, "data": 3, "z_text": 10}
    named = data.posterior["one_hot(z)"].sel(z_text="ab")
    assert named.values.tolist() == (data.texts["z"].values == "ab").astype(int).tolist()
    assert dict(data.sample_stats["log_weight"].sizes) == {"chain": 1, "draw": 60, "data": 3}
    for i in range(3):
        table = dict(particles.table("z", i))
        texts, counts = np.unique(data.texts["z"][0, :, i].values, return_counts=True)
        copies = len(particles.samples["z"])
        for s, count in zip(texts, counts, strict=True):  # systematic: within one of N times each particle's weight
            assert abs(count / 60 - table[s]) < copies / 60
        assert sum(counts) == 60 and set(texts) <= set(table)
    assert data.constant_data["log_evidence"].values == pytest.approx(particles.log_evidence.numpy())


def test_arviz_summarises_numeric_sites():
    posterior = Enumeration(joint).run().resample(500, "multinomial")
    data = posterior.to_arviz()
    assert float(arviz.ess(data, var_names=["k"])["k"]) == pytest.approx(500, rel=0.35)  # independent draws
    table = arviz.summary(data)  # texts are no numbers: they have a group of their own
    numbers, named = list(table.index[:3]), list(table.index[3:])
    assert numbers == ["k", "length(z)", "log_prob(z)"]
    probable = posterior.table("z")[:10]
    assert (
        named == [f"one_hot(z)[{s}]" if s else "one_hot(z)" for s in data.posterior["z_text"].values]
        and len(named) == 10
    )
    assert table.loc[named, "mean"].tolist() == pytest.approx([p for _, p in probable], abs=1e-3)
    assert set(data.posterior["z_text"].values) >= {s for s, p in probable if p > probable[-1][1]}
    row = table.loc["k"]
    mean = sum(k * p for k, p in posterior.table("k"))
    assert row["mean"] == pytest.approx(mean, abs=1e-3)
    assert all(isinstance(s, str) for s in data.texts["z"].values.ravel())  # numpy's own strings lose a NUL at the end
    z, k = posterior.samples["z"], posterior.samples["k"]
    assert data.posterior["length(z)"].values[0].tolist() == text.length(z).tolist()
    expected = prior(X[0], temperature=1.0 + k).log_prob(z).detach()
    assert data.posterior["log_prob(z)"].values[0] == pytest.approx(expected.numpy())
    assert data.posterior["k"].values[0].tolist() == posterior.samples["k"].tolist()  # equal weights: as they are


def test_arviz_keeps_chains_apart():
    class Chains(Posterior):
        num_chains = 2

    k = torch.cat([torch.zeros(20), torch.ones(20)]) + 0.01 * torch.randn(40)  # stuck at two different values
    plain = Importance(lambda: pyro.sample("k", dist.Normal(0.0, 1.0)), num_particles=40).run()
    data = Chains({"k": k}, plain.log_weights, plain.log_evidence, plain.sites).to_arviz()
    assert np.array_equal(data.posterior["k"].values, k.view(2, 20).numpy())
    assert float(arviz.rhat(data)["k"]) > 1.5


@pytest.mark.parametrize("moves", ["regrowth", "independence"])
def test_arviz_has_the_chains_of_metropolis_draw_for_draw(moves):
    """More chains than draws, numbers and texts, a start at probability zero: (chain, draw), as they were."""

    def program():
        with pyro.plate("data", 2):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", prior(X[:2]))
            pyro.factor("f", torch.where(text.length(z) > 1, w, -torch.inf))

    chains = MetropolisHastings(program, num_chains=6, num_samples=5, warmup=0, moves=moves).run()
    assert bool((chains.log_weights == -torch.inf).any())
    data = chains.to_arviz()
    named = min(10, len(set(data.texts["z"].values.flatten())))
    assert dict(data.posterior.sizes) == {"chain": 6, "draw": 5, "data": 2, "z_text": named}
    assert np.array_equal(data.posterior["w"].values, chains.samples["w"].view(6, 5, 2).numpy())
    assert np.array_equal(data.sample_stats["lp"].values, chains.log_joint.numpy())
    log_p = prior(X[:2]).log_prob(chains.samples["z"]).detach().view(6, 5, 2)
    assert data.posterior["log_prob(z)"].values == pytest.approx(log_p.numpy())
    assert data.texts["z"].values.tolist() == np.array(chains.strings("z")).reshape(6, 5, 2).tolist()
    assert float(chains.rhat["w"][1]) == pytest.approx(arviz.rhat(data.posterior["w"].values[..., 1]))
    assert list(chains.resample(10).to_arviz().posterior.sizes.values())[:3] == [1, 10, 2]


def test_companions_of_texts_follow_their_particles(particles):
    """Resampled particles take their log p along; a guide's particles have the model's; a file knows the model not."""
    expected = prior(X).log_prob(particles.samples["z"]).detach()
    torch.testing.assert_close(particles.text_log_probs["z"], expected)
    drawn = particles.resample(25, "multinomial").resample(9)
    torch.testing.assert_close(drawn.text_log_probs["z"], prior(X).log_prob(drawn.samples["z"]).detach())


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
            assert "log_prob(z)" not in Posterior.load(tmp_path / f"{i}", lm).to_arviz().posterior
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
    grown = SMC(model, num_particles=20, ess_threshold=1.0, twist="stop").run(X, Y)
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
        m.setattr(os, "fsync", full_disk)
        particles.save(tmp_path / "p")
    same(exact, Posterior.load(tmp_path / "p"), 0)
    assert [f.name for f in tmp_path.iterdir()] == ["p"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
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
        with pytest.raises(ValueError, match="cannot be read"):
            Posterior.load(tmp_path / f"{i}")
    particles.save(tmp_path / "bare")
    (tmp_path / "bare" / "lmppl.json").unlink()
    (tmp_path / "bare" / "posterior.json").write_text("{")
    with pytest.raises(ValueError, match="read as a posterior: posterior.json: "):
        Posterior.load(tmp_path / "bare")
    particles.save(tmp_path / "swapped")
    exact.save(tmp_path / "exact")
    (tmp_path / "exact" / "posterior.safetensors").replace(tmp_path / "swapped" / "posterior.safetensors")
    with pytest.raises(ValueError, match=r"as a posterior: .*posterior.safetensors is .*changed"):  # of another run
        Posterior.load(tmp_path / "swapped")
    particles.save(tmp_path / "less")
    rest = json.loads((tmp_path / "less" / "posterior.json").read_text())
    for key, value in (("class", "Enumerated"), ("event_dims", {"w": 1}), ("plates", {})):
        (tmp_path / "less" / "posterior.json").write_text(json.dumps({**rest, key: value}))
        with pytest.raises(ValueError, match="cannot be read"):
            Posterior.load(tmp_path / "less")
    particles.save(tmp_path / "plain")
    with pytest.raises(ValueError, match="is no Enumerated"):
        Enumerated.load(tmp_path / "plain")


def test_a_plate_may_have_the_name_of_a_dimension_of_arviz():
    def model():
        with pyro.plate("chain", 2), pyro.plate("draw", 3):
            t = pyro.sample("t", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(t, 1.0), obs=torch.ones(3, 2))

    found = Importance(model, num_particles=5).run().to_arviz().posterior
    assert dict(found.sizes) == {"chain": 1, "draw": 5, "draw_plate": 3, "chain_plate": 2}
