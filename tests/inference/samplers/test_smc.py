"""SMC's evidence against exact enumeration: it is unbiased for any twist, under masks, hard factors and plates."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from five_sigma import within
from looser_guides import LM, OTHER, RUNS, A, B, D, Y, evidence, hard, likelihood, masked_program, prior, proposal, runs
from programs_by_hand import contains
from pyro import poutine
from tiny import ARCHITECTURES, flat_lm
from torch import Tensor

from lmppl.inference.core.resampling import SCHEMES
from lmppl.inference.samplers.smc.smc import SMC

# -- evidence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "scheme"),
    [*((a, "systematic") for a in ARCHITECTURES), *(("gpt2", scheme) for scheme in SCHEMES)],
)
def test_evidence_without_a_guide(arch, scheme):
    lm = flat_lm(arch, vocab=6)

    def model():
        with runs():
            z = pyro.sample("z", prior(lm=lm))
            pyro.factor("likes_d", 1.5 * (z == D).sum(-1))
            pyro.sample("y", likelihood(z, lm), obs=Y)

    posterior = SMC(model, num_particles=6, resampling=scheme, ess_threshold=1.0).run()
    exact = evidence(prior(lm=lm), lambda z: 1.5 * (z == D).sum(-1) + likelihood(z, lm).log_prob(Y))
    within(posterior.log_evidence.exp(), exact)
    assert posterior.log_weights.shape == (6, RUNS) and posterior.samples["z"].shape == (6, RUNS, 4)
    torch.testing.assert_close(posterior.log_weights.logsumexp(0), posterior.log_evidence)


def likes_d(prefix: Tensor) -> Tensor:
    return torch.where(contains(prefix, D), 0.0, -1.0)


def careless(prefix: Tensor) -> Tensor:
    """Zero here and there: what is left of it is still a positive twist."""
    return torch.where(contains(prefix, D), 0.7, torch.where(contains(prefix, A), -torch.inf, -0.5))


@pytest.mark.parametrize("ess_threshold", [0.5, 1.0])
@pytest.mark.parametrize("twist", [None, "stop", "flow", likes_d, careless])
@pytest.mark.parametrize("guided", [False, True])
def test_evidence_under_a_mask_and_a_hard_factor(twist, ess_threshold, guided):
    """As a target instead of a score, the "stop" twist would lose the prefixes that the factor forbids to stop at."""
    model, guide, exact = masked_program()
    posterior = SMC(model, guide if guided else None, 8, ess_threshold, twist=twist).run()
    within(posterior.log_evidence.exp(), exact)
    assert posterior.log_weights.shape == (8, RUNS)


@pytest.mark.parametrize("twist", [None, "stop", "flow"])
def test_expectations_under_a_mask_and_a_hard_factor(twist):
    """E sum_n W_n f(z_n) = Z E f."""
    model, guide, _ = masked_program()
    posterior = SMC(model, guide, 8, 1.0, twist=twist).run()

    def following(z):
        return hard(z) + likelihood(z).log_prob(Y) + contains(z, B).float().log()

    found = (posterior.log_weights.exp() * contains(posterior.samples["z"], B)).sum(0)
    within(found, evidence(prior(), following))


@pytest.mark.parametrize("scale", [1 / 2.5, 1.5])
@pytest.mark.parametrize("twist", [None, "stop", "flow"])
@pytest.mark.parametrize("guided", [False, True])
def test_evidence_of_a_scaled_site(scale, twist, guided):
    def model():
        with runs():
            with poutine.scale(scale=scale):
                z = pyro.sample("z", prior())
            pyro.sample("y", likelihood(z), obs=Y)

    def guide():
        with runs():
            pyro.sample("z", proposal())

    fn = prior()
    exact = evidence(fn, lambda z: (scale - 1) * fn.log_prob(z) + likelihood(z).log_prob(Y))
    within(SMC(model, guide if guided else None, 6, twist=twist).run().log_evidence.exp(), exact)


@pytest.mark.parametrize("twist", [None, "stop", "flow"])
@pytest.mark.parametrize("guided", [False, True])
def test_evidence_without_a_stop(twist, guided):
    def fn(lm=LM):
        return prior(lm=lm, stop=None)

    def model():
        with runs():
            pyro.factor("like", 1.5 * (pyro.sample("z", fn()) == D).sum(-1))

    def guide():
        with runs():
            pyro.sample("z", fn(OTHER))

    exact = evidence(fn(), lambda z: 1.5 * (z == D).sum(-1))
    within(SMC(model, guide if guided else None, 6, 1.0, twist=twist).run().log_evidence.exp(), exact)


@pytest.mark.parametrize("twist", [None, "stop", "flow"])
@pytest.mark.parametrize("guided", [False, True])
def test_several_sites_with_a_latent_between(twist, guided):
    """A Categorical between two texts picks the second one's prompt, scale and mask, which move with the particles."""
    probs = torch.tensor([0.7, 0.3])
    starts = torch.stack([LM.encode("ac"), LM.encode("db")])

    def second(k, z):
        return prior(LM.join(starts[k], z), max_tokens=2)

    def model():
        with runs():
            z = pyro.sample("z", prior(max_tokens=2))
            pyro.factor("first", 2.0 * contains(z, D))
            k = pyro.sample("k", dist.Categorical(probs))
            with poutine.scale(scale=torch.where(k == 0, 1.0, 0.5)), poutine.mask(mask=~contains(z, A)):
                w = pyro.sample("w", second(k, z))
            pyro.factor("last", 2.0 * (w == B).sum(-1))

    def guide():
        with runs():
            z = pyro.sample("z", proposal(max_tokens=2))
            pyro.sample("k", dist.Categorical(probs.flip(0)))
            with poutine.mask(mask=~contains(z, A)):
                pyro.sample("w", proposal(OTHER.join("c", z), max_tokens=2))

    exact = 0.0
    z = prior(max_tokens=2).enumerate_support()
    log_p = prior(max_tokens=2).log_prob(z).detach() + 2.0 * contains(z, D)
    for k, p in enumerate(probs.tolist()):
        fn = second(torch.tensor(k), z)
        w = fn.enumerate_support()
        scale = 1.0 if k == 0 else 0.5
        log_w = fn.log_prob(w).detach()  # (W, Z)
        # Where the site is masked, w follows its proposal with weight one: an average over q, not a sum.
        q = fn if not guided else proposal(OTHER.join("c", z), max_tokens=2)
        log_w = torch.where(contains(z, A), q.log_prob(w).detach(), scale * log_w)
        exact += p * float((log_p + log_w + 2.0 * (w == B).sum(-1)).logsumexp((0, 1)).exp())
    within(SMC(model, guide if guided else None, 8, 1.0, twist=twist).run().log_evidence.exp(), exact)


def test_a_guide_may_draw_a_text_before_what_the_model_draws_it_from():
    starts = torch.stack([LM.encode("ac"), LM.encode("db")])

    def model():
        with runs():
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.7, 0.3])))
            z = pyro.sample("z", prior(starts[k], max_tokens=2))
            pyro.factor("like", 1.5 * contains(z, D))

    def guide():
        with runs():
            z = pyro.sample("z", proposal(max_tokens=2))
            p = 0.5 + 0.3 * contains(z, A)
            pyro.sample("k", dist.Categorical(torch.stack([p, 1 - p], -1)))

    exact = sum(
        p * evidence(prior(s, max_tokens=2), lambda z: 1.5 * contains(z, D))
        for p, s in zip((0.7, 0.3), starts, strict=True)
    )
    within(SMC(model, guide, 8).run().log_evidence.exp(), exact)


# -- plates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("twist", [None, "flow"])
def test_each_datum_has_an_evidence_of_its_own(twist):
    x, y = LM.encode(["ab", "c", "dd"]), LM.encode(["b", "", "aa"], stop="eos")

    def model():
        with pyro.plate("runs", RUNS, dim=-2), pyro.plate("data", 3, dim=-1):
            z = pyro.sample("z", prior(x, max_tokens=2))
            pyro.sample("y", likelihood(z), obs=y)

    def guide():
        with pyro.plate("runs", RUNS, dim=-2), pyro.plate("data", 3, dim=-1):
            pyro.sample("z", proposal(x, max_tokens=2))

    found = SMC(model, guide, 6, 1.0, twist=twist).run().log_evidence.exp()  # (runs, data)
    exact = []
    for datum, answer in zip(x, y, strict=True):
        exact.append(evidence(prior(datum, max_tokens=2), lambda z, y=answer: likelihood(z).log_prob(y)))
    within(found, torch.tensor(exact))


def test_subsampling_of_a_kept_plate_is_divided_out_and_shared():
    x = LM.encode(["ab", "c", "dd", "a", "b"])
    seen = {}

    def program(fn, key):
        with pyro.plate("data", 5, subsample_size=2) as index:
            seen.setdefault(key, []).append(index)
            z = pyro.sample("z", fn(x[index], max_tokens=2))
            if key == "model":
                pyro.factor("like", 1.5 * contains(z, D))

    posterior = SMC(lambda: program(prior, "model"), lambda: program(proposal, "guide"), 400).run()
    index = seen["guide"][-1]
    assert torch.equal(seen["model"][-1], index)
    exact = [evidence(prior(x[i], max_tokens=2), lambda z: 1.5 * contains(z, D)) for i in index]
    assert posterior.log_evidence.exp().tolist() == pytest.approx(exact, rel=0.2)

    def apart():
        pyro.factor("outside", torch.tensor(0.0))
        program(prior, "model")

    with pytest.raises(ValueError, match="subsampled"):
        SMC(apart, num_particles=4).run()


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("twist", [None, "stop", "flow"])
def test_texts_in_a_plate_that_is_not_kept_are_joint(sequential, twist):
    x = LM.encode(["ab", "c"])

    def texts(fn):
        if sequential:
            return [pyro.sample(f"z_{i}", fn(x[i], max_tokens=2)) for i in pyro.plate("parts", 2)]
        with pyro.plate("parts", 2, dim=-2):
            return pyro.sample("z", fn(x[:, None], max_tokens=2)).split(1, -3)

    def together(z, w):
        return torch.where((z == D).sum(-1) + (w == D).sum(-1) == 1, 0.0, -torch.inf) + 1.0 * contains(w, A)

    def model():
        with runs():
            z, w = texts(prior)
            pyro.factor("together", together(z, w))

    def guide():
        with runs():
            texts(proposal)

    first, second = (prior(s, max_tokens=2) for s in x)
    z, w = first.enumerate_support(), second.enumerate_support()
    pairs = first.log_prob(z)[:, None] + second.log_prob(w) + together(z[:, None], w)
    posterior = SMC(model, guide, 12, twist=twist).run()
    assert posterior.log_weights.shape == (12, RUNS)
    within(posterior.log_evidence.exp(), float(pairs.detach().logsumexp((0, 1)).exp()))
