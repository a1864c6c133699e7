"""Infilling with the recipe, a minute of it: the guide is near the posterior, and makes other algorithms better."""

from __future__ import annotations

import pytest

from lmppl.inference import SMC, Importance, MetropolisHastings, compare, diagnose
from lmppl.inference.judging.compare import Meter, particles_within
from lmppl.inference.judging.quality import density_quality
from lmppl.inference.posterior.algorithm import sized
from lmppl.models import infilling

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained():
    """The infilling experiment after a quarter of its recipe's steps, and the exact posterior of its test stories."""
    experiment = infilling.experiment(seed=0)
    exact = experiment.exact.run(*experiment.test)
    before = density_quality(exact, experiment.guide, experiment.test, {}).total_variation.mean()
    experiment.gflownet().fit(experiment.batches, experiment.recipe.quick_steps, seed=0, progress=False)
    return experiment, exact, float(before)


def test_a_guide_trained_for_a_minute_is_near_the_posterior_of_unseen_stories(trained):
    experiment, exact, before = trained
    quality = density_quality(exact, experiment.guide, experiment.test, {})
    assert before > 0.9
    assert float(quality.total_variation.mean()) < 0.06 and float(quality.modes.nanmean()) > 0.95
    posterior = Importance(experiment.model, experiment.guide, 64).run(*experiment.test)
    assert float((posterior.ess / 64).mean()) > 0.9
    error = (posterior.log_evidence - exact.log_evidence).abs()
    assert bool((error < 5 * (1 / posterior.ess - 1 / 64).clamp(min=1e-4).sqrt() + 0.01).all())


def test_a_trained_guide_makes_smc_better_at_the_same_cost(trained):
    """As proposal: the evidence's spread falls; with its flow as twist too, to a fraction."""
    experiment, exact, _ = trained
    model, guide, args = experiment.model, experiment.guide, experiment.test
    meter = Meter([experiment.lm.network])
    budget = meter(lambda: SMC(model, guide, 64, twist="flow").run(*args))[1] / len(args[0])

    def matched(smc):
        return sized(smc, particles_within(smc, budget, meter, args=args))

    result = compare(
        model,
        {
            "prior": matched(SMC(model)),
            "prior, stop": matched(SMC(model, twist="stop")),
            "guide": matched(SMC(model, guide)),
            "guide, flow": SMC(model, guide, 64, twist="flow"),
        },
        *args,
        exact=exact,
        repetitions=8,
    )
    for other in ("prior", "prior, stop"):
        for name in ("guide", "guide, flow"):
            assert result[name].log_evidence_sd < result[other].log_evidence_sd
            assert result[name].draws_tv < result[other].draws_tv - 0.2
        assert result["guide, flow"].log_evidence_sd < 0.2 * result[other].log_evidence_sd
    assert result["guide, flow"].log_evidence_sd < result["guide"].log_evidence_sd


def test_diagnose_tells_a_trained_guide_from_the_prior(trained):
    experiment, _, _ = trained
    args = experiment.test
    guided = diagnose(Importance(experiment.model, experiment.guide, 128), *args, seed=0, simulations=0)
    assert guided["ESS / N"].suspect is False
    prior = diagnose(Importance(experiment.model, num_particles=128), *args, seed=0, simulations=0)
    assert prior["ESS / N"].suspect is True and not prior.ok


def test_markov_chains_with_a_trained_guide_mix_and_from_the_prior_do_not(trained):
    experiment, exact, _ = trained
    options = {"num_chains": 8, "num_samples": 40, "warmup": 10}
    good = MetropolisHastings(experiment.model, experiment.guide, moves="independence", **options).run(*experiment.test)
    bad = MetropolisHastings(experiment.model, **options).run(*experiment.test)
    assert float(good.acceptance["independence"].mean()) > 0.9
    assert float(good.rhat["log_joint"].median()) < 1.05 < float(bad.rhat["log_joint"].median())
