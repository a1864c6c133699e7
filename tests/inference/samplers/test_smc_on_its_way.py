"""What SMC says of its own way: figures against a plain loop over the ancestry, and a verdict that is right."""

from __future__ import annotations

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from looser_guides import LM, D, evidence, prior
from problems import adapted
from programs_by_hand import Program, contains
from test_smc_programs import hidden_markov

from lmppl.inference import SMC, Enumeration, Importance, MetropolisHastings, Sandwich, compare, diagnose
from lmppl.inference.posterior.log_weights import pareto_khat
from lmppl.inference.training.gflownet import GFlowNet


def by_loop(posterior):
    """(min_ess, survival, score_khat), (*plates) each, of a posterior with one plate axis."""
    n, found = posterior.num_particles, []
    for element in range(posterior.log_evidence.numel()):
        final = posterior.log_weights[:, element].softmax(0)
        ess, khats, alive = [1 / float((final**2).sum())], [], set(range(n))
        for event in reversed(posterior.ancestry):
            chosen = event.chosen[:, element].tolist()
            alive = {chosen[particle] for particle in alive}
            if chosen != list(range(n)):
                scores = event.log_scores[:, element]
                ess.append(1 / float((scores.softmax(0) ** 2).sum()))
                khats.append(float(pareto_khat(scores)))
        khats = [k for k in khats if not math.isnan(k)]
        found.append((min(ess), len(alive) / n, max(khats, default=math.nan)))
    return torch.tensor(found, dtype=torch.float64).T


@pytest.mark.parametrize("twist", [None, "stop", "flow", "optimal", "none is resampled"])
def test_figures_against_a_plain_loop(twist):
    program = Program(3, runs=4)
    options = {"twist": program.log_psi if twist == "optimal" else twist, "ess_threshold": 0.9}
    if twist == "none is resampled":
        options = {"ess_threshold": 0.0}
    posterior = SMC(program.model, None, 40, **options).run()
    assert bool(posterior.ancestry) == (twist != "none is resampled")
    for name, expected in zip(("min_ess", "survival", "score_khat"), by_loop(posterior), strict=True):
        figure = getattr(posterior, name)
        assert figure.shape == (4,)
        torch.testing.assert_close(figure.double(), expected, rtol=1e-5, atol=1e-8, equal_nan=True, msg=name)


def collapsing(steps: int = 2):
    """One particle in 200 carries the evidence, and afterwards all are alike."""
    rare = pyro.sample("rare", dist.Bernoulli(0.005))
    pyro.factor("asks for it", 12.0 * rare)
    for i in range(steps):
        pyro.sample(f"s_{i}", dist.Bernoulli(0.5))


def test_a_collapse_on_the_way_is_suspect_though_the_last_weights_are_alike():
    for seed in range(5):
        pyro.set_rng_seed(seed)
        posterior = SMC(collapsing, None, 400).run()
        if not bool(posterior.samples["rare"].any()):  # none was drawn, P = 0.13
            continue
        assert float(posterior.ess) == pytest.approx(400) and float(posterior.survival) < 0.025
        assert bool(posterior.suspect) and float(posterior.min_ess) < 10


@pytest.mark.parametrize("particles", [16, 64])
def test_a_healthy_run_is_seldom_suspect(particles):
    """600 runs of a hidden Markov model of five steps: fewer than 2% are."""
    model, _, _ = hidden_markov("bernoulli")
    assert float(SMC(model, None, particles).run().suspect.double().mean()) < 0.02


def test_compare_and_diagnose_call_it_suspect():
    pyro.set_rng_seed(0)
    found = compare(collapsing, {"SMC": SMC(collapsing, None, 400), "prior": Importance(collapsing, num_particles=400)})
    row = found["SMC"]
    assert row.suspect == 1.0 and row.min_ess < 0.025 and row.survival < 0.025 and row.ess == pytest.approx(1.0)
    assert any("SMC: suspect in 100%" in note for note in found.notes) and found["prior"].suspect is None
    assert "suspect" in found.markdown() and json.loads(json.dumps(found.to_json()))["rows"][0]["suspect"] == 1.0
    diagnosis = diagnose(SMC(collapsing, None, 400), repetitions=3, simulations=0)
    assert diagnosis["ESS / N"].suspect is False and diagnosis["SMC during the run"].suspect and not diagnosis.ok


# -- what has no right answer is refused -----------------------------------------------------------------------------


def infinite():
    z = pyro.sample("z", prior(max_tokens=2))
    pyro.factor("boundless", torch.where(contains(z, D), torch.inf, 0.0))


def texts():
    pyro.sample("z", prior(max_tokens=2))


def gflownet_step():
    q = adapted(LM)
    guide = lambda: pyro.sample("z", prior(lm=q, max_tokens=2))  # noqa: E731
    GFlowNet(infinite, guide, optimizer=torch.optim.SGD(q.trainable_parameters(), lr=0.1), num_particles=200).step()


ALGORITHMS = {
    "GFlowNet": gflownet_step,
    "importance": lambda: Importance(infinite, num_particles=200).run(),
    "SMC": lambda: SMC(infinite, None, 200).run(),
    "SMC, stop": lambda: SMC(infinite, None, 200, twist="stop").run(),
    "Metropolis-Hastings": lambda: MetropolisHastings(infinite, num_samples=50, num_chains=20).run(),
    "enumeration": lambda: Enumeration(infinite).run(),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_factor_of_infinity_is_refused(name):
    with pytest.raises(ValueError, match="boundless.*inf"):
        ALGORITHMS[name]()


@pytest.mark.parametrize(("value", "says"), [(math.nan, "NaN"), (math.inf, "infinity")])
def test_a_twist_without_a_number_is_refused(value, says):
    def twist(prefix):
        return torch.where(contains(prefix, D), value, 0.0)

    with pytest.raises(ValueError, match=f"twist: it returned {says}.*'z'"):
        SMC(texts, None, 200, twist=twist).run()


def test_a_guide_whose_texts_are_too_short_has_no_upper_bound():
    """log E[Z-hat] is low by what the guide leaves out, and the upper bound is infinite: q = 0 at the exact sample."""

    def model():
        z = pyro.sample("z", prior(max_tokens=3))
        pyro.factor("likes_d", 1.5 * contains(z, D))

    def guide():
        pyro.sample("z", prior(max_tokens=1))

    long = next(z for z in prior(max_tokens=3).enumerate_support() if int((z >= 0).sum()) >= 3)
    for twist in (None, "stop", "flow"):
        bounds = Sandwich(model, guide, 16, twist=twist, repetitions=2).run(exact_sample={"z": long})
        exact = math.log(evidence(prior(max_tokens=3), lambda z: 1.5 * contains(z, D)))
        assert bool((bounds.uppers == torch.inf).all()) and float(bounds.lower) < exact + 0.5
