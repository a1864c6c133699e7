"""Optimal twists: what SMC's evidence is worth where the expected future is known, and that any twist is unbiased."""

from __future__ import annotations

import pyro
import pytest
import torch
from five_sigma import evidence_within
from hypothesis import given, settings
from hypothesis import strategies as st
from programs_by_hand import Program
from tiny import flat_lm

from lmppl.distributions import Completion
from lmppl.inference.core.resampling import SCHEMES
from lmppl.inference.samplers.enumeration.enumeration import Enumeration
from lmppl.inference.samplers.smc.smc import SMC

KINDS = {
    "one text": {"observes": False, "switches": False, "continues": False},
    "an observation after it": {"switches": False, "continues": False},
    "two texts": {"observes": False, "switches": False},
    "an observation between": {"switches": False},
    "a Categorical between": {"observes": False},
    "both": {},
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(seed=st.integers(0, 1000), scheme=st.sampled_from(sorted(SCHEMES)), threshold=st.sampled_from([0.0, 0.5, 1.0]))
def test_with_the_posterior_as_proposal_and_the_optimal_twist_every_run_gives_the_evidence(
    kind, seed, scheme, threshold
):
    """q(z_t | z_<t) psi(z_<t) = p(z_t | z_<t) psi(z_<=t), so that W psi = Z / N at every prefix."""
    program = Program(seed, runs=20, **KINDS[kind])
    smc = SMC(program.model, program.posterior(), 4, threshold, scheme, twist=program.log_psi)
    posterior = smc.run()
    exact = program.log_evidence.expand(20)
    torch.testing.assert_close(posterior.log_evidence, exact, rtol=0, atol=1e-9)
    assert posterior.log_evidence.dtype == torch.float64
    for event in posterior.ancestry:
        torch.testing.assert_close(event.log_scores.logsumexp(0), exact, rtol=0, atol=1e-9)


def test_without_the_twist_it_does_not():
    program = Program(0, runs=200)
    blind = SMC(program.model, program.posterior(), 4, 1.0).run().log_evidence
    assert float(blind.std()) > 0.05
    evidence_within(blind, program.log_evidence, sharp=0.15, slack=1e-9)
    never = SMC(program.model, program.posterior(), 4, 0.0).run().log_evidence  # importance sampling from the posterior
    torch.testing.assert_close(never, program.log_evidence.expand(200), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("twist", [None, "stop", "flow", "optimal", "odd"])
@settings(max_examples=3)
@given(seed=st.integers(0, 1000), kind=st.sampled_from(sorted(KINDS)), threshold=st.sampled_from([0.5, 1.0]))
def test_evidence_is_unbiased_for_any_twist_and_scheme(scheme, twist, seed, kind, threshold):
    program = Program(seed, runs=300, **KINDS[kind])

    def odd(prefix):
        """A function of the prefix that has nothing to do with the model."""
        return torch.sin(3.0 * prefix.double().sum(-1) + prefix.shape[-1])

    chosen = {"optimal": program.log_psi, "odd": odd}.get(twist, twist)
    evidence_within(
        SMC(program.model, None, 6, threshold, scheme, chosen).run().log_evidence,
        program.log_evidence,
        sharp=0.15,
        slack=1e-9,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_optimal_twist_every_round_estimates_the_evidence(kind):
    """The prior proposes: sum_n W psi is a martingale, Z at the start and the evidence's estimate at the end."""
    program = Program(3, runs=400, **KINDS[kind])
    posterior = SMC(program.model, None, 8, 1.0, "multinomial", program.log_psi).run()
    assert len(posterior.ancestry) >= 2
    for event in posterior.ancestry:
        evidence_within(event.log_scores.logsumexp(0), program.log_evidence, sharp=0.15, slack=1e-9)


def test_the_variance_under_the_optimal_twist():
    r"""With the prior proposing and multinomial resampling before each token,

    N Var(Z^ / Z) -> sum_t ( E_posterior[psi(z_<=t) / psi(z_<t)] - 1 ),

    the variance of each token's own factor, none of what follows it (the central limit theorem of SMC, Chopin 2004).
    """
    program, N = Program(5, runs=3000, switches=False, continues=False, strength=2.0), 40
    z, posterior = program.support["z"], program.log_w.softmax(0)
    log_psi = torch.stack([program.log_psi(z[:, None, :t], {})[:, 0] for t in range(z.shape[1] + 1)])  # (E + 1, K)
    expected = float(((log_psi.diff(dim=0).exp() * posterior).sum(1) - 1).sum())
    ratio = (SMC(program.model, None, N, 1.0, "multinomial", program.log_psi).run().log_evidence).sub(
        program.log_evidence
    )
    squares = N * (ratio.exp() - 1).square()
    error = float(squares.std()) / len(squares) ** 0.5
    assert abs(float(squares.mean()) - expected) <= 5 * error + expected / N  # and terms of order 1 / N
    assert error < 0.05 * expected


def test_a_twist_of_two_arguments_sees_the_sites_before_it():
    program, seen = Program(0, runs=3), []

    def twist(prefix, before):
        seen.append({name: tuple(value.shape) for name, value in before.items()} | {"prefix": tuple(prefix.shape)})
        return torch.zeros(prefix.shape[:-1])

    SMC(program.model, None, 5, twist=twist).run()
    assert seen[0] == {"prefix": (5, 3, 0)} and seen[1] == {"prefix": (5, 3, 1)}
    assert {"z": (5, 3, 3), "k": (5, 3), "prefix": (5, 3, 0)} in seen


def test_a_twist_that_a_third_of_the_particles_win_wrongly_loses_no_others():
    """40 nats for every "a", which says nothing of what follows: the mean of Z-hat is Z, and sharp."""
    lm, runs = flat_lm(vocab=6, dtype=torch.float64), 60

    def model(runs: int) -> None:
        with pyro.plate("runs", runs):
            z = pyro.sample("z", Completion(lm, lm.encode(["ab"] * runs), max_tokens=5, min_tokens=5))
            pyro.sample("y", Completion(lm, lm.join("b", z), max_tokens=2), obs=lm.encode(["b"] * runs, stop="eos"))

    def likes(prefix: torch.Tensor) -> torch.Tensor:
        return 40.0 * (prefix == lm.token_id("a")).double().sum(-1)

    pyro.set_rng_seed(0)
    exact = float(Enumeration(model).run(1).log_evidence)
    ratio = (SMC(model, num_particles=200, twist=likes).run(runs).log_evidence - exact).exp()
    error = float(ratio.std()) / runs**0.5
    assert abs(float(ratio.mean()) - 1) < 5 * error and error < 0.1
