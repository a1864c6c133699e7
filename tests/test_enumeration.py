"""Enumeration against brute force: every text listed, every density computed by plain loops."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from tiny import tiny_lm
from torch import Tensor

from lmppl import text
from lmppl.constraints import ban
from lmppl.distributions import Completion, NextToken
from lmppl.inference import AxesError, Enumeration, Importance, ZeroEvidence
from lmppl.inference.compare import quality
from lmppl.inference.enumeration import token_tree

LMS = [tiny_lm(vocab=5, seed=s, dtype=torch.float64) for s in range(3)]
SEED = st.integers(0, 2)
Y = "ab"


def infilling(lm, x, y, *, scale=1.0, **rules):
    """z ~ lm(x), y ~ lm(x z), under the rules given for z."""
    rules.setdefault("max_tokens", 3)

    def model():
        with poutine.scale(scale=scale):
            z = pyro.sample("z", Completion(lm, x, **rules))
        pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=4), obs=y)

    return model


def brute(lm, x, y, *, scale=1.0, **rules) -> tuple[Tensor, Tensor]:
    """Every z with log p(z) * scale + log p(y | x z)."""
    rules.setdefault("max_tokens", 3)
    fn = Completion(lm, x, **rules)
    support = fn.enumerate_support()
    with torch.no_grad():
        prior = fn.log_prob(support)
        rest = Completion(lm, lm.join(x, support), max_tokens=4).log_prob(y)
    return support, torch.where(prior == -torch.inf, prior, scale * prior) + rest


def as_dict(values: Tensor, log_weights: Tensor) -> dict[tuple[int, ...], float]:
    rows = {}
    for v, w in zip(values.tolist(), log_weights.tolist(), strict=True):
        if w > -math.inf:
            key = tuple(i for i in v if i != text.PAD)
            assert key not in rows, "a value occurs twice"
            rows[key] = w
    return rows


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-6)


RULES = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(0, 3),
        "stop": st.sampled_from(["eos", ".", ("eos", "."), None]),
        "temperature": st.sampled_from([0.5, 1.0, 2.0]),
        "allowed": st.sampled_from([None, [0, 1, 2], [0, 1, 3, 4]]),
    },
)


@torch.no_grad()
def test_brute_force_is_a_plain_loop():
    lm = LMS[0]
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")
    support, log_joint = brute(lm, x, y)
    for z, weight in zip(support, log_joint, strict=True):
        alone = Completion(lm, x, max_tokens=3).log_prob(z) + Completion(lm, lm.join(x, z), max_tokens=4).log_prob(y)
        assert float(alone) == pytest.approx(float(weight), abs=1e-9)


@settings(max_examples=40)
@given(SEED, st.sampled_from(["", "a", "ba"]), st.sampled_from(["", "a", "ab"]), RULES, st.data())
def test_the_posterior_equals_brute_force(seed, x, y, rules, data):
    lm = LMS[seed]
    rules["min_tokens"] = data.draw(st.integers(0, rules.get("max_tokens", 3)))
    x, y = lm.encode(x), lm.encode(y, stop="eos")
    support, log_joint = brute(lm, x, y, **rules)
    exact = Enumeration(infilling(lm, x, y, **rules)).run()
    assert_same(as_dict(exact.samples["z"], exact.log_weights), as_dict(support, log_joint))
    assert exact.log_evidence == pytest.approx(log_joint.logsumexp(0).item(), abs=1e-8)
    assert exact.log_weights.logsumexp(0) == exact.log_evidence
    assert float(exact.unexplored) == 0.0
    assert exact.log_evidence_bounds[0] == exact.log_evidence_bounds[1] == exact.log_evidence
    assert torch.allclose(exact.log_prior.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    assert exact.khat.isnan()


@settings(max_examples=40)
@given(
    SEED,
    st.sampled_from(["", "a", "ba"]),
    st.floats(0.05, 0.99),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(1, 100),
)
def test_partial_enumerations_have_certified_bounds(seed, x, mass, scale, max_support):
    lm = LMS[seed]
    x, y = lm.encode(x), lm.encode(Y, stop="eos")
    support, log_joint = brute(lm, x, y, scale=scale)
    prior = as_dict(support, Completion(lm, x, max_tokens=3).log_prob(support).detach())
    found = Enumeration(infilling(lm, x, y, scale=scale), mass=mass, max_support=max_support).run()
    weights = as_dict(found.samples["z"], found.log_weights)
    n = len(weights)
    assert n <= max_support
    assert float(found.unexplored) == pytest.approx(1 - sum(math.exp(prior[z]) for z in weights), abs=1e-9)
    assert n == max_support or float(found.unexplored) <= 1 - mass
    # No text more than needed.
    assert n == 1 or float(found.unexplored) + math.exp(min(prior[z] for z in weights)) > 1 - mass
    assert_same(weights, {z: w for z, w in as_dict(support, log_joint).items() if z in weights})
    lower, upper = found.log_evidence_bounds
    truth = float(log_joint.logsumexp(0))
    assert float(lower) - 1e-9 <= truth <= float(upper) + 1e-9
    assert lower == found.log_evidence
    if scale < 1 and n < len(support):
        assert upper == torch.inf
    else:
        expected = math.log(math.exp(float(lower)) + float(found.unexplored) ** scale)
        assert float(upper) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=20)
@given(SEED, st.integers(1, 100))
def test_a_full_support_holds_the_most_probable_texts(seed, max_support):
    lm = LMS[seed]
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")
    fn = Completion(lm, x, max_tokens=3)
    best = fn.log_prob(fn.enumerate_support()).detach().sort(descending=True).values[:max_support]
    found = Enumeration(infilling(lm, x, y), max_support=max_support).run()
    assert torch.allclose(found.log_prior, best)


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
    lm = tiny_lm(vocab=4, seed=5, dtype=torch.float64)
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
    table = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.5, 0.0]])
    seen = torch.tensor([1.0, 0.0])

    def model():
        with pyro.plate("data", 2):
            k = pyro.sample("k", dist.Categorical(logits=table.log()))
            b = pyro.sample("b", dist.Bernoulli(0.2 + 0.2 * k))
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
                    assert float(exact.log_prob(value)[i]) == pytest.approx(log_p, abs=1e-5)
        assert float(exact.log_evidence[i].exp()) == pytest.approx(total, abs=1e-6)
    assert int((exact.log_weights[:, 1] > -torch.inf).sum()) == 4
    assert {k for k, _ in exact.table("k", 0)} == {"0", "1", "2"}


def test_log_prob_of_given_values():
    lm = LMS[0]
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")
    exact = Enumeration(infilling(lm, x, y)).run()
    log_posterior = exact.log_weights - exact.log_evidence
    order = torch.randperm(len(log_posterior))
    wider = text.pad(exact.samples["z"], 9)[order]
    assert torch.equal(exact.log_prob(wider), log_posterior[order])
    assert torch.equal(exact.log_prob({"z": exact.samples["z"][3]}), log_posterior[3])
    outside = lm.encode("abab", stop="eos")
    assert exact.log_prob(outside) == -torch.inf
    partial = Enumeration(infilling(lm, x, y), mass=0.5).run()
    assert partial.log_prob(outside).isnan()
    with pytest.raises(ValueError, match="values: expected the sites"):
        exact.log_prob({"w": wider})


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


def test_a_masked_latent_keeps_its_prior():
    """As in importance sampling, where a masked site is drawn but neither scored by p nor by q."""
    lm = LMS[2]
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")

    def model():
        with poutine.mask(mask=False):
            z = pyro.sample("z", Completion(lm, x, max_tokens=3))
        pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=4), obs=y)

    def masked_distribution():
        z = pyro.sample("z", Completion(lm, x, max_tokens=3).mask(False))
        pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=4), obs=y)

    plain = Enumeration(infilling(lm, x, y)).run()
    for program in (model, masked_distribution):
        assert torch.allclose(Enumeration(program).run().log_evidence, plain.log_evidence)


def test_factors_leave_the_upper_end_open_unless_bounded():
    lm = LMS[0]
    x = lm.encode("a")

    def model():
        z = pyro.sample("z", Completion(lm, x, max_tokens=3))
        pyro.factor("reward", 0.5 * text.length(z).double())

    complete = Enumeration(model).run()
    lower, upper = complete.log_evidence_bounds
    assert lower == upper == complete.log_evidence
    partial = Enumeration(model, mass=0.8).run()
    assert partial.log_evidence_bounds[1] == torch.inf
    bounded = Enumeration(model, mass=0.8, factor_bound=2.0).run()
    assert bounded.log_evidence_bounds[0] <= complete.log_evidence <= bounded.log_evidence_bounds[1] < torch.inf


def test_pruned_mass_is_accounted_for_and_the_floor_lowered(monkeypatch):
    lm = LMS[0]
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")
    usual = Enumeration(infilling(lm, x, y), mass=0.97).run()
    start = token_tree.Tree._start
    starts = []

    def high(tree):
        tree.floor = -1.0 if not starts else tree.floor  # far too high: most of the mass falls below
        starts.append(tree.floor)
        start(tree)

    monkeypatch.setattr(token_tree.Tree, "_start", high)
    found = Enumeration(infilling(lm, x, y), mass=0.97).run()
    assert len(starts) > 1
    assert float(found.unexplored) <= 0.03
    assert_same(as_dict(found.samples["z"], found.log_weights), as_dict(usual.samples["z"], usual.log_weights))


def test_too_many_nodes_to_hold(monkeypatch):
    """Forgotten nodes count as unexplored, with a finite upper bound."""
    lm = LMS[0]
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")
    truth = Enumeration(infilling(lm, x, y)).run().log_evidence
    monkeypatch.setattr(token_tree, "CAPACITY", 1)
    monkeypatch.setattr(token_tree, "BATCH", 2)
    for mass in (0.9, 1.0):
        found = Enumeration(infilling(lm, x, y), mass=mass, max_support=3).run()
        assert len(found.log_weights) == 3
        assert float(found.unexplored) == pytest.approx(1 - float(found.log_prior.exp().sum()), abs=1e-9)
        assert found.log_evidence_bounds[0] <= truth <= found.log_evidence_bounds[1]


def test_prefix_constraints():
    lm = LMS[1]
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")

    def never_twice(prefix: Tensor) -> Tensor:
        """No token twice in a row, except a stop."""
        mask = torch.ones(*prefix.shape[:-1], lm.vocab_size, dtype=torch.bool)
        if prefix.shape[-1]:
            mask.scatter_(-1, prefix[..., -1:], False)
        mask[..., 0] = True
        return mask

    for allowed in (never_twice, ban(lm, ["a"])):
        _, log_joint = brute(lm, x, y, allowed=allowed)
        exact = Enumeration(infilling(lm, x, y, allowed=allowed)).run()
        assert float(exact.log_evidence) == pytest.approx(float(log_joint.logsumexp(0)), abs=1e-8)
        assert int((exact.log_weights > -torch.inf).sum()) == int((log_joint > -torch.inf).sum())


def test_zero_evidence():
    lm = LMS[0]
    x, y = lm.encode("a"), lm.encode("ab")  # no stop: not a whole text
    found = Enumeration(infilling(lm, x, y)).run()
    assert found.log_evidence == -torch.inf
    assert found.ess == 0
    for use in (lambda: found.table("z"), lambda: found.resample(5)):
        with pytest.raises(ZeroEvidence):
            use()


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
    lm = tiny_lm(vocab=4, dtype=torch.float64)
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


def test_no_latent_site_is_the_evidence_itself():
    lm = LMS[0]
    x, y = lm.encode("a"), lm.encode("b", stop="eos")
    fn = Completion(lm, x, max_tokens=2)
    exact = Enumeration(lambda: pyro.sample("y", fn, obs=y)).run()
    assert torch.allclose(exact.log_evidence, fn.log_prob(y))
    assert float(exact.unexplored) == 0


def test_a_large_vocabulary_stays_within_its_means():
    """26 letters and 12 tokens: 26^12 texts; the most probable are found, the rest is bounded."""
    lm = tiny_lm(vocab=26, seed=1)
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")
    found = Enumeration(infilling(lm, x, y, max_tokens=12), max_support=300).run()
    assert len(found.log_weights) == 300
    fn = Completion(lm, x, max_tokens=12)
    assert torch.allclose(fn.log_prob(found.samples["z"]), found.log_prior, atol=1e-4)
    # Nothing drawn beats the worst text that was kept and is not among them.
    drawn = fn.sample((500,)).unique(dim=0)
    log_p = fn.log_prob(drawn).detach()
    missed = found.log_prob(drawn).isnan()
    assert float(log_p[missed].max()) <= float(found.log_prior.min()) + 1e-4
    lower, upper = found.log_evidence_bounds
    assert lower < upper < torch.inf


def test_quality_of_draws_and_density_without_plates():
    lm, other = LMS[0], LMS[1]
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")
    model = infilling(lm, x, y)
    exact = Enumeration(model).run()

    def guide():
        pyro.sample("z", Completion(other, x, max_tokens=3))

    found = Importance(model, guide, 50).run()
    assert 0 < float(quality.draw_quality(exact, found)) < 1
    q = Completion(other, x, max_tokens=3).log_prob(exact.samples["z"]).detach().exp()
    expected = 0.5 * float((q - exact.probabilities).abs().sum())
    assert float(quality.density_quality(exact, guide, (), {}).total_variation) == pytest.approx(expected, abs=1e-9)


def test_prompts_get_their_bos_once():
    """A tokenizer that puts a bos before any text, and prompts that are empty, alone and in a batch."""
    for add_bos in (False, True):
        lm = tiny_lm("llama", vocab=6, dtype=torch.float64, add_bos=add_bos)
        x, y = lm.encode(["", "a"]), lm.encode(["a", "a"], stop="eos")

        def model(lm=lm, x=x, y=y):
            with pyro.plate("data", 2):
                z = pyro.sample("z", Completion(lm, x, max_tokens=2))
                pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=2), obs=y)

        exact = Enumeration(model).run()
        log_prior = Completion(lm, x, max_tokens=2).log_prob(exact.samples["z"])
        assert torch.allclose(log_prior, exact.log_prior)
