"""Every argument of `Completion` reaches whatever is made of one: the same law, by another way."""

from __future__ import annotations

import pyro
import pytest
import torch
from changed_arguments import CASES, all_texts, changed, plain
from peft import LoraConfig
from pyro import poutine
from torch import Tensor

from lmppl.distributions import Completion
from lmppl.inference import AutoGuide, Enumeration
from lmppl.inference.core.sites import innermost

pytestmark = pytest.mark.parametrize(("name", "i"), CASES)


def law(fn: Completion) -> Tensor:
    """log p of every text, (K, 2)."""
    return fn.log_prob(all_texts()).detach()


def test_a_copy_has_the_same_law(lm, name, i):
    fn = changed(lm, name, i)
    expected = law(fn)
    assert not torch.equal(expected, law(plain(lm)))  # it matters
    copies = [fn.after(fn.prompt), fn.expand((2,)), fn.rows(torch.arange(2)), fn.broadened()]
    for copy in [*copies, *(c.after(fn.prompt) for c in copies)]:
        assert torch.equal(law(copy), expected)
    broad = fn.broadened(torch.tensor([1.0, 2.0]), 0.25)
    assert not torch.equal(law(broad), expected) and torch.equal(law(broad.after(fn.prompt)), law(broad))


def test_a_guide_made_from_the_model_has_the_same_law(lm, name, i):
    """An adapter that was not trained yet writes as the base does."""
    fn = changed(lm, name, i)

    def model() -> None:
        with pyro.plate("data", 2):
            pyro.sample("z", fn)

    guide = AutoGuide(model, LoraConfig(r=1, target_modules="all-linear"), args=())
    found = poutine.trace(guide).get_trace().nodes["z"]["fn"]
    torch.testing.assert_close(law(innermost(found)), law(fn), rtol=1e-9, atol=1e-9)


def test_steps_and_enumeration_have_the_same_law(lm, name, i):
    fn = changed(lm, name, i)

    def model() -> None:
        with pyro.plate("data", 2):
            pyro.sample("z", fn)

    exact = Enumeration(model).run()
    z = exact.samples["z"]
    found = exact.log_weights > -torch.inf
    expected = fn.log_prob(z).detach()
    torch.testing.assert_close(exact.log_weights[found], expected[found], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(exact.log_evidence, torch.zeros(2).double(), rtol=0, atol=1e-9)

    steps, total = fn.token_steps(z.shape[:-1]), torch.zeros(z.shape[:-1].numel())
    for token in z.flatten(0, -2).unbind(1):
        total = total + steps.score(token).masked_fill(steps.ended, 0.0)
        steps.append(token)
    torch.testing.assert_close(total[found.flatten()], expected[found], rtol=1e-9, atol=1e-9)
