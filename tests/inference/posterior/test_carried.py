"""Which latents a prediction keeps: those of the run's own elements and global ones; the others are drawn anew."""

from __future__ import annotations

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from five_sigma import within
from tiny import flat_lm
from tiny_masked import masked_lm

from lmppl.distributions import Completion, Unmasking
from lmppl.inference import SMC, Enumeration, Importance, MetropolisHastings, Posterior

LM = flat_lm(vocab=5, seed=0, dtype=torch.float64)  # <eos> . a b c
X, NEW = LM.encode(["a", "b", "ba"]), LM.encode(["c", "ab", "aa"])
Y = LM.encode(["ab", "b", ""], stop="eos")
STYLES = LM.encode(["a", "cc"])
LABELS = ["a", "b", ""]
DOUBLE = torch.float64


def fill(*texts):
    return LM.join(*texts)


def reasoned(x, y):
    """A style for all questions; a reason and an answer for each."""
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5], dtype=DOUBLE)))
    style = STYLES[k]
    with pyro.plate("questions", len(x)):
        z = pyro.sample("z", Completion(LM, fill(style, x), max_tokens=2))
        pyro.sample("y", Completion(LM, fill(style, x, z), max_tokens=2), obs=y)


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    pyro.set_rng_seed(0)
    return Importance(reasoned, num_particles=3000).run(X, Y)


@torch.no_grad()
def likelihoods(x, y, z=None):
    """log p(y | k, x) or log p(y, z | k, x) summed over z, (style, question), exactly."""
    rows = []
    for style in STYLES:
        prior = Completion(LM, fill(style, x), max_tokens=2)
        support = prior.enumerate_support()
        rows.append(prior.log_prob(support) + Completion(LM, fill(style, x, support), max_tokens=2).log_prob(y))
    return torch.stack(rows).logsumexp(1)


def exact_style():
    """p(k | X, Y), (2,)."""
    return likelihoods(X, Y).sum(-1).softmax(0)


def check(found, truth):
    """Importance-weighted probabilities of candidates, at five standard errors."""
    values = found.log_probs.exp()
    w = found.log_weights.exp() / found.log_weights.exp().sum(0)
    mean = (w * values).sum(1)
    error = ((w * (values - mean[:, None])) ** 2).sum(1).sqrt()
    assert bool(((mean - truth).abs() < 5 * error + 1e-9).all()), (mean, truth)


@torch.no_grad()
@pytest.mark.parametrize("x", [NEW, NEW[:2], LM.encode(["c", "ab", "aa", "b"])])
def test_a_new_question_keeps_the_style_and_draws_its_reason(posterior, x):
    """p(y | new x, data) = sum_k p(k | data) sum_z p(z | k, x) p(y | k, x, z)."""
    candidates = LM.encode(LABELS, stop="eos")
    truth = torch.stack([(exact_style().log()[:, None] + likelihoods(x, c)).logsumexp(0).exp() for c in candidates])
    for size in (None, 5000):
        pyro.set_rng_seed(1)
        check(posterior.predict(reasoned, LABELS, x, None, num_particles=size), truth)
    found = posterior.predictive(reasoned, x, None)
    assert torch.equal(found.samples["k"], posterior.samples["k"])
    truth = likelihoods(x, candidates[0])
    for k in range(2):  # of those with this style, y is as the prior says
        own = found.samples["k"] == k
        is_a = (found.samples["y"][own][..., :2] == candidates[0]).all(-1).double()
        within(is_a, truth[k].exp(), sharp=1.0)


@torch.no_grad()
def test_the_same_questions_keep_their_reasons(posterior):
    for y in (Y, None, Y.flip(0), LM.encode(LABELS, stop="eos")):
        found = posterior.predictive(reasoned, X.clone(), y)
        assert torch.equal(found.samples["z"], posterior.samples["z"])
        assert torch.equal(found.samples["k"], posterior.samples["k"])


@torch.no_grad()
def test_keep_says_which():
    posterior = Importance(reasoned, num_particles=100).run(X, Y)
    z, k = posterior.samples["z"], posterior.samples["k"]
    for keep in (["k", "z"], ["z"], ["k"], "k", [], set(), ("z", "k")):
        for x in (X, NEW):
            found = posterior.predictive(reasoned, x, None, keep=keep)
            assert torch.equal(found.samples["z"], z) == ("z" in keep)
            assert torch.equal(found.samples["k"], k) == ("k" in keep)
            weights = posterior.log_weights.log_softmax(0)
            if not len(keep):
                weights = torch.full_like(weights, -math.log(len(weights)))
            torch.testing.assert_close(found.log_weights, weights)
    for keep, said in ((["q"], "keep: 'q'"), (["y"], "keep: 'y'"), (["z"], r"keep: 'z' has plates of shape \(3,\)")):
        with pytest.raises(ValueError, match=said):
            posterior.predictive(reasoned, NEW[:2], None, keep=keep)
    with pytest.raises(ValueError, match="keep: the sampler 'prior'"):
        posterior.predictive(reasoned, NEW, None, keep=["k"], sampler="prior")


def unplated(x, y):
    """One question, no plate: its text is all that says whether the reason is another."""
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5], dtype=DOUBLE)))
    z = pyro.sample("z", Completion(LM, fill(STYLES[k], x), max_tokens=2))
    pyro.sample("y", Completion(LM, fill(STYLES[k], x, z), max_tokens=2), obs=y)


ALGORITHMS = {
    "importance": lambda model: Importance(model, num_particles=100),
    "smc": lambda model: SMC(model, num_particles=100),
    "enumeration": Enumeration,
    "metropolis": lambda model: MetropolisHastings(model, num_chains=10, num_samples=10, warmup=2),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_depends_on_changed_arguments_is_drawn_anew_without_a_plate(name):
    pyro.set_rng_seed(0)
    found = ALGORITHMS[name](unplated).run(X[0], Y[0])
    for posterior in (found, found.resample(300)):
        same = posterior.predictive(unplated, X[0], None).samples
        other = posterior.predictive(unplated, X[2], None).samples
        assert torch.equal(same["z"], posterior.samples["z"]) and not torch.equal(other["z"], posterior.samples["z"])
        assert torch.equal(same["k"], posterior.samples["k"]) and torch.equal(other["k"], posterior.samples["k"])


@torch.no_grad()
def test_a_program_without_the_observation_is_no_other_question():
    def asked(x):
        with pyro.plate("questions", len(x)):
            z = pyro.sample("z", Completion(LM, x, max_tokens=2))
            pyro.sample("y", Completion(LM, fill(x, z), max_tokens=2))

    def run(x, y):
        return pyro.condition(asked, {"y": y})(x)

    posterior = Importance(run, num_particles=50).run(X, Y)
    z = posterior.samples["z"]
    assert torch.equal(posterior.predictive(asked, X).samples["z"], z)
    for x in (NEW, X.flip(0), X[:2], X[[0, 1, 2, 2]]):
        assert not torch.equal(posterior.predictive(asked, x).samples["z"], z)

    def closed(x):
        return lambda: asked(x)

    posterior = Importance(closed(X), num_particles=50).run()
    assert torch.equal(posterior.predictive(closed(X)).samples["z"], posterior.samples["z"])
    assert not torch.equal(posterior.predictive(closed(NEW)).samples["z"], posterior.samples["z"])


def mixture(x, y):
    """A component for each point, of which its prior knows nothing."""
    mean = pyro.sample("mean", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
    with pyro.plate("points", 4):
        c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3, dtype=DOUBLE)))
        pyro.sample("y", dist.Normal(mean + 3.0 * c + x, 1.0), obs=y)


def test_exchangeable_elements_are_told_by_their_arguments():
    x, y = torch.arange(4).double(), torch.tensor([3.0, 1.0, 5.0, 6.0], dtype=DOUBLE)
    pyro.set_rng_seed(0)
    posterior = Importance(mixture, num_particles=2000).run(x, y)
    c, mean = posterior.samples["c"], posterior.samples["mean"]
    same = [posterior.predictive(mixture, x, v) for v in (y, None, y + 1)]  # the points are the same, y is another
    assert all(torch.equal(p.samples["c"], c) and torch.equal(p.samples["mean"], mean) for p in same)
    fresh = [posterior.predictive(mixture, x + 1, v) for v in (y + 1, None)]
    for found in fresh:
        assert torch.equal(found.samples["mean"], mean)
        within(found.samples["c"], 0.3)

    def mixed(x, w, y):
        mixture(x * w, y)

    posterior = Importance(mixed, num_particles=50).run(x, x + 1, y)
    for call in ((x, x + 2, y), (x, x + 2, None)):  # the same points, or others that agree in x
        with pytest.raises(ValueError, match=r"keep: it is not clear whether to keep 'c'.*plate 'points'.*keep=\["):
            posterior.predictive(mixed, *call)
        assert torch.equal(posterior.predictive(mixed, *call, keep=["c", "mean"]).samples["c"], posterior.samples["c"])
        assert not torch.equal(posterior.predictive(mixed, *call, keep=[]).samples["c"], posterior.samples["c"])


def test_without_an_argument_of_the_elements_they_are_new_ones():
    def model(y):
        mixture(0.0, y)

    y = torch.tensor([3.0, 1.0, 5.0, 6.0], dtype=DOUBLE)
    pyro.set_rng_seed(0)
    posterior = Importance(model, num_particles=2000).run(y)
    assert torch.equal(posterior.predictive(model, y.clone()).samples["c"], posterior.samples["c"])  # the whole call
    for other in (None, y + 1):
        found = posterior.predictive(model, other)
        assert torch.equal(found.samples["mean"], posterior.samples["mean"])
        within(found.samples["c"], 0.3)


def test_a_global_latent_whose_prior_has_changed_is_drawn_anew_and_so_is_what_follows_it():
    def model(centre, y):
        a = pyro.sample("a", dist.Normal(centre, 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("other", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
        k = pyro.sample("k", dist.Bernoulli(torch.sigmoid(centre)))
        pyro.sample("m", dist.Bernoulli(0.2 + 0.6 * k))
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    zero, y = torch.tensor(0.0, dtype=DOUBLE), torch.tensor(0.5, dtype=DOUBLE)
    posterior = Importance(model, num_particles=40).run(zero, y)
    for centre, kept in ((zero, ["a", "b", "other", "k", "m"]), (zero + 1, ["other"])):
        found = posterior.predictive(model, centre, None).samples
        assert [n for n in posterior.samples if torch.equal(found[n], posterior.samples[n])] == kept


def test_sequential_plates_enclose_too():
    def model(x, y):
        pyro.sample("k", dist.Bernoulli(torch.tensor(0.5, dtype=DOUBLE)))
        for i in pyro.plate("questions", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
            pyro.sample(f"y{i}", dist.Normal(z + x[i], 1.0), obs=None if y is None else y[i])

    x, y = torch.arange(3).double(), torch.zeros(3, dtype=DOUBLE)
    posterior = Importance(model, num_particles=30).run(x, y)
    for other, kept in ((x, 3), (x + 1, 0), (x[:2], 0)):
        found = posterior.predictive(model, other, None).samples
        assert torch.equal(found["k"], posterior.samples["k"])
        assert sum(torch.equal(found[f"z{i}"], posterior.samples[f"z{i}"]) for i in range(len(other))) == kept


@torch.no_grad()
def test_a_loaded_posterior_knows_its_questions_and_an_old_file_asks(posterior, tmp_path):
    posterior.save(tmp_path / "new")
    loaded = Posterior.load(tmp_path / "new")
    assert torch.equal(loaded.predictive(reasoned, X, None).samples["z"], posterior.samples["z"])
    found = loaded.predictive(reasoned, NEW, None).samples
    assert torch.equal(found["k"], posterior.samples["k"]) and not torch.equal(found["z"], posterior.samples["z"])

    rest = json.loads((tmp_path / "new" / "posterior.json").read_text())
    del rest["arguments"]  # as they were written once
    (tmp_path / "new" / "posterior.json").write_text(json.dumps(rest))
    (tmp_path / "new" / "lmppl.json").unlink()  # an old one has none
    old = Posterior.load(tmp_path / "new")
    with pytest.raises(ValueError, match=r"keep: .*'z'.*arguments of its run are not known"):
        old.predictive(reasoned, NEW, None)
    assert torch.equal(old.predictive(reasoned, NEW, None, keep=["k"]).samples["k"], posterior.samples["k"])


def test_arguments_of_any_kind_are_saved_or_left_out(tmp_path):
    def model(options, *rest, y=None):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.zeros(2, dtype=DOUBLE)
    for i, (options, known) in enumerate((({"a": [1, (2.5, "b")], "t": y}, True), (object(), False))):
        Importance(model, num_particles=5).run(options, ["p", "q"], y=y).save(tmp_path / f"{i}")
        loaded = Posterior.load(tmp_path / f"{i}")
        if known:
            assert torch.equal(loaded.predictive(model, options, ["p", "q"]).samples["z"], loaded.samples["z"])
            assert not torch.equal(loaded.predictive(model, options, ["p", "r"]).samples["z"], loaded.samples["z"])
        else:
            with pytest.raises(ValueError, match="keep"):
                loaded.predictive(model, options, ["p", "q"])


def test_a_path_whose_words_or_order_have_changed_is_drawn_anew():
    """Which words each hole may get, and in which order it is filled, are part of what a path is drawn from."""
    lm = masked_lm(vocab=5)
    letters = lm.encode("abc")

    def model(x, allowed, order, y=None):
        with pyro.plate("texts", len(x)):
            d = Unmasking(lm, x, allowed=allowed, order=order)
            told = d.fill(pyro.sample("z", d))
            pyro.sample("y", dist.Bernoulli(0.2 + 0.6 * (told == letters[2]).any(-1).double()), obs=y)

    x, y = lm.join(lm.encode(["a", "b"]), lm.gap(1)), torch.ones(2)
    every, only_c = torch.arange(5) > 1, torch.arange(5) == letters[2]
    pyro.set_rng_seed(0)
    posterior = Importance(model, num_particles=500).run(x, every, "random", y)
    kept = posterior.predictive(model, x, every, "random", None).samples["z"]
    assert torch.equal(kept, posterior.samples["z"])
    anew = posterior.predictive(model, x, only_c, "random", None).samples["z"]
    assert bool((anew == letters[2]).all())
    other = posterior.predictive(model, x, every, "learned", None).samples["z"]
    assert not torch.equal(other, posterior.samples["z"])


def test_a_text_under_another_constraint_is_drawn_anew():
    """A mask, none, or a function: texts are kept where the same is allowed along them, and only there."""
    every, no_a = torch.ones(5, dtype=torch.bool), torch.arange(5) != 2
    rules = {
        "none": lambda: None,
        "every": lambda: every,
        "no a": lambda: no_a,
        "every, a function": lambda: lambda prefix: every.expand(*prefix.shape[:-1], 5),
        "no a, a function": lambda: lambda prefix: no_a.expand(*prefix.shape[:-1], 5),
        "no a at the end": lambda: lambda prefix: (no_a if prefix.shape[-1] == 1 else every).expand(len(prefix), 5),
    }

    def model(x, rule):
        with pyro.plate("texts", len(x)):
            pyro.sample("z", Completion(LM, x, max_tokens=2, allowed=rules[rule]()))

    x = LM.encode(["a", "b"])
    alike = {"none": 0, "every": 0, "every, a function": 0, "no a": 1, "no a, a function": 1, "no a at the end": 2}
    for old in rules:
        pyro.set_rng_seed(0)
        posterior = Importance(model, num_particles=50).run(x, old)
        for new in rules:
            found = posterior.predictive(model, x, new).samples["z"]
            assert torch.equal(found, posterior.samples["z"]) == (alike[old] == alike[new]), (old, new)
