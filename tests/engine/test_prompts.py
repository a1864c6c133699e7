"""Prompts are read once by the base network, for as long as its weights stay as they are."""

from __future__ import annotations

import peft
import pyro
import pytest
import torch
from tiny import tiny_lm

from lmppl import text
from lmppl.distributions import Completion
from lmppl.engine.prompts import prompts
from lmppl.inference import SMC, Importance

PROMPTS = torch.tensor([[2, 3, 4, 5, 6, 7, 2, 3], [4, 4, 4, 5, 5, text.PAD, text.PAD, text.PAD]])


@pytest.fixture
def lm():
    return tiny_lm(max_length=64)


def scores(lm, x=PROMPTS):
    """Log-probabilities of texts and prefixes, and what follows them: (N, B) each."""
    z = Completion(lm, x, max_tokens=3)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(2, 8, (6, len(x), 4), generator=generator)
    drawn[..., 3] = lm.eos_id
    after = Completion(lm, lm.join(x, drawn), max_tokens=2, stop=None)
    y = torch.tensor([3, 4])
    return torch.stack([z.log_prob(drawn), after.log_prob(y)])


def without(lm, run):
    """What ``run`` gives where nothing is kept."""
    prompts(lm.network).capacity = 0
    found = run()
    prompts(lm.network).capacity = 1000
    return found


def test_kept_prompts_change_no_score(lm):
    with torch.no_grad():
        plain = without(lm, lambda: scores(lm))
        for _ in range(2):
            torch.testing.assert_close(scores(lm), plain, atol=1e-9, rtol=1e-9)
        longer = torch.cat([PROMPTS[:1].expand(2, -1), torch.tensor([[7], [6]])], 1)  # begin as one that is kept
        torch.testing.assert_close(scores(lm, longer), without(lm, lambda: scores(lm, longer)), atol=1e-9, rtol=1e-9)


def test_kept_prompts_change_no_draw(lm):
    z = Completion(lm, PROMPTS, max_tokens=5)

    def draw():
        torch.manual_seed(0)
        return z.sample_and_log_prob((50,))

    plain = without(lm, draw)
    for _ in range(2):
        again = draw()
        assert torch.equal(again[0], plain[0])
        torch.testing.assert_close(again[1], plain[1], atol=1e-9, rtol=1e-9)


def test_a_prompt_is_read_once(lm):
    def model():
        with pyro.plate("data", len(PROMPTS)):
            z = pyro.sample("z", Completion(lm, PROMPTS, max_tokens=3))
            pyro.sample("y", Completion(lm, lm.join(PROMPTS, z), max_tokens=2, stop=None), obs=torch.tensor([3, 4]))

    def tokens(make):
        torch.manual_seed(0)
        before = lm.tokens_scored
        with pyro.validation_enabled(False):
            make.run()
        return lm.tokens_scored - before

    for make in (Importance(model, num_particles=20), SMC(model, num_particles=20, twist="stop")):
        prompts(lm.network).forget()
        tokens(make)  # the first run also verifies what the network can do
        prompts(lm.network).forget()
        cold = tokens(make)
        warm = tokens(make)
        assert cold - warm == int(text.length(PROMPTS).sum()) - len(PROMPTS)  # all but the last token of each


@pytest.mark.parametrize(
    "move",
    [
        lambda p: p.add_(0.1),
        lambda p: p.data.mul_(1.5),
        lambda p: p.data.copy_(torch.randn_like(p)),
        lambda p: setattr(p, "data", p.data + 0.1),
    ],
    ids=["in place", "behind autograd's back", "copied", "replaced"],
)
def test_weights_that_move_invalidate_what_is_kept(lm, move):
    with torch.no_grad():
        before = scores(lm)
        for p in lm.network.base_parameters:
            move(p)
        after = scores(lm)
        assert (after - before).abs().max() > 1e-3
        torch.testing.assert_close(after, without(lm, lambda: scores(lm)), atol=1e-9, rtol=1e-9)


def test_an_optimiser_step_and_loading_invalidate(lm):
    saved = {k: w.clone() for k, w in lm.model.state_dict().items()}
    optimizer = torch.optim.AdamW(lm.trainable_parameters(), lr=0.05)
    with torch.no_grad():
        before = scores(lm)
    (-scores(lm).sum()).backward()
    optimizer.step()
    with torch.no_grad():
        moved = scores(lm)
        torch.testing.assert_close(moved, without(lm, lambda: scores(lm)), atol=1e-9, rtol=1e-9)
        lm.model.load_state_dict(saved)
        torch.testing.assert_close(scores(lm), before, atol=1e-9, rtol=1e-9)


def test_an_adapter_reads_its_prompts_itself(lm):
    with torch.no_grad():
        scores(lm)
        guide = lm.with_adapter(peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        assert (scores(guide) - scores(lm)).abs().max() > 1e-3
        torch.testing.assert_close(scores(guide), without(lm, lambda: scores(guide)), atol=1e-9, rtol=1e-9)


def test_gradients_reach_the_base_weights_through_the_prompt(lm):
    with torch.no_grad():
        scores(lm)
    (gradient,) = torch.autograd.grad(scores(lm).sum(), [lm.model.get_input_embeddings().weight])
    (plain,) = without(lm, lambda: torch.autograd.grad(scores(lm).sum(), [lm.model.get_input_embeddings().weight]))
    assert torch.equal(gradient, plain)


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(lm):
    kept = prompts(lm.network)
    kept.capacity = 14
    with torch.no_grad():
        for first in (2, 3, 4):
            ids = torch.tensor([[first] * 7])
            kept.past(lm, ids, torch.tensor([6]))
        assert sum(map(len, kept._kept)) == 12 and [k[0] for k in kept._kept] == [3, 4]
        assert kept.past(lm, torch.full((1, 20), 5), torch.tensor([15])) is None  # longer than all that may be kept
