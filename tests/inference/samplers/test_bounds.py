"""Bounds of the evidence from both sides, and of both divergences, against exact enumeration."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from ngrams import ngram_lm
from programs_by_hand import DOT, Program, contains
from pyro import poutine
from tiny import tiny_lm
from torch import Tensor

from lmppl.constraints import ban
from lmppl.distributions import Completion
from lmppl.inference.judging.quality import density_quality
from lmppl.inference.posterior.posterior import Posterior
from lmppl.inference.samplers.enumeration.enumeration import Enumeration
from lmppl.inference.samplers.smc.bounds import Bounds, Sandwich, divergences, simulate
from lmppl.inference.samplers.smc.smc import SMC, run

RUNS = 400
KINDS = {
    "one text": {"observes": False, "switches": False, "continues": False},
    "an observation after it": {"switches": False, "continues": False},
    "two texts, an observation and a Categorical": {},
}


def exact_of(program: Program) -> Posterior:
    """The exact posterior of the whole program: its plate elements are alike, so that one of them is enumerated."""
    one = program.exact
    values = {n: v.expand(-1, program.runs, *v.shape[2:]) for n, v in one.values.items()}
    sites = replace(one.sites, plates=replace(one.sites.plates, sizes=(program.runs,)))
    log_weights = one.log_weights.expand(-1, program.runs)
    return Posterior(values, log_weights, log_weights.logsumexp(0), sites)


def broad(program: Program):
    """A guide far from the posterior: another n-gram, and a Categorical that asks nothing."""
    lm = ngram_lm(4, 2, seed=77)

    def guide():
        with pyro.plate("runs", program.runs, dim=-1):
            pyro.sample("z", program.prior(lm, "b"))
            if program.switches:
                pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5], dtype=torch.float64)))
            if program.continues:
                pyro.sample("w", program.prior(lm, "ab"))

    return guide


def below_and_above(bounds: Bounds, exact: Tensor) -> None:
    """Over plate elements: E lower <= log Z <= E upper and E[exp(log Z - upper)] = 1, to 5 standard errors."""
    low, high = bounds.lower - exact, bounds.upper - exact
    error = [float(x.std()) / len(x) ** 0.5 for x in (low, high)]
    assert float(low.mean()) <= 5 * error[0] and float(high.mean()) >= -5 * error[1]
    inverse = (exact - bounds.uppers).exp().flatten()
    inverse_error = float(inverse.std()) / len(inverse) ** 0.5
    assert abs(float(inverse.mean()) - 1) <= 5 * inverse_error + 1e-9, (float(inverse.mean()), inverse_error)
    assert inverse_error < 0.1, "the test says little: more runs"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("threshold", "twist"), [(0.0, None), (0.5, None), (1.0, None), (1.0, "stop"), (0.7, "flow"), (1.0, "optimal")]
)
def test_both_bounds_and_the_unbiased_inverse(kind, guided, threshold, twist):
    """Threshold 0 is importance sampling."""
    program = Program(2, runs=RUNS, **KINDS[kind])
    chosen = program.log_psi if twist == "optimal" else twist
    sandwich = Sandwich(program.model, broad(program) if guided else None, 4, threshold, twist=chosen)
    bounds = sandwich.run(exact_sample=exact_of(program))
    assert bounds.lower.shape == bounds.upper.shape == (RUNS,)
    below_and_above(bounds, program.log_evidence)


@pytest.mark.parametrize("joint", [False, True])
def test_networks_with_a_cache_data_of_their_own_and_a_looser_guide(joint):
    """Each datum has its own bounds; ``joint``: a factor over the data makes one evidence of them."""
    runs = 200
    lm, other = tiny_lm(vocab=4, dtype=torch.float64), tiny_lm("llama", vocab=4, seed=1, dtype=torch.float64)
    x, y = lm.encode(["a", "b."]), lm.encode(["b", ""], stop="eos")

    def program(size, lm, most, observes):
        with pyro.plate("runs", size, dim=-2):
            with pyro.plate("data", 2, dim=-1):
                z = pyro.sample("z", Completion(lm, x, max_tokens=most, temperature=3.0))
                if observes:
                    pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=1, temperature=3.0), obs=y)
            if joint and observes:
                pyro.factor("alike", (contains(z, DOT).sum(-1, keepdim=True) == 1).double())

    if joint:  # the pairs of texts, enumerated
        fn = Completion(lm, x, max_tokens=2, temperature=3.0)
        z = fn.enumerate_support()  # (K, 2, E)
        seen = Completion(lm, lm.join(x, z), max_tokens=1, temperature=3.0).log_prob(y)
        log_w = (fn.log_prob(z) + seen).detach()
        has = contains(z, DOT)[:, 0]
        pairs = log_w[:, None, 0] + log_w[None, :, 1] + (has[:, None] ^ has).double()
        exact = pairs.logsumexp((0, 1))
        drawn = torch.multinomial(pairs.flatten().softmax(0), runs, replacement=True)
        sample = torch.stack([z[drawn // len(z), 0], z[drawn % len(z), 1]], 1)  # (runs, 2, E)
    else:
        truth = Enumeration(lambda: program(1, lm, 2, True)).run()
        exact, sample = truth.log_evidence[0], truth.resample(runs, "multinomial").samples["z"][:, 0]
    guide = lambda: program(runs, other, 3, False)  # noqa: E731
    sandwich = Sandwich(lambda: program(runs, lm, 2, True), guide, 24, 0.7, twist="stop")
    bounds = sandwich.run(exact_sample={"z": sample})
    assert bounds.lower.shape == ((runs,) if joint else (runs, 2))
    for datum in range(exact.numel()):
        one = Bounds(*(b.reshape(1, runs, -1)[..., datum] for b in (bounds.lowers, bounds.uppers)))
        below_and_above(one, exact.reshape(-1)[datum])


def test_one_particle_gives_elbo_and_eubo():
    """E_q u and E_p u, exactly, by enumeration."""
    program = Program(2, runs=RUNS, switches=False, continues=False)
    bounds = Sandwich(program.model, None, 1).run(exact_sample=exact_of(program))
    u = program.log_w - program.log_prior
    for found, law in ((bounds.lower, program.log_prior), (bounds.upper, program.log_w)):
        expected = (u * law.softmax(0)).sum()
        assert abs(float(found.mean() - expected)) <= 5 * float(found.std()) / RUNS**0.5


@pytest.mark.parametrize("scheme", ["systematic", "residual"])
def test_the_gap_closes_as_particles_are_added(scheme):
    program = Program(2, runs=RUNS)
    truth, gaps = exact_of(program), []
    for n in (2, 8, 32):
        bounds = Sandwich(program.model, None, n, 0.5, scheme).run(exact_sample=truth)
        below_and_above(bounds, program.log_evidence)
        gaps.append(float(bounds.gap.mean()))
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_the_posterior_as_proposal_leaves_no_gap(threshold):
    program = Program(2, runs=20)
    sandwich = Sandwich(program.model, program.posterior(), 3, threshold, twist=program.log_psi, repetitions=3)
    bounds = sandwich.run(exact_sample=exact_of(program))
    assert bounds.lowers.shape == bounds.uppers.shape == (3, 20)
    for found in (bounds.lowers, bounds.uppers):
        torch.testing.assert_close(found, program.log_evidence.expand(3, 20), rtol=0, atol=1e-9)
    torch.testing.assert_close(bounds.standard_errors[0], torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_retained_particle_is_kept_to_its_end():
    """Particle 0 of a conditional run is the exact sample, whatever was resampled; the upper bound is its evidence."""
    program = Program(2, runs=50)
    sample = exact_of(program).resample(1)
    pyro.set_rng_seed(1)
    bounds = Sandwich(program.model, broad(program), 5, 1.0).run(exact_sample=sample.samples)
    pyro.set_rng_seed(1)
    smc = SMC(program.model, broad(program), 5, 1.0)
    assert torch.equal(smc.run().log_evidence, bounds.lowers[0])
    conditional = run(smc, (), {}, sample.samples)
    assert torch.equal(conditional.log_evidence, bounds.uppers[0])
    assert len(conditional.ancestry) >= 2
    for name, value in sample.samples.items():
        assert torch.equal(conditional.samples[name][0], value[0])
        assert not torch.equal(conditional.samples[name][1], value[0])
    for event in conditional.ancestry:
        assert not bool(event.chosen[0].any())


def test_a_guide_that_misses_the_sample_has_no_upper_bound():
    """EUBO and KL(p || q) are infinite where q(z) = 0."""
    program = Program(2, runs=40, switches=False, continues=False)

    def guide():
        with pyro.plate("runs", 40, dim=-1):
            pyro.sample("z", Completion(program.lm, "a", max_tokens=2, allowed=ban(program.lm, ".")))

    sample = exact_of(program).resample(1)
    missed = contains(sample.samples["z"][0], DOT)
    assert bool(missed.any()) and not bool(missed.all())
    bounds = Sandwich(program.model, guide, 4, 0.5).run(exact_sample=sample)
    assert torch.equal(bounds.upper == math.inf, missed) and not bool(bounds.lower.isnan().any())
    found = divergences(program.model, guide, bounds=bounds, exact_sample=sample, num_particles=20)
    assert torch.equal(found.eubo == math.inf, missed)


# -- simulated data --------------------------------------------------------------------------------------------------


def joint(runs: int, y: Tensor | None = None, lm=None):
    """z ~ LM(x), y ~ LM(x z), in a plate; nothing but probabilities, so that it can be simulated."""
    lm = lm or ngram_lm(4, 2, seed=4, scale=0.7)
    seen = lm.encode("a", stop="eos") if y is None else y

    def model():
        with pyro.plate("runs", runs, dim=-1):
            z = pyro.sample("z", Completion(lm, "a", max_tokens=2))
            pyro.sample("y", Completion(lm, lm.join("b", z), max_tokens=1), obs=seen)

    return model


def test_simulated_pairs_follow_the_joint_law():
    """P(y) of simulated observations is the enumerated evidence of each y, and z given y its posterior."""
    n = 8000
    values, observed = simulate(joint(n))
    assert set(values) == {"z"} and set(observed) == {"y"}
    kinds, which = torch.unique(observed["y"], dim=0, return_inverse=True)
    for i, y in enumerate(kinds):
        exact = Enumeration(joint(1, y)).run()
        p, share = float(exact.log_evidence.exp()), float((which == i).double().mean())
        assert abs(share - p) <= 5 * (p * (1 - p) / n) ** 0.5
        z = values["z"][which == i]
        posterior = float((exact.probabilities[:, 0] * contains(exact.samples["z"][:, 0], DOT)).sum())
        found = float(contains(z, DOT).double().mean())
        assert abs(found - posterior) <= 5 * (posterior * (1 - posterior) / len(z)) ** 0.5


def test_bounds_from_simulated_samples():
    """No posterior is ever computed: z* comes with its y. The exact evidence of each y judges the bounds."""
    values, observed = simulate(joint(RUNS))
    model = pyro.condition(poutine.uncondition(joint(RUNS)), data=observed)
    bounds = Sandwich(model, None, 4, 1.0).run(exact_sample=values)
    exact = torch.empty(RUNS, dtype=torch.float64)
    kinds, which = torch.unique(observed["y"], dim=0, return_inverse=True)
    for i, y in enumerate(kinds):
        exact[which == i] = Enumeration(joint(1, y)).run().log_evidence
    below_and_above(bounds, exact)


@pytest.mark.parametrize("obstacle", ["factor", "scaled", "masked"])
def test_what_cannot_be_simulated(obstacle):
    lm = ngram_lm(4, 1)

    def model():
        handler = {"scaled": poutine.scale(scale=0.5), "masked": poutine.mask(mask=torch.tensor(False))}
        with handler.get(obstacle, poutine.scale(scale=1.0)):
            z = pyro.sample("z", Completion(lm, "a", max_tokens=1))
        if obstacle == "factor":
            pyro.factor("f", contains(z, DOT).double())

    with pytest.raises(ValueError, match=f"model: .*{obstacle}"):
        simulate(model)


# -- divergences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_both_divergences_against_enumeration(kind):
    """The exact KL lies in the interval, widened by 5 standard errors over the plate elements."""
    program = Program(2, runs=60, **KINDS[kind])
    truth, guide = exact_of(program), broad(program)
    bounds = Sandwich(program.model, None, 64, 0.5, twist=program.log_psi).run(exact_sample=truth)
    found = divergences(program.model, guide, bounds=bounds, exact_sample=truth, num_particles=200)
    exact = density_quality(truth, guide, (), {})
    pairs = ((found.reverse_kl, exact.reverse_kl[0]), (found.forward_kl, exact.forward_kl[0]))
    for (low, high), kl in pairs:
        slack = [5 * float(x.std()) / 60**0.5 for x in (low, high)]
        assert float(low.mean()) - slack[0] <= float(kl) <= float(high.mean()) + slack[1]
        assert float((high - low).mean()) < 0.3 * float(kl), "the interval says little"


def test_the_posterior_has_no_divergence_from_itself():
    program = Program(2, runs=5)
    truth = exact_of(program)
    bounds = Sandwich(program.model, program.posterior(), 3, twist=program.log_psi).run(exact_sample=truth)
    found = divergences(program.model, program.posterior(), bounds=bounds, exact_sample=truth, num_particles=20)
    for low, high in found[:2]:
        torch.testing.assert_close(torch.stack([low, high]), torch.zeros(2, 5, dtype=torch.float64), atol=1e-9, rtol=0)


# -- errors ----------------------------------------------------------------------------------------------------------


def test_a_site_without_a_value():
    program = Program(2, runs=3)
    sample = exact_of(program).resample(1).samples
    for name in sample:
        rest = {n: v for n, v in sample.items() if n != name}
        with pytest.raises(ValueError, match=f"exact_sample: .*'{name}'"):
            Sandwich(program.model, None, 3).run(exact_sample=rest)
    bounds = Sandwich(program.model, None, 3).run(exact_sample=sample)
    with pytest.raises(ValueError, match="exact_sample"):
        divergences(program.model, None, bounds=bounds, exact_sample={"z": sample["z"]})


def test_a_subsampled_plate():
    lm = ngram_lm(4, 1)

    def model():
        with pyro.plate("data", 5, subsample_size=2):
            z = pyro.sample("z", Completion(lm, "a", max_tokens=1))
            pyro.factor("f", contains(z, DOT).double())

    with pytest.raises(ValueError, match="subsampled"):
        Sandwich(model, None, 3).run(exact_sample=Enumeration(model).run())


def test_repetitions_are_at_least_one():
    with pytest.raises(ValueError, match="repetitions"):
        Sandwich(lambda: None, repetitions=0)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_inverse_where_a_run_may_find_nothing(n):
    """Half of the prior is impossible: E[1 / Z-hat(z)] = P(Z-hat > 0) / Z = (1 - 2^-n) / Z, for Z = 3/8."""
    runs = 20_000

    def model():
        with pyro.plate("runs", runs):
            k = pyro.sample("k", dist.Categorical(torch.full((4,), 0.25)))
            pyro.factor("hard", torch.tensor([1.0, 0.5, 0.0, 0.0]).log()[k])

    pyro.set_rng_seed(n)
    exact = torch.multinomial(torch.tensor([2 / 3, 1 / 3]), runs, replacement=True)  # the posterior is 2/3, 1/3, 0, 0
    bounds = Sandwich(model, num_particles=n).run(exact_sample={"k": exact})
    possible = (bounds.lower > -torch.inf).double()
    assert abs(float(possible.mean()) - (1 - 0.5**n)) < 5 * float(possible.std()) / runs**0.5
    inverse = (-bounds.upper.double()).exp()
    assert abs(float(inverse.mean()) - (1 - 0.5**n) / 0.375) < 5 * float(inverse.std()) / runs**0.5
