"""No algorithm is slower than its honest cost: tokens through the network, counted.

The guide reads a prompt once to draw from it and once, with gradient, to score what was drawn; the base network reads
each prompt that several texts share once in all. Never once per particle.
"""

from __future__ import annotations

from functools import cache

import peft
import pyro
import pytest
import torch
from tiny import flat_lm

from lmppl import text
from lmppl.distributions import Completion
from lmppl.engine.prompts import prompts
from lmppl.inference import SMC, GFlowNet, Importance, PooledVarGrad, SubTB, VarGrad

TOKENS, LONGER = 4, 150


@pytest.fixture(scope="module")
def views():
    lm = flat_lm(max_length=256)
    return lm, lm.with_adapter(peft.LoraConfig(r=2, target_modules="all-linear"))


@cache
def cost(views, make, num_particles, prompt_tokens, side=False) -> int:
    """Tokens of one run (of one step, if it is trained) of an algorithm on z ~ LM(x), y ~ LM(x z), w ~ LM(x)."""
    lm, q = views
    x = torch.randint(2, 8, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[4, 5, 0]])

    def model():
        with pyro.plate("data", 1):
            z = pyro.sample("z", Completion(lm, x, max_tokens=TOKENS))
            pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=3), obs=y)
            if side:
                pyro.sample("w", Completion(lm, x, max_tokens=3), obs=y)

    def guide():
        with pyro.plate("data", 1):
            pyro.sample("z", Completion(q, x, max_tokens=TOKENS))

    pyro.set_rng_seed(0)
    guide.parameters = q.trainable_parameters()
    algorithm = make(model, guide, num_particles)
    with pyro.validation_enabled(False):  # under validation one particle is run again
        run = algorithm.step if isinstance(algorithm, GFlowNet) else algorithm.run
        run()  # the first run of a network also verifies its attention
        prompts(lm.network).forget()
        before = lm.tokens_scored
        run()
    return lm.tokens_scored - before


def trained(kind):
    def make(model, guide, n):
        optimizer = torch.optim.SGD(guide.parameters, lr=0.0)  # the guide stays as it is
        return GFlowNet(model, guide, kind(num_particles=n), optimizer=optimizer)

    return make


# How often a prompt is read: once by the model, and by the guide to draw z and to score it with gradient.
ALGORITHMS = {
    "importance, prior": (lambda m, g, n: Importance(m, num_particles=n), 1),
    "importance, guide": (lambda m, g, n: Importance(m, g, num_particles=n), 2),
    "SMC, prior": (lambda m, g, n: SMC(m, num_particles=n), 1),
    "SMC, guide": (lambda m, g, n: SMC(m, g, num_particles=n), 2),
    "VarGrad": (trained(VarGrad), 3),
    "SubTB, all prefixes": (trained(SubTB), 3),
    "pooled, all prefixes": (trained(PooledVarGrad), 3),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_prompt_is_not_read_per_particle(views, name):
    make, times = ALGORITHMS[name]
    for n in (4, 16):
        more = cost(views, make, n, 20 + LONGER) - cost(views, make, n, 20)
        # Texts have random lengths and share random beginnings: at most this much is not the prompt.
        noise = times * n * (TOKENS + 3)
        assert abs(more - times * LONGER) <= noise < n * LONGER


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_site_that_does_not_depend_on_the_latents_is_scored_once(views, name):
    make, _ = ALGORITHMS[name]
    for n in (4, 16):
        # Its prompt is read with the latents', its stop is not, and a latent may begin as it does.
        assert 0 <= cost(views, make, n, 20, side=True) - cost(views, make, n, 20) <= 2


@pytest.mark.parametrize("name", ALGORITHMS)
def test_particles_cost_no_more_than_their_tokens(views, name):
    """Per particle: its tokens to draw them, to score them, and again with the observation after each prefix."""
    make, _ = ALGORITHMS[name]
    each = (cost(views, make, 64, 20) - cost(views, make, 16, 20)) / 48
    prefixes = (TOKENS + 1) if "prefixes" in name else 1
    longest = 3 * TOKENS + prefixes * (TOKENS + 2)
    assert each <= longest


def test_a_prompt_is_read_by_few_chunks_of_texts(views):
    """100 texts after each of 5 prompts, some 40 at a time: each chunk reads one prompt, or two."""
    _, q = views
    prompt = torch.randint(1, 8, (5, 9), generator=torch.Generator().manual_seed(0))
    d = Completion(q, prompt, max_tokens=3, stop=None)
    d.sample((2,))  # what is tried once
    found = {}
    for q.token_budget in (100_000, 40 * 13):
        torch.manual_seed(0)
        before = q.tokens_scored
        z = d.sample((100,))
        found[q.token_budget] = z, q.tokens_scored - before
    (whole, once), (parts, tokens) = found.values()
    assert torch.equal(whole, parts)
    assert once == 5 * 9 + 500 * 2
    assert once < tokens <= once + 9 * (500 // 40 + 1)


def test_a_text_that_has_ended_costs_nothing(views):
    """A pass reads the last token of each row that has one, however rows end and are reordered; steps that share
    another's are in step with it and read nothing.
    """
    lm, _ = views
    limits, prompt = torch.tensor([3, 1, 6]), torch.tensor([[3], [4], [5]])
    mask = torch.arange(8) != 5
    found = []
    for stop in ("eos", None):  # texts of unequal length, with and without a stop
        masked = Completion(lm, prompt, max_tokens=limits, stop=stop, allowed=mask)
        steps = masked.token_steps(torch.Size((20, 3)))
        shared = Completion(lm, prompt, max_tokens=limits, stop=stop).token_steps(torch.Size((20, 3)), steps)
        for t in range(6):
            before = lm.tokens_scored
            token, _ = steps.draw(torch.rand(60))
            shared.score(token)
            if t:
                expected = int((steps.prefix[:, -1] != text.PAD).sum())
                assert lm.tokens_scored - before == expected
                found.append(expected)
            which = torch.randint(60, (60,))
            for each in (steps, shared):
                each.append(token)
                assert each.alive == int((~each.ended).sum())
            for each in (steps, shared):
                each.select(which)
    assert any(0 < n < 60 for n in found)
