"""Decoding under an adapter that is merged: the steps are those of the adapter, as it is when the steps are made."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from packing import V
from tiny import tiny_lm

from lmppl.distributions import Completion
from lmppl.engine.decoding import Decoder
from lmppl.engine.merging import merged
from lmppl.engine.tuning import TUNING
from lmppl.parts import plain_key

pytestmark = pytest.mark.usefixtures("double_precision")
CONTEXTS, INDEX = torch.tensor([[2, 3, 4]]), torch.tensor([0, 0])


def view_of(lm, **config):
    config = {"target_modules": "all-linear", "init_lora_weights": False} | config
    return lm.with_adapter(peft.LoraConfig(r=3, lora_alpha=5, **config))


def logits(view, steps=7):
    decoder, found = Decoder(view, CONTEXTS, INDEX), []
    for t in range(steps):
        decoder.step(torch.tensor([2, 3]).roll(t))
        found.append(decoder.logits)
    return torch.stack(found)


def whole(view, steps=7):
    rows = torch.stack([torch.tensor([2, 3]).roll(t) for t in range(steps)], 1)
    with torch.no_grad():
        return view(torch.cat([CONTEXTS[INDEX], rows], 1)).logits[:, -steps:].transpose(0, 1)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ["mlp.c_fc", "q_proj"]}]
)
def test_merged_steps_are_the_adapters(arch, config):
    lm = tiny_lm(arch, vocab=V)
    before = copy.deepcopy(lm.model.state_dict())
    view, other = view_of(lm, **config), view_of(lm)
    assert bool(merged(view)) == (not config.get("use_dora"))
    for each in (view, other, view, lm):
        torch.testing.assert_close(logits(each), whole(each))
    after = {plain_key(key): weight for key, weight in lm.model.state_dict().items()}
    torch.testing.assert_close(before, {key: after[key] for key in before}, rtol=0, atol=0)


@pytest.mark.parametrize("change", ["step", "data", "base"])
def test_a_changed_weight_is_merged_anew(change):
    lm = tiny_lm("llama", vocab=V)
    view = view_of(lm)
    logits(view)
    weight = (lm if change == "base" else view).trainable_parameters()[-3]
    with torch.no_grad():
        (weight.data if change == "data" else weight).mul_(2)
    torch.testing.assert_close(logits(view), whole(view))


@pytest.mark.parametrize("first", [True, False])
def test_what_inference_mode_made_is_not_written_to(first):
    view = view_of(tiny_lm(vocab=V))
    for inference in (first, not first):
        with torch.inference_mode(inference):
            found = logits(view)
        torch.testing.assert_close(found, whole(view))


def test_a_hook_is_called_at_every_step():
    view, called = view_of(tiny_lm("llama", vocab=V)), []
    layer = next(iter(view.network.adapters[view.adapter_name].layers))
    layer.base_layer.register_forward_hook(lambda *args: called.append(1))
    logits(view, steps=7)
    assert len(called) >= 7


def test_several_decoders_at_once():
    """Each reads by its own adapter's weights, in turns; those of one that is gone may be written over."""
    lm = tiny_lm("llama", vocab=V)
    several = [view_of(lm), view_of(lm), lm]
    rows = torch.stack([torch.tensor([2, 3]).roll(t) for t in range(7)])
    for views in (several, several[::-1]):
        decoders = [Decoder(view, CONTEXTS, INDEX) for view in views]
        for tokens, *expected in zip(rows, *map(whole, views), strict=True):
            for decoder, logits in zip(decoders, expected, strict=True):
                decoder.step(tokens)
                torch.testing.assert_close(decoder.logits, logits)


def test_a_hook_that_comes_in_the_middle_of_a_text(monkeypatch):
    lm, found = tiny_lm("llama", vocab=V), []
    view = view_of(lm)
    layer = next(iter(view.network.adapters[view.adapter_name].layers))
    for apart in (TUNING.steps_apart, 99):
        monkeypatch.setattr(TUNING, "steps_apart", apart)
        decoder = Decoder(view, CONTEXTS, INDEX)
        for _ in range(6):
            decoder.step(torch.tensor([2, 3]))
        hook = layer.base_layer.register_forward_hook(lambda m, args, out: 2 * out)
        decoder.step(torch.tensor([3, 2]))
        hook.remove()
        decoder.step(torch.tensor([3, 4]))
        found.append(decoder.logits)
    torch.testing.assert_close(*found)


def test_too_many_weights_are_left_apart(monkeypatch):
    view = view_of(tiny_lm(vocab=V))
    assert merged(view)
    monkeypatch.setattr(TUNING, "merged", 1)
    assert not merged(view)


def test_neither_copies_nor_passes_with_gradient_know_of_it(tmp_path):
    """A copy starts without merged weights, and the gradient reaches the adapter after decoding as before."""
    view = view_of(tiny_lm(vocab=V))
    site = Completion(view, CONTEXTS[0], max_tokens=6)
    loss = [site.log_prob(torch.tensor([2, 3, 4, 5, 2, 3])).sum()]
    site.sample_and_log_prob((3,))
    merged(view)
    loss.append(site.log_prob(torch.tensor([2, 3, 4, 5, 2, 3])).sum())
    before, after = (torch.autograd.grad(each, view.trainable_parameters()) for each in loss)
    torch.testing.assert_close(before, after)
    assert "merged" in view.network.kept and "merged" not in copy.deepcopy(view).network.kept
    view.remove_adapter()
    assert "merged" not in view.network.kept
