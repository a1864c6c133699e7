"""`Completion.regrow`: what is kept stays, and the rest is drawn from its law given what is kept."""

from __future__ import annotations

import pyro
import pytest
import torch
from five_sigma import assert_counts
from problems import EOS, A, B
from problems import X as PROMPTS
from reference import tokens
from tiny import tiny_lm
from torch import Tensor

from lmppl import text
from lmppl.distributions import Completion
from lmppl.engine.prompts import prompts

pytestmark = pytest.mark.usefixtures("double_precision")

LM = tiny_lm(vocab=4, dtype=torch.float64)


def no_repeat(prefix: Tensor) -> Tensor:
    """A constraint on prefixes: no token twice in a row."""
    mask = torch.ones(*prefix.shape[:-1], 4, dtype=torch.bool)
    return mask if prefix.shape[-1] == 0 else mask.scatter(-1, prefix[..., -1:], False)


CASES = {
    "eos": {},
    "several stops": {"stop": ["eos", "."], "min_tokens": 1},
    "no stop": {"stop": None, "max_tokens": torch.tensor([2, 3])},
    "rows": {"max_tokens": torch.tensor([1, 3]), "min_tokens": torch.tensor([0, 2]), "stop": "."},
    "temperature": {"temperature": torch.tensor([0.6, 2.0])},
    "mask": {"allowed": [EOS, A, B]},
    "callable": {"allowed": no_repeat},
}


def completion(case: str, lm=LM, prompt: Tensor = PROMPTS) -> Completion:
    return Completion(lm, prompt, **{"max_tokens": 3, **CASES[case]})


def suffix(d: Completion, value: Tensor, keep: Tensor) -> Tensor:
    """log p of the tokens from ``keep`` on."""
    by_token = d.token_log_probs(value)
    return torch.where(torch.arange(value.shape[-1]) >= keep[..., None], by_token, 0.0).sum(-1).detach()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_regrow_keeps_what_it_should_and_scores_the_rest(case, arch):
    lm = tiny_lm(arch, vocab=4, dtype=torch.float64)
    d = completion(case, lm).expand((50, 2))
    old = d.sample()
    keep = torch.randint(0, 6, (50, 2))
    new, log_prob = d.regrow(old, keep)
    assert new.shape == old.shape and log_prob.shape == keep.shape
    column = torch.arange(old.shape[-1])
    assert bool((new == old)[column < keep[..., None]].all())
    assert d.support.check(new).all() and d.log_prob(new).isfinite().all()
    torch.testing.assert_close(log_prob, suffix(d, new, keep))
    untouched = keep >= text.length(old)
    assert bool(text.equal(new, old)[untouched].all()) and bool((log_prob[untouched] == 0).all())
    assert not bool(text.equal(new, old)[keep == 0].all())


@pytest.mark.parametrize("case", CASES)
def test_regrow_from_the_start_is_a_fresh_draw(case):
    d = completion(case)
    pyro.set_rng_seed(3)
    fresh, log_fresh = d.sample_and_log_prob((20,))
    old = d.sample((20,))
    pyro.set_rng_seed(3)
    new, log_prob = d.regrow(old, 0)
    assert torch.equal(new, fresh) and torch.equal(log_prob, log_fresh)


@pytest.mark.parametrize("case", CASES)
def test_regrow_draws_from_the_law_given_what_is_kept(case):
    """Frequencies within 5 standard errors of p(z) / p(what is kept), for every text and every cut."""
    n, d = 4000, completion(case)
    support = d.enumerate_support()  # (K, 2, E)
    log_p = d.log_prob(support).detach()
    old = d.sample((1,))
    for keep in range(3):
        new, _ = d.regrow(old.expand(n, -1, -1), keep)
        for b in range(2):
            shares = (support[:, b, :keep] == old[0, b, :keep]).all(-1)
            p = log_p[:, b].masked_fill(~shares, -torch.inf).softmax(0)
            count = (new[:, None, b] == support[:, b]).all(-1).sum(0)
            assert_counts(count, p, n)


def test_regrow_gives_the_same_texts_in_chunks():
    lm = tiny_lm(vocab=4)
    d = completion("several stops", lm).expand((30, 2))
    old, keep = d.sample(), torch.randint(0, 4, (30, 2))
    whole = None
    for lm.token_budget in (100_000, 60, 1):
        pyro.set_rng_seed(5)
        new, log_prob = d.regrow(old, keep)
        whole = (new, log_prob) if whole is None else whole
        assert torch.equal(new, whole[0])
        torch.testing.assert_close(log_prob, whole[1], rtol=0, atol=1e-9)


def test_regrow_costs_no_more_than_a_fresh_draw():
    lm = tiny_lm(vocab=4)
    d = Completion(lm, torch.randint(1, 4, (30,)), max_tokens=8, min_tokens=8).expand((16,))
    prompts(lm.network).capacity = 0  # each prompt is read anew
    old, passes = d.sample(), []
    lm.model.register_forward_hook(lambda *_: passes.append(1))
    d.regrow(old, 6)  # what is tried once per network, which with a hook is another, has been tried

    def cost(keep) -> tuple[int, int]:
        before, _ = lm.tokens_scored, passes.clear()
        d.regrow(old, keep)
        return lm.tokens_scored - before, len(passes)

    # The prompt once, and seven tokens a text: nothing follows the eighth but a certain stop.
    fresh = 30 + 16 * 7
    assert cost(0) == (fresh, 8)
    assert cost(torch.arange(16) % 9) == (fresh, 8)
    assert cost(6) == (fresh, 3)  # prompt, what is kept, the seventh token
    assert cost(8 + torch.arange(16) % 2) == (30, 1)
    assert cost(9) == (0, 0)


def test_regrow_of_a_prefix_that_has_not_ended_goes_on():
    d = Completion(LM, "a", max_tokens=3, min_tokens=3)
    new, _ = d.regrow(torch.tensor([A, B]), 5)
    assert tokens(new)[:2] == (A, B) and len(tokens(new)) == 4


@pytest.mark.parametrize("keep", [-1, 1.0, True, 4])
def test_regrow_names_bad_arguments(keep):
    with pytest.raises(ValueError, match="keep"):
        Completion(LM, "a", max_tokens=2).regrow(torch.tensor([A, B, A, A]), keep)
