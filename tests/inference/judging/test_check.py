"""`lmppl.check`: what it reports of a sound pair of programs, and what it says of each thing wrong."""

from __future__ import annotations

import math

import peft
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from tiny import tiny_lm

import lmppl
from lmppl import LanguageModel, text
from lmppl.distributions import Completion
from lmppl.inference.judging.check import Report


class Pair:
    """Infilling with a tiny language model, in a plate of two."""

    def __init__(self, stop="eos", max_tokens=3, seed=0):
        self.lm = tiny_lm(vocab=6, seed=seed)
        self.guide_lm = self.lm.with_adapter(peft.LoraConfig(r=4, target_modules="all-linear"))
        self.rules = {"max_tokens": max_tokens, "stop": stop}
        self.x = self.lm.encode(["a", "b"])
        self.y = self.lm.encode(["ab", "b"], stop="eos")

    def model(self, x, y):
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(self.lm, x, **self.rules))
            pyro.sample("y", Completion(self.lm, self.lm.join(x, z), max_tokens=4), obs=y)

    def guide(self, x, y):
        with pyro.plate("data", 2):
            pyro.sample("z", Completion(self.guide_lm, self.guide_lm.join(y, x), **self.rules))


def run(model, guide, *args, **kwargs) -> Report:
    return lmppl.check(model, guide, *args, show=False, **kwargs)


def only_problem(report: Report) -> str:
    assert len(report.problems) == 1 and not report.ok, report.problems
    assert "\n" not in report.problems[0]
    return report.problems[0]


def test_a_sound_pair(capsys):
    pair = Pair()
    report = lmppl.check(pair.model, pair.guide, pair.x, pair.y, num_particles=12)
    assert report.ok, report.problems
    assert report.axes["z"] == [("prefix", 1), ("particle", 12), ("data", 2), ("token", 4)]
    assert report.axes["y"] == [("prefix", 1), ("particle", 12), ("data", 2), ("token", 5)]
    assert len(report.samples["z"]) == 5
    assert report.sd_u.shape == report.ess.shape == (2,)
    stops = report.stop_probabilities["z"]
    assert len(stops) == 4 and (math.isnan(stops[3]) or stops[3] == pytest.approx(1.0))
    fn = Completion(pair.guide_lm, pair.guide_lm.join(pair.y, pair.x), **pair.rules)
    empty = pair.lm.encode("", stop="eos")
    assert stops[0] == pytest.approx(float(fn.log_prob(empty).detach().exp().mean()), abs=1e-9)
    assert report.gradients and all(report.gradients.values())
    before, after = report.overfit
    assert after < 0.9 * before
    printed = capsys.readouterr().out
    assert "No problem found" in printed and "particle 12" in printed and "sd of u" in printed


def test_everything_is_put_back():
    pair = Pair()
    parameters = pair.guide_lm.trainable_parameters()
    parameters[0].grad = torch.ones_like(parameters[0])
    before = {n: p.clone() for n, p in pair.guide_lm.model.named_parameters()}
    optimizer = torch.optim.Adam(parameters)
    pyro.param("mine", torch.tensor(1.0))
    state, expected = torch.get_rng_state(), torch.rand(3)
    torch.set_rng_state(state)

    def guide(x, y):
        pyro.param("new", torch.tensor(2.0))
        pair.guide(x, y)

    report = run(pair.model, guide, pair.x, pair.y)
    assert report.overfit is not None
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(p, before[n]) for n, p in pair.guide_lm.model.named_parameters())
    assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
    assert all(p.grad is None for p in parameters[1:])
    assert not optimizer.state
    assert set(pyro.get_param_store().keys()) == {"mine"}


def test_an_observed_text_without_its_stop():
    pair = Pair()
    said = only_problem(run(pair.model, pair.guide, pair.x, pair.lm.encode(["ab", "b"])))
    assert said.startswith("site 'y': the observed text does not end with its stop token") and "lm.encode" in said


def test_an_observed_text_longer_than_max_tokens():
    pair = Pair()
    y = pair.lm.encode(["ababab", "b"], stop="eos")
    assert "raise max_tokens" in only_problem(run(pair.model, pair.guide, pair.x, y))


def test_a_factor_of_zero():
    pair = Pair()

    def model(x, y):
        pair.model(x, y)
        pyro.factor("never", torch.tensor(-math.inf))

    assert only_problem(run(model, pair.guide, pair.x, pair.y)).startswith("site 'never': probability zero")


def test_a_guide_with_other_rules_than_the_model():
    pair, other = Pair(), Pair(stop=".")
    said = only_problem(run(pair.model, other.guide, pair.x, pair.y))
    assert said.startswith("site 'z': the model gives every value that the guide draws probability zero")


def test_sites_that_do_not_match():
    pair = Pair()
    blocked = poutine.block(pair.guide, hide=["z"])
    assert "does not sample 'z'" in only_problem(run(pair.model, blocked, pair.x, pair.y))


def test_a_model_not_written_for_leading_axes():
    pair = Pair()

    def bare_sum(x, y):
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(pair.lm, x, **pair.rules))
            pyro.factor("length", text.length(z).double().sum() / 10)

    def first_only(x, y):
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(pair.lm, x, **pair.rules))
            pyro.sample("k", dist.Categorical(torch.ones(12)[: len(z)]), obs=torch.arange(2))
            pyro.factor("odd", torch.zeros(2, len(z)))

    assert "'length'" in only_problem(run(bare_sum, pair.guide, pair.x, pair.y))
    assert "axes on the left" in only_problem(run(first_only, pair.guide, pair.x, pair.y))


def test_advice_fits_what_is_wrong():
    """A word that cannot be written is no matter of shapes; a loop over a latent is one of branches."""
    pair = Pair()

    def unknown(x, y):
        pyro.sample("z", Completion(LanguageModel.embedded("stories"), "Liked:", max_tokens=3))

    def loop(x, y):
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        for i in range(int(k)):
            pyro.sample(f"z{i}", Completion(pair.lm, "a", **pair.rules))

    said = only_problem(run(unknown, None, pair.x, pair.y))
    assert "cannot be encoded" in said and "on the left" not in said
    assert "poutine.mask" in only_problem(run(loop, None, pair.x, pair.y))


def test_a_guide_that_is_the_model_s_language_model_has_nothing_of_its_own_to_train():
    pair = Pair()

    def guide(x, y):
        with pyro.plate("data", 2):
            pyro.sample("z", Completion(pair.lm, x, temperature=2.0, **pair.rules))

    report = run(pair.model, guide, pair.x, pair.y)
    assert "of its own" in only_problem(report) and report.overfit is None


def test_nothing_to_train_and_no_gradient():
    pair, frozen = Pair(), Pair()
    for p in frozen.lm.parameters():
        p.requires_grad_(False)

    class NoGradient(Completion):
        def _scores(self, value):
            with torch.no_grad():
                return super()._scores(value)

    def without_gradient(x, y):
        with pyro.plate("data", 2):
            pyro.sample("z", NoGradient(pair.guide_lm, pair.guide_lm.join(y, x), **pair.rules))

    assert "no trainable parameters" in only_problem(run(frozen.model, frozen.guide, pair.x, pair.y))
    report = run(pair.model, without_gradient, pair.x, pair.y)
    assert "no gradient reaches" in only_problem(report)
    assert set(report.gradients.values()) == {None}


def test_what_cannot_be_overfitted():
    pair = Pair()
    said = only_problem(run(pair.model, pair.guide, pair.x, pair.y, learning_rate=1e-9))
    assert "cannot be overfitted" in said and "learning_rate" in said


def test_a_stop_that_never_comes():
    pair = Pair()
    rules = {"max_tokens": 3, "stop": ".", "temperature": 0.02}  # sharpens the stop's low logit to nothing

    def model(x):
        pyro.sample("z", Completion(pair.lm, x, **rules))

    report = run(model, None, pair.lm.encode("a"))
    stops = [p for p in report.stop_probabilities["z"][:-1] if not math.isnan(p)]
    assert max(stops) < 1e-4, "the tiny language model stops here; choose another seed"
    assert "never stops by itself" in only_problem(report)


def test_nan_logits():
    pair = Pair()
    with torch.no_grad():
        next(pair.lm.model.parameters()).fill_(math.nan)
    said = only_problem(run(pair.model, pair.guide, pair.x, pair.y))
    assert "NaN" in said and "float32" in said


def test_no_guide():
    pair = Pair()
    report = run(pair.model, None, pair.x, pair.y)
    assert report.ok and report.overfit is None and not report.gradients
