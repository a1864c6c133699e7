"""Reverse inference: the posterior by plain loops, and the embedded experiment's parts."""

from __future__ import annotations

import math

import pytest
from reference import Law, Plain, tokens
from tiny import flat_lm

from lmppl.inference import Enumeration, Importance
from lmppl.inference.judging.quality import density_quality, outside_mass
from lmppl.models import EXPERIMENTS, Reverse

MAX_TOKENS = 2


@pytest.fixture(scope="module")
def tiny():
    lm = flat_lm(vocab=5)
    return lm, Reverse(lm, lm, prefix="a", max_tokens=MAX_TOKENS, template="{y}b"), lm.encode(["ab", "c."])


def test_the_enumerated_posterior_is_that_of_plain_loops(tiny):
    lm, task, y = tiny
    exact = Enumeration(task.model).run(y)
    plain, prefix, end = Plain(lm), tokens(task.prefix), lm.token_id(".")
    prior = Law(plain, prefix, MAX_TOKENS, stops=(end,)).support()
    for i, seen in enumerate(tokens(row) for row in y):
        joint = {}
        for x, log_p in prior.items():
            told = prefix + x  # it ends with ".", which is part of what is told
            joint[x] = math.exp(log_p + Law(plain, told, len(seen), stops=()).log_prob(seen))
        found = {tokens(x): float(p) for x, p in zip(exact.samples["x"][:, i], exact.probabilities[:, i], strict=True)}
        assert float(exact.log_evidence[i]) == pytest.approx(math.log(sum(joint.values())), abs=1e-9)
        assert all(found[x] == pytest.approx(p / sum(joint.values()), abs=1e-9) for x, p in joint.items())


def test_importance_sampling_estimates_the_evidence_with_and_without_the_guide(tiny):
    """The mean of N weights, whose standard error is their spread over sqrt(N), within 5 of them."""
    _, task, y = tiny
    truth, n = Enumeration(task.model).run(y).log_evidence.exp(), 3000
    for guide in (None, task.guide):
        weights = Importance(task.model, guide, num_particles=n).run(y).log_weights.exp() * n
        assert bool(((weights.mean(0) - truth).abs() < 5 * weights.std(0) / n**0.5).all())


def test_the_guide_reads_the_ending_and_the_model_does_not_before_it():
    experiment = EXPERIMENTS["reverse"]()
    (y,) = experiment.test
    assert experiment.site == "x" and len(y) == 16
    assert experiment.lm.decode(y[0]).count(".") == 2  # the middle and the ending
    posterior = Importance(experiment.model, num_particles=4).run(y[:2])
    assert all(s.endswith(".") for s in sum(experiment.lm.decode(posterior.samples["x"]), []))
    with pytest.raises(ValueError, match="guide_lm"):
        Reverse(experiment.lm).guide(y)
    with pytest.raises(ValueError, match="data"):
        EXPERIMENTS["reverse"](experiment.lm)


def density_tv(experiment, exact) -> float:
    return float(density_quality(exact, experiment.guide, experiment.test, {}).total_variation.mean())


@pytest.mark.slow
def test_a_short_training_comes_close_to_the_posterior():
    experiment = EXPERIMENTS["reverse"]()
    exact = experiment.exact.run(*experiment.test)
    outside = outside_mass(exact, Importance(experiment.model, num_particles=500).run(*experiment.test))
    assert float(outside.mean()) < 0.01  # what the enumeration lacks is no large part of any distance
    before = density_tv(experiment, exact)
    experiment.gflownet().fit(experiment.batches, 60, progress=False)
    after = density_tv(experiment, exact)
    print(before, after)
    assert before > 0.5 and after < 0.25


@pytest.mark.slow
def test_the_recipe_reaches_the_posterior_of_unseen_stories():
    experiment = EXPERIMENTS["reverse"]()
    exact = experiment.exact.run(*experiment.test)
    experiment.gflownet().fit(experiment.batches, experiment.recipe.steps, progress=False)
    tv = density_tv(experiment, exact)
    print(tv)
    assert tv < 0.05
