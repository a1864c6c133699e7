"""Every variant of `Completion`, and `NextToken`, keeps the contract of a distribution over text."""

from __future__ import annotations

import pyro
import pytest
import torch
from contracts import (
    DOT,
    EOS,
    VOCAB,
    A,
    B,
    C,
    LMDistributionContract,
    TextContract,
    after,
    after_mask,
    assert_elbo_gradient,
)
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from reference import Law, Plain
from tiny import flat_lm

from lmppl import text
from lmppl.distributions import Completion, NextToken
from lmppl.text import PAD

PROMPT = torch.tensor([[A, PAD, PAD], [B, C, A]])


class TestEos(TextContract):
    def make(self, lm):
        return Completion(lm, PROMPT, max_tokens=2)

    def laws(self, plain):
        return [Law(plain, p, 2) for p in ((A,), (B, C, A))]


class TestSeveralStopsFromOneToken(TextContract):
    def make(self, lm):
        return Completion(lm, PROMPT, max_tokens=2, min_tokens=1, stop=["eos", "."])

    def laws(self, plain):
        return [Law(plain, p, 2, 1, (EOS, DOT)) for p in ((A,), (B, C, A))]


class TestNoStop(TextContract):
    def make(self, lm):
        return Completion(lm, PROMPT, max_tokens=torch.tensor([1, 2]), stop=None)

    def laws(self, plain):
        return [Law(plain, (A,), 1, stops=()), Law(plain, (B, C, A), 2, stops=())]


class TestPerRowLimitsAndTemperature(TextContract):
    layers = 2  # a network whose texts are not all but certain at these temperatures

    def make(self, lm):
        return Completion(
            lm,
            PROMPT,
            max_tokens=torch.tensor([3, 1]),
            min_tokens=torch.tensor([1, 0]),
            stop=".",
            temperature=torch.tensor([0.6, 1.7], dtype=torch.float64),
        )

    def laws(self, plain):
        return [Law(plain, (A,), 3, 1, (DOT,), None, 0.6), Law(plain, (B, C, A), 1, 0, (DOT,), None, 1.7)]


class TestMaskedTokens(TextContract):
    def make(self, lm):
        return Completion(lm, PROMPT, max_tokens=3, allowed=[EOS, A, B], stop="eos")

    def laws(self, plain):
        return [Law(plain, p, 3, 0, (EOS,), lambda _: {EOS, A, B}) for p in ((A,), (B, C, A))]


class TestConstraintOnPrefixes(TextContract):
    def make(self, lm):
        return Completion(lm, PROMPT, max_tokens=3, allowed=after_mask)

    def laws(self, plain):
        return [Law(plain, p, 3, 0, (EOS,), after) for p in ((A,), (B, C, A))]


class TestEmptyAndUnequalPrompts(TextContract):
    def make(self, lm):
        return Completion(lm, torch.tensor([[PAD, PAD], [C, A]]), max_tokens=2)

    def laws(self, plain):
        return [Law(plain, p, 2) for p in ((), (C, A))]


class TestAddedBos(TextContract):
    vocab, add_bos = VOCAB + 1, True  # eos, bos, ".", a, b, c

    def make(self, lm):
        return Completion(lm, torch.tensor([[PAD, PAD], [3, 4]]), max_tokens=2)

    def laws(self, plain):
        return [Law(plain, p, 2) for p in ((), (3, 4))]


class TestNextToken(LMDistributionContract):
    def make(self, lm):
        return NextToken(lm, torch.tensor([[PAD, PAD], [C, A]]))

    def test_probabilities_of_a_plain_loop(self, d, lm):
        plain = Plain(lm)
        for b, context in enumerate([(), (C, A)]):
            expected = plain.logits(context).log_softmax(-1)
            assert (d.log_prob(d.enumerate_support())[:, b] - expected).abs().max() < 1e-9

    def test_a_loop_of_tokens_is_a_completion(self, lm):
        """Written token by token in Pyro, a text of two tokens has the probability of `Completion(stop=None)`."""

        def program():
            context = torch.tensor([C, A])
            for t in range(2):
                token = pyro.sample(f"t{t}", NextToken(lm, context))
                context = text.cat(context, token[..., None])
            return context[2:]

        trace = poutine.trace(program).get_trace()
        z = torch.stack([trace.nodes[f"t{t}"]["value"] for t in range(2)])
        d = Completion(lm, torch.tensor([C, A]), max_tokens=2, stop=None)
        assert trace.log_prob_sum().item() == pytest.approx(d.log_prob(z).item(), abs=1e-9)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
def test_svi_gradient_with_particles_one_by_one(elbo):
    lm = flat_lm(vocab=VOCAB)
    assert_elbo_gradient(TestEos().make, lm, elbo(num_particles=4, max_plate_nesting=1), 8)
