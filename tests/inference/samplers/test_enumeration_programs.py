"""Enumeration of programs: several sites, ordinary latents, plates of either kind, scale, and what is refused."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import LMS, SEED, Y, as_dict, assert_same, infilling
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from tiny import flat_lm

from lmppl import text
from lmppl.distributions import Completion, NextToken
from lmppl.inference import AxesError, Enumeration


@settings(max_examples=10)
@given(SEED, st.sampled_from([0.6, 0.9, 1.0]), st.sampled_from(["eos", ("eos", "."), None]))
def test_each_plate_element_has_its_own_tree(seed, mass, stop):
    lm = LMS[seed]
    x, y = lm.encode(["", "a", "bab"]), lm.encode(["a", "", "bb"], stop="eos")
    limits = torch.tensor([2, 1, 3])

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", Completion(lm, x, max_tokens=limits, stop=stop))
            pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=4), obs=y)

    exact = Enumeration(model, mass=mass).run()
    assert exact.log_evidence.shape == exact.unexplored.shape == (3,)
    for i in range(3):
        alone = Enumeration(infilling(lm, x[i], y[i], max_tokens=int(limits[i]), stop=stop), mass=mass).run()
        assert_same(
            as_dict(exact.samples["z"][:, i], exact.log_weights[:, i]),
            as_dict(alone.samples["z"], alone.log_weights),
        )
        assert torch.allclose(exact.unexplored[i], alone.unexplored)
        assert torch.allclose(torch.stack(exact.log_evidence_bounds)[:, i], torch.stack(alone.log_evidence_bounds))
    assert torch.allclose(exact.log_weights.logsumexp(0), exact.log_evidence)
    draws = exact.resample(50, "multinomial")
    assert draws.log_weights.shape == (50, 3)
    assert bool((exact.log_prob({"z": draws.samples["z"]}) > -torch.inf).all())


def chain(lm, x, y):
    """A Categorical, a text whose length limit it sets, a token, another text, an observation."""

    def model():
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)))
        a = pyro.sample("a", Completion(lm, x, max_tokens=1, temperature=1.0 + k))
        t = pyro.sample("t", NextToken(lm, lm.join(x, a)))
        b = pyro.sample("b", Completion(lm, lm.join(x, a, t[..., None]), max_tokens=1, stop="."))
        pyro.sample("y", Completion(lm, lm.join(x, a, b), max_tokens=3), obs=y)

    return model


def chain_brute(lm, x, y):
    rows = {}
    for k, p in enumerate([0.2, 0.5, 0.3]):
        fn_a = Completion(lm, x, max_tokens=1, temperature=1.0 + k)
        for a in fn_a.enumerate_support():
            for t in torch.arange(lm.vocab_size):
                fn_b = Completion(lm, lm.join(x, a, t[None]), max_tokens=1, stop=".")
                for b in fn_b.enumerate_support():
                    key = (k, tuple(i for i in a.tolist() if i >= 0), int(t), tuple(i for i in b.tolist() if i >= 0))
                    prior = math.log(p) + fn_a.log_prob(a) + NextToken(lm, lm.join(x, a)).log_prob(t) + fn_b.log_prob(b)
                    rows[key] = (prior, prior + Completion(lm, lm.join(x, a, b), max_tokens=3).log_prob(y))
    return rows


@torch.no_grad()
def test_several_sites_in_program_order():
    lm = flat_lm(vocab=4, seed=5, dtype=torch.float64)
    x, y = lm.encode("a"), lm.encode("b", stop="eos")
    expected = chain_brute(lm, x, y)
    joint = torch.stack([v[1] for v in expected.values()])

    def keys(found):
        s = found.samples
        texts = [[tuple(i for i in row if i >= 0) for row in s[n].tolist()] for n in ("a", "b")]
        return list(zip(s["k"].tolist(), texts[0], s["t"].tolist(), texts[1], strict=True))

    exact = Enumeration(chain(lm, x, y)).run()
    found = keys(exact)
    assert len(found) == len(set(found)) == len(expected)
    for key, weight in zip(found, exact.log_weights, strict=True):
        assert float(weight) == pytest.approx(float(expected[key][1]), abs=1e-8)
    assert float(exact.log_evidence) == pytest.approx(float(joint.logsumexp(0)), abs=1e-8)

    for mass in (0.3, 0.8, 0.99):
        partial = Enumeration(chain(lm, x, y), mass=mass).run()
        missing = sum(float(v[0].exp()) for v in expected.values()) - sum(
            float(expected[k][0].exp()) for k in keys(partial)
        )
        assert float(partial.unexplored) == pytest.approx(missing, abs=1e-9)
        assert missing <= 1 - mass + 1e-9
        assert partial.log_evidence_bounds[0] <= exact.log_evidence <= partial.log_evidence_bounds[1]
    capped = Enumeration(chain(lm, x, y), max_support=7).run()
    assert len(capped.log_weights) <= 7
    assert capped.log_evidence_bounds[0] <= exact.log_evidence <= capped.log_evidence_bounds[1]
    assert float(capped.unexplored) > 0


def test_ordinary_sites_alone_and_in_plates():
    table = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.5, 0.0]], dtype=torch.float64)
    seen = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def model():
        with pyro.plate("data", 2):
            k = pyro.sample("k", dist.Categorical(logits=table.log()))
            b = pyro.sample("b", dist.Bernoulli(0.2 + 0.2 * k.double()))
            pyro.sample("y", dist.Bernoulli(0.1 + 0.8 * b), obs=seen)

    exact = Enumeration(model).run()
    for i in range(2):
        total = 0.0
        for k in range(3):
            for b in range(2):
                p_b, p_y = 0.2 + 0.2 * k, 0.1 + 0.8 * b
                p = float(table[i, k]) * (p_b if b else 1 - p_b) * (p_y if seen[i] else 1 - p_y)
                total += p
                value = {"k": torch.tensor([k, k]), "b": torch.tensor([float(b), float(b)])}
                if float(table[i, k]) > 0:
                    log_p = math.log(p) - float(exact.log_evidence[i])
                    assert float(exact.log_prob(value)[i]) == pytest.approx(log_p, abs=1e-9)
        assert float(exact.log_evidence[i].exp()) == pytest.approx(total, abs=1e-9)
    assert int((exact.log_weights[:, 1] > -torch.inf).sum()) == 4
    assert {k for k, _ in exact.table("k", 0)} == {0, 1, 2}


def test_subsampling_and_scale_are_those_of_the_evidence():
    """Along a kept plate subsampling is divided out: each datum's evidence is its own."""
    lm = LMS[1]
    xs, y = lm.encode(["a", "b", "ab", "ba"]), lm.encode(Y, stop="eos")

    def model():
        with pyro.plate("data", 4, subsample=torch.tensor([2, 0])) as i, poutine.scale(scale=2.0):
            z = pyro.sample("z", Completion(lm, xs[i], max_tokens=2))
            pyro.sample("y", Completion(lm, lm.join(xs[i], z), max_tokens=4), obs=y)

    found = Enumeration(model, mass=0.7).run()
    for column, i in enumerate((2, 0)):
        fn = Completion(lm, xs[i], max_tokens=2)
        support = fn.enumerate_support()
        rest = Completion(lm, lm.join(xs[i], support), max_tokens=4).log_prob(y)
        truth = float((2 * fn.log_prob(support) + 2 * rest).detach().logsumexp(0))
        lower, upper = (float(b[column]) for b in found.log_evidence_bounds)
        assert lower <= truth <= upper
        assert upper == pytest.approx(math.log(math.exp(lower) + float(found.unexplored[column]) ** 2), abs=1e-9)
    drawn = Enumeration(lambda: random_subsample(lm, xs, y)).run()
    assert drawn.log_evidence.shape == (2,)


def random_subsample(lm, xs, y):
    with pyro.plate("data", 4, subsample_size=2) as i:
        z = pyro.sample("z", Completion(lm, xs[i], max_tokens=2))
        pyro.sample("y", Completion(lm, lm.join(xs[i], z), max_tokens=4), obs=y)


def test_refusals():
    lm = LMS[0]
    x, y = lm.encode(["a", "b"]), lm.encode(["a", "b"], stop="eos")

    def continuous():
        pyro.sample("rate", dist.Gamma(1.0, 1.0))

    def infinite():
        pyro.sample("count", dist.Poisson(1.0))

    def factor_outside():
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(lm, x, max_tokens=2))
        pyro.factor("joint", text.length(z).sum(-1).double())

    def subsampled_observations():
        z = pyro.sample("z", Completion(lm, x[0], max_tokens=2))
        with pyro.plate("data", 2, subsample_size=1) as i:
            pyro.sample("y", Completion(lm, lm.join(x[0], z[..., None, :].squeeze(-2)), max_tokens=2), obs=y[i])

    for model, said in (
        (continuous, "site 'rate': Gamma has no finite support"),
        (infinite, "site 'count': Poisson has no finite support"),
        (factor_outside, "site 'z': it lies in the plate 'data'"),
        (subsampled_observations, "plate 'data' is subsampled"),
    ):
        with pytest.raises(ValueError, match=said):
            Enumeration(model).run()
    for bad in ({"mass": 0.0}, {"mass": 1.5}, {"max_support": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Enumeration(continuous, **bad)


def test_observations_in_a_plate_that_is_not_kept_are_joint():
    lm = LMS[0]
    x, y = lm.encode("a"), lm.encode(["a", "b"], stop="eos")

    def model():
        z = pyro.sample("z", Completion(lm, x, max_tokens=2))
        with pyro.plate("data", 2):
            pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=2), obs=y)

    exact = Enumeration(model).run()
    fn = Completion(lm, x, max_tokens=2)
    support = fn.enumerate_support()
    rest = sum(Completion(lm, lm.join(x, support), max_tokens=2).log_prob(one) for one in y)
    assert torch.allclose(exact.log_evidence, (fn.log_prob(support) + rest).logsumexp(0))


def test_latents_of_a_sequential_plate_are_joint():
    lm = flat_lm(vocab=4, dtype=torch.float64)
    x, y = lm.encode(["a", "b"]), lm.encode(["a", "b"], stop="eos")

    def model():
        for i in pyro.plate("data", 2):
            z = pyro.sample(f"z{i}", Completion(lm, x[i], max_tokens=1))
            pyro.sample(f"y{i}", Completion(lm, lm.join(x[i], z), max_tokens=2), obs=y[i])

    exact = Enumeration(model).run()
    single = [Enumeration(infilling(lm, x[i], y[i], max_tokens=1)).run().log_evidence for i in range(2)]
    assert torch.allclose(exact.log_evidence, sum(single), atol=0.5)  # y's limits differ: same order only
    count = [len(Completion(lm, x[i], max_tokens=1).enumerate_support()) for i in range(2)]
    assert len(exact.log_weights) == count[0] * count[1]


def test_a_model_without_leading_axes_is_found_out():
    lm = LMS[0]
    x = lm.encode("a")

    def model():
        z = pyro.sample("z", Completion(lm, x, max_tokens=2))
        pyro.factor("bare", text.length(z).double().sum())

    with pytest.raises(AxesError, match="bare"):
        Enumeration(model).run()
