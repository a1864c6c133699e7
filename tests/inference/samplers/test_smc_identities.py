"""SMC: identities that hold in every run, values that are impossible, and arguments that do not fit."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from five_sigma import within
from looser_guides import LM, C, D, Y, evidence, hard, likelihood, masked_program, prior, proposal, runs
from programs_by_hand import contains
from tiny import ARCHITECTURES, flat_lm

from lmppl.constraints import ban
from lmppl.distributions import Completion
from lmppl.inference.core.programs import SiteMismatch
from lmppl.inference.posterior.posterior import ZeroEvidence
from lmppl.inference.samplers.smc.smc import SMC

pytestmark = pytest.mark.usefixtures("double_precision")

# -- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [False, True])
def test_with_the_posterior_as_guide_and_its_flow_as_twist_every_run_gives_the_evidence(joint):
    """W psi = Z at every prefix. The factor makes the posterior the guide's law, with Z = e^2."""
    lm, other = flat_lm(vocab=6, dtype=torch.float64), flat_lm("llama", vocab=6, seed=1, dtype=torch.float64)
    shape = (2,) if joint else ()

    def texts(lm):
        with pyro.plate_stack("parts", shape, rightmost_dim=-2):
            return pyro.sample("z", prior(lm=lm))

    def model():
        with runs():
            z = texts(lm)
            ratio = prior(lm=other).log_prob(z) - prior(lm=lm).log_prob(z)
            pyro.factor("ratio", 2.0 + (ratio.sum(-2, keepdim=True) if joint else ratio))

    def optimal(prefix):
        """q(prefix) / p(prefix), token by token."""
        log_psi = torch.zeros(prefix.shape[:-1], dtype=torch.float64)
        for t in range(min(3, prefix.shape[-1])):  # the stop after three tokens is certain
            q, p = (prior(lm=m, max_tokens=t + 1, stop=None).token_log_probs(prefix[..., : t + 1]) for m in (other, lm))
            log_psi += (q - p)[..., -1]
        return log_psi.sum(-1) if joint else log_psi

    def guide():
        with runs():
            texts(other)

    for twist in ("flow", optimal):
        found = SMC(model, guide, 5, 1.0, twist=twist).run().log_evidence
        torch.testing.assert_close(found, torch.full_like(found, 2.0), rtol=0, atol=1e-9)
    blind = SMC(model, guide, 5, 1.0).run().log_evidence
    assert float(blind.std()) > 0.1


def test_without_resampling_the_weights_are_those_of_importance_sampling():
    model, guide, _ = masked_program()
    posterior = SMC(model, guide, 5, ess_threshold=0.0).run()
    z = posterior.samples["z"]
    q = proposal(allowed=ban(LM, "c"), min_tokens=1)
    u = prior().log_prob(z) + hard(z) + likelihood(z).log_prob(Y) - q.log_prob(z)
    torch.testing.assert_close(posterior.log_weights, (u - math.log(5)).detach(), rtol=1e-9, atol=1e-9)


def test_resampled_particles_carry_equal_weights_before_the_last_token():
    """No guide, no twist: nothing to resample by inside a text, and the factor enters at the end."""

    def model():
        z = pyro.sample("z", prior())
        pyro.factor("like", 1.0 * contains(z, D))

    posterior = SMC(model, num_particles=20, ess_threshold=1.0).run()
    expected = contains(posterior.samples["z"], D).double() - math.log(20)
    torch.testing.assert_close(posterior.log_weights, expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_keep_their_own_cache_when_they_are_reordered(arch):
    """Steps with random selections in between say what one forward pass says; prompts of unequal length too."""
    lm = flat_lm(arch, vocab=6)
    prompt = lm.encode(["ab", "cdab", "", "d"])
    fn = Completion(lm, prompt, max_tokens=5, min_tokens=4)
    shape = torch.Size([3, 4])
    steps = fn.token_steps(shape)
    rows = torch.arange(4).expand(shape).flatten()
    for t in range(4):
        token = torch.randint(2, 6, (12,))
        found = steps.score(token)
        value = torch.cat([steps.prefix, token[:, None]], 1)
        alone = Completion(lm, prompt[rows], max_tokens=5, min_tokens=4)
        torch.testing.assert_close(found, alone.token_log_probs(value)[:, t].detach(), rtol=1e-9, atol=1e-9)
        steps.append(token)
        index = torch.randint(12, (12,))
        steps.select(index)
        rows = rows[index]


def test_the_same_seed_gives_the_same_result():
    model, guide, _ = masked_program()
    results = []
    for _ in range(2):
        pyro.set_rng_seed(7)
        results.append(SMC(model, guide, 6, twist="stop").run())
    assert torch.equal(results[0].samples["z"], results[1].samples["z"])
    assert torch.equal(results[0].log_weights, results[1].log_weights)


# -- impossible values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("twist", [None, "stop", "flow"])
@pytest.mark.parametrize(
    "looser",
    [
        {"max_tokens": 4},
        {"min_tokens": 0},
        {"stop": ["eos", "."]},
    ],
)
def test_a_guide_looser_than_the_model(twist, looser):
    """What the model rules out weighs nothing; the rest still carries the evidence."""
    tight = {"max_tokens": 2, "min_tokens": 1, "allowed": ban(LM, "c")}

    def model():
        with runs():
            z = pyro.sample("z", prior(**tight))
            pyro.factor("like", 1.0 * contains(z, D))

    def guide():
        with runs():
            pyro.sample("z", proposal(**{"max_tokens": 2, "min_tokens": 1, **looser}))

    posterior = SMC(model, guide, 16, twist=twist).run()
    assert not bool(posterior.log_weights.isnan().any())
    if "stop" not in looser:
        within(posterior.log_evidence.exp(), evidence(prior(**tight), lambda z: 1.0 * contains(z, D)))
        return
    # A text that ends with "." is none of the model's; one with a "." inside is, but the guide never draws it.
    period = LM.encode(".")[0]
    within(
        posterior.log_evidence.exp(),
        evidence(prior(**tight), lambda z: 1.0 * contains(z, D) + (~contains(z, period)).float().log()),
    )


@pytest.mark.parametrize("twist", [None, "stop", "flow"])
def test_a_constraint_that_strands_the_dead_does_not_stop_the_living(twist):
    """The model's constraint permits nothing after a "c", where only a looser guide can be."""

    def after(prefix):
        mask = torch.ones(*prefix.shape[:-1], 6, dtype=torch.bool)
        mask[..., C] = False
        return mask & ~contains(prefix, C)[..., None]

    def model():
        with runs():
            pyro.factor("like", 1.0 * contains(pyro.sample("z", prior(allowed=after)), D))

    def guide():
        with runs():
            pyro.sample("z", proposal())

    posterior = SMC(model, guide, 16, ess_threshold=0.1, twist=twist).run()
    within(posterior.log_evidence.exp(), evidence(prior(allowed=ban(LM, "c")), lambda z: 1.0 * contains(z, D)))


@pytest.mark.parametrize("twist", [None, "stop", "flow"])
def test_evidence_zero(twist):
    def model():
        z = pyro.sample("z", prior())
        pyro.factor("never", torch.full(z.shape[:-1], -torch.inf))
        w = pyro.sample("w", prior())
        pyro.factor("like", 1.0 * contains(w, D))

    posterior = SMC(model, num_particles=5, twist=twist).run()
    assert float(posterior.log_evidence) == -math.inf and not bool(posterior.log_weights.isnan().any())
    with pytest.raises(ZeroEvidence):
        posterior.table("z")


# -- errors ----------------------------------------------------------------------------------------------------------


def sites(*names, observed=()):
    def program():
        for name in names:
            pyro.sample(name, prior(max_tokens=1), obs=Y if name in observed else None)

    return program


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (sites("z", "w"), sites("w", "z"), "keep texts in one order"),
        (sites("z", "w"), sites("z"), "does not sample 'w'"),
        (sites("z"), sites("z", "w"), "does not have that site"),
        (sites("z", "w", observed="w"), sites("z", "w"), "observes that site"),
    ],
)
def test_sites_that_do_not_match(model, guide, message):
    with pytest.raises(SiteMismatch, match=message):
        SMC(model, guide, 3).run()


@pytest.mark.parametrize(
    "wrong", [{"num_particles": 0}, {"ess_threshold": 1.5}, {"resampling": "killing"}, {"twist": "soft"}]
)
def test_arguments_are_named_in_errors(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SMC(sites("z"), **wrong)


def test_a_twist_of_the_wrong_shape():
    with pytest.raises(ValueError, match="twist"):
        SMC(sites("z"), num_particles=4, twist=lambda z: torch.zeros(3)).run()


def test_a_program_with_no_text_is_importance_sampling():
    def model():
        with runs():
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.factor("like", 2.0 * k)

    within(SMC(model, num_particles=4).run().log_evidence.exp(), 0.7 + 0.3 * math.exp(2.0))
