"""SMC against enumeration. Independent runs are the elements of a kept plate, "runs": one call gives them all."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from tiny import ARCHITECTURES, tiny_lm
from torch import Tensor

from lmppl.constraints import ban
from lmppl.distributions import Completion
from lmppl.inference.posterior.posterior import ZeroEvidence
from lmppl.inference.programs import SiteMismatch
from lmppl.inference.resampling import SCHEMES
from lmppl.inference.smc.smc import SMC

RUNS = 600
LM = tiny_lm(vocab=6)  # <eos> . a b c d
OTHER = tiny_lm("llama", vocab=6, seed=1)
A, B, C, D = (LM.encode(s)[0] for s in "abcd")
Y = LM.encode("b", stop="eos")


def prior(prompt="ab", lm=LM, **kwargs):
    return Completion(lm, prompt, **{"max_tokens": 3, "temperature": 3.0, **kwargs})


def proposal(prompt="b", **kwargs):
    """Another network's opinion, broad enough that weights have no heavy tail."""
    return prior(prompt, OTHER, **{"temperature": 4.0, **kwargs})


def likelihood(z: Tensor, lm=LM) -> Completion:
    return Completion(lm, lm.join("b", z), max_tokens=2, temperature=3.0)


def contains(z: Tensor, token: Tensor) -> Tensor:
    return (z == token).any(-1)


def hard(z: Tensor) -> Tensor:
    """A factor: no "c" anywhere, and a "d"."""
    return torch.where(contains(z, D) & ~contains(z, C), 0.0, -torch.inf)


def runs() -> pyro.plate:
    return pyro.plate("runs", RUNS, dim=-1)


def evidence(fn: Completion, following) -> float:
    """sum_z p(z) exp following(z)."""
    with torch.no_grad():
        z = fn.enumerate_support()
        return float((fn.log_prob(z) + following(z)).double().logsumexp(0).exp())


def within(estimates: Tensor, exact: float | Tensor) -> None:
    """The mean over axis 0 lies within 5 standard errors of the exact value, and that is a sharp statement."""
    assert bool(estimates.isfinite().all())
    mean, error = estimates.double().mean(0), estimates.double().std(0) / len(estimates) ** 0.5
    exact = torch.as_tensor(exact, dtype=torch.float64)
    assert bool(((mean - exact).abs() <= 5 * error + 1e-5 * exact).all()), (mean, exact, error)
    assert bool((error < 0.2 * exact).all()), "the test says little: more runs"


# -- evidence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "scheme"),
    [*((a, "systematic") for a in ARCHITECTURES), *(("gpt2", scheme) for scheme in SCHEMES)],
)
def test_evidence_without_a_guide(arch, scheme):
    lm = tiny_lm(arch, vocab=6)

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


def masked_program():
    def model():
        with runs():
            z = pyro.sample("z", prior())
            pyro.factor("hard", hard(z))
            pyro.sample("y", likelihood(z), obs=Y)

    def guide():
        with runs():
            pyro.sample("z", proposal(allowed=ban(LM, "c"), min_tokens=1))

    return model, guide, evidence(prior(), lambda z: hard(z) + likelihood(z).log_prob(Y))


def likes_d(prefix: Tensor) -> Tensor:
    return torch.where(contains(prefix, D), 0.0, -1.0)


def careless(prefix: Tensor) -> Tensor:
    """Zero and undefined here and there: what is left of it is still a positive twist."""
    bad = torch.where(contains(prefix, A), -torch.inf, torch.nan)
    return torch.where(contains(prefix, D), 0.7, bad)


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


# -- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [False, True])
def test_with_the_posterior_as_guide_and_its_flow_as_twist_every_run_gives_the_evidence(joint):
    """W psi = Z at every prefix. The factor makes the posterior the guide's law, with Z = e^2."""
    lm, other = tiny_lm(vocab=6, dtype=torch.float64), tiny_lm("llama", vocab=6, seed=1, dtype=torch.float64)
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
        torch.testing.assert_close(found, torch.full_like(found, 2.0), rtol=0, atol=1e-5)
    blind = SMC(model, guide, 5, 1.0).run().log_evidence
    assert float(blind.std()) > 0.1


def test_without_resampling_the_weights_are_those_of_importance_sampling():
    model, guide, _ = masked_program()
    posterior = SMC(model, guide, 5, ess_threshold=0.0).run()
    z = posterior.samples["z"]
    q = proposal(allowed=ban(LM, "c"), min_tokens=1)
    u = prior().log_prob(z) + hard(z) + likelihood(z).log_prob(Y) - q.log_prob(z)
    torch.testing.assert_close(posterior.log_weights, (u - math.log(5)).detach(), rtol=1e-4, atol=1e-4)


def test_resampled_particles_carry_equal_weights_before_the_last_token():
    """No guide, no twist: nothing to resample by inside a text, and the factor enters at the end."""

    def model():
        z = pyro.sample("z", prior())
        pyro.factor("like", 1.0 * contains(z, D))

    posterior = SMC(model, num_particles=20, ess_threshold=1.0).run()
    expected = contains(posterior.samples["z"], D).float() - math.log(20)
    torch.testing.assert_close(posterior.log_weights, expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_keep_their_own_cache_when_they_are_reordered(arch):
    """Steps with random selections in between say what one forward pass says; prompts of unequal length too."""
    lm = tiny_lm(arch, vocab=6)
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
        torch.testing.assert_close(found, alone.token_log_probs(value)[:, t].detach(), rtol=1e-3, atol=1e-4)
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
