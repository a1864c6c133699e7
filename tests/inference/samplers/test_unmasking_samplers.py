"""Inference over paths of unmasking steps: every algorithm against a sum over all paths."""

from __future__ import annotations

import pyro
import pytest
import torch
from five_sigma import evidence_within
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from pyro import poutine
from tiny_masked import masked_lm

from lmppl import text
from lmppl.distributions import Unmasking
from lmppl.inference import (
    SMC,
    Enumeration,
    GFlowNet,
    Importance,
    MetropolisHastings,
    RelativeTrajectoryBalance,
    Sandwich,
    VarGrad,
    simulate,
)
from lmppl.inference.core.sites import innermost
from lmppl.inference.judging.quality import density_quality, draw_quality
from lmppl.testing import support

LM, OTHER = masked_lm(vocab=5), masked_lm(vocab=5, seed=1)
A, B, C = LM.encode("abc").tolist()
CANVAS = LM.join(LM.encode(["a", "b"]), LM.gap(3))  # two plate elements, 6 * 4^3 paths each


def program(lm=LM, canvas=CANVAS, **options):
    """A text, and a factor of its own: "a" and "c" side by side are e^2 times as good, each "b" half as good."""

    def model():
        with pyro.plate("texts", len(canvas)):
            d = Unmasking(lm, canvas, **options)
            z = pyro.sample("z", d)
            told = d.fill(z)
            beside = ((told[..., :-1] == A) & (told[..., 1:] == C)).sum(-1)
            pyro.factor("likes", 2.0 * beside.double() - 0.7 * (told == B).sum(-1))

    return model


def proposal(lm=OTHER, canvas=CANVAS, **options):
    def guide():
        with pyro.plate("texts", len(canvas)):
            pyro.sample("z", Unmasking(lm, canvas, **options))

    return guide


def brute(model):
    """Every path (K, n), and log p(z, observed) (K, 2)."""
    trace = poutine.trace(model).get_trace()
    every = support(innermost(trace.nodes["z"]["fn"]))

    def given():
        with pyro.plate("paths", len(every), dim=-2):
            pyro.condition(model, data={"z": every[:, None].expand(-1, 2, -1)})()

    trace = poutine.trace(given).get_trace()
    trace.compute_log_prob()
    with torch.no_grad():
        return every, sum(trace.nodes[name]["log_prob"] for name in ("z", "likes"))


@pytest.mark.parametrize("order", ["random", "learned"])
def test_enumeration_is_the_sum_over_all_paths(order):
    model = program(order=order)
    every, log_joint = brute(model)
    exact = Enumeration(model).run()
    assert len(every) == 6 * 4**3 == exact.num_particles
    assert torch.allclose(exact.log_evidence, log_joint.logsumexp(0))
    assert torch.allclose(exact.log_prob({"z": every[:, None].expand(-1, 2, -1)}), log_joint.log_softmax(0))
    # A table merges the paths of a text.
    d = Unmasking(LM, CANVAS, order=order)
    words, reward = d.words(every), (log_joint - d.log_prob(every[:, None])).detach()
    rows = {w: r for w, r in zip(d.decode(every), reward[:, 0].tolist(), strict=True)}
    by_text = dict(exact.table("z", 0))
    log_p = d.text_log_prob(words[:, None])[:, 0].detach()
    for i in range(len(every)):
        string = d.decode(every[i])
        if len(string) < 3:  # the pad is no letter, wherever it stands
            continue
        assert by_text[string] == pytest.approx(float((log_p[i] + rows[string] - exact.log_evidence[0]).exp()))


GUIDES = {"prior": None, "guide": proposal(temperature=4.0)}
GUIDES |= {"confidence": proposal(temperature=4.0, order="confidence")}


@pytest.mark.parametrize("guide", GUIDES.values(), ids=GUIDES)
@pytest.mark.parametrize("algorithm", [Importance, SMC])
def test_evidence_is_unbiased(algorithm, guide):
    """The guide is another network, nearly even so that weights are bounded, and in the last case of another order."""
    model = program()
    exact = brute(model)[1].logsumexp(0)
    pyro.set_rng_seed(0)
    runs = [algorithm(model, guide, num_particles=100).run() for _ in range(40)]
    evidence_within(torch.stack([r.log_evidence for r in runs]), exact)


def test_smc_resamples_between_denoising_steps():
    """Each step's words make the next steps' weights uneven: a guide that the model is not."""
    pyro.set_rng_seed(0)
    found = SMC(program(), proposal(), num_particles=200, ess_threshold=1.0).run()
    assert {event.token for event in found.ancestry} >= {1, 2}
    exact, many = Enumeration(program()).run(), SMC(program(), num_particles=20_000).run()
    assert draw_quality(exact, many).max() < 0.1


@pytest.mark.parametrize("order", ["random", "left-to-right"])
def test_metropolis_regrows_paths(order):
    model = program(canvas=LM.join(LM.encode(["a", "b"]), LM.gap(2)), order=order)
    exact = Enumeration(model).run()
    pyro.set_rng_seed(0)
    chains = MetropolisHastings(model, num_chains=50, num_samples=200, warmup=20).run()
    assert draw_quality(exact, chains).max() < 0.06


def adapted(order):
    lm = masked_lm(vocab=4)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["query", "key", "value", "dense", "decoder"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        view = lm.with_adapter(lora)
    canvas = lm.join(lm.encode(["a", "b"]), lm.gap(2))
    return lm, view, canvas


@pytest.mark.parametrize("objective", [VarGrad(), RelativeTrajectoryBalance()], ids=lambda o: type(o).__name__)
def test_a_trained_guide_is_the_posterior_over_paths(objective):
    """A guide that learns the order with the words, on a model whose order is random."""
    lm, view, canvas = adapted("learned")
    model, guide = program(lm, canvas), proposal(view, canvas, order="learned")
    exact = Enumeration(model).run()
    before = density_quality(exact, guide, (), {}).total_variation
    pyro.set_rng_seed(0)
    gflownet = GFlowNet(model, guide, objective, optimizer=torch.optim.Adam(view.trainable_parameters(), lr=1e-2))
    gflownet.fit([()], 250, seed=0, progress=False)
    after = density_quality(exact, guide, (), {}).total_variation
    print(before, after)
    assert before.min() > 0.15 and after.max() < 0.04
    assert all(p.grad is None for p in lm.network.base_parameters)


def test_from_left_to_right_the_guide_needs_no_order():
    lm, view, canvas = adapted("left-to-right")
    model, guide = (f(v, canvas, order="left-to-right") for f, v in ((program, lm), (proposal, view)))
    exact = Enumeration(model).run()
    pyro.set_rng_seed(0)
    optimizer = torch.optim.Adam(view.trainable_parameters(), lr=1e-2)
    GFlowNet(model, guide, VarGrad(), optimizer=optimizer).fit([()], 150, seed=0, progress=False)
    assert density_quality(exact, guide, (), {}).total_variation.max() < 0.03


@settings(max_examples=5)
@given(st.integers(0, 10**6))
def test_the_texts_own_probability_lies_between_its_bounds(seed):
    """The evidence of "the path writes this text": SMC over orders from below, conditional SMC from above.

    The exact sample is the path that wrote the text.  Bounds hold on average: within 5 standard errors.
    """
    lm = masked_lm(vocab=5, seed=seed)
    canvas, n = LM.join(LM.encode("a"), LM.gap(4)), 100

    def model():
        with pyro.plate("texts", n):
            return pyro.sample("z", Unmasking(lm, canvas).expand((n,)))

    pyro.set_rng_seed(seed)
    path = simulate(model).values["z"]
    d = Unmasking(lm, canvas)
    words = d.words(path)

    def writes(words):
        with pyro.plate("texts", n):
            z = pyro.sample("z", Unmasking(lm, canvas).expand((n,)))
            pyro.factor("writes", torch.where((d.words(z) == words).all(-1), 0.0, -torch.inf))

    def orders(words):
        only = torch.nn.functional.one_hot(words, lm.vocab_size).bool()
        with pyro.plate("texts", n):
            pyro.sample("z", Unmasking(lm, canvas, allowed=only))

    exact = d.text_log_prob(words)
    gaps = []
    for particles in (1, 16):
        bounds = Sandwich(writes, orders, num_particles=particles, repetitions=1).run(words, exact_sample={"z": path})
        below, above = exact - bounds.lower, bounds.upper - exact  # (n,), zero or more on average
        for slack in (below, above):
            assert slack.mean() > -5 * slack.std() / n**0.5
        assert particles > 1 or (below.mean() > 0 and above.mean() > 0)
        gaps.append(float(bounds.gap.mean()))
    assert gaps[1] < gaps[0]


def test_unfinished_paths_are_seen_by_a_twist():
    """A twist reads the text as far as it is filled; the evidence stays unbiased whatever it says."""
    model = program()
    exact = brute(model)[1].logsumexp(0)
    d = Unmasking(LM, CANVAS)

    def twist(prefix):
        told = d.fill(text.pad(prefix, 3))
        return 1.0 * ((told[..., :-1] == A) & (told[..., 1:] == C)).sum(-1).double()

    pyro.set_rng_seed(0)
    runs = [SMC(model, num_particles=100, twist=twist).run() for _ in range(40)]
    evidence_within(torch.stack([r.log_evidence for r in runs]), exact)
