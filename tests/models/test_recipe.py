"""What a guide is trained with: which layers get an adapter, and the settings of large networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_lm

from lmppl.distributions import Completion
from lmppl.inference import Linex, Replay
from lmppl.models import PRETRAINED, Recipe, continuation
from lmppl.models.experiment import LARGE, decoder_layers, recipe_for

ADAPTER = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}


def layers(guide) -> set[int]:
    """The decoder layers that hold trainable parameters."""
    own = {id(p) for p in guide.trainable_parameters()}
    names = [name for name, p in guide.model.named_parameters() if id(p) in own]
    return {int(part) for name in names for part in name.split(".") if part.isdigit()}


@pytest.mark.parametrize("arch", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize(
    ("upper", "expected"), [(None, {0, 1}), (1, {1}), (2, {0, 1}), (0.5, {1}), (0.3, {1}), (1.0, {0, 1})]
)
def test_adapters_on_the_upper_layers_only(arch, upper, expected):
    """A network of two layers: a share of them is rounded up."""
    lm = tiny_lm(arch)
    every = Recipe(adapter=ADAPTER).guide_lm(lm)
    guide = Recipe(adapter=ADAPTER, upper_layers=upper).guide_lm(lm)
    assert layers(guide) == expected
    assert len(guide.trainable_parameters()) == len(every.trainable_parameters()) * len(expected) // 2


@pytest.mark.parametrize("own", [["q_proj"], ".*q_proj"])
def test_what_the_recipe_leaves_out_stays_out(own):
    guide = Recipe(adapter=ADAPTER | {"exclude_modules": own}, upper_layers=1).guide_lm(tiny_lm("llama"))
    held = [name for name, _ in guide.named_parameters()]
    assert (
        layers(guide) == {1} and not any("q_proj" in name for name in held) and any("k_proj" in name for name in held)
    )


@pytest.mark.parametrize("upper", [0, 3, -1, True, 0.0, 1.5, "half"])
def test_no_such_layers(upper):
    with pytest.raises(ValueError, match="upper_layers: expected an integer up to 2, or a share up to 1.0, got"):
        Recipe(upper_layers=upper).guide_lm(tiny_lm())


def test_a_share_of_thirty_layers():
    shares = {0.1: 3, 0.2: 6, 1 / 3: 10, 0.35: 11, 0.01: 1}
    assert {share: Recipe(upper_layers=share).adapted(30) for share in shares} == shares


def test_the_output_layer_is_none_of_them_and_may_be_adapted_beside(tmp_path):
    lm = tiny_lm("llama")
    guide = Recipe(adapter=ADAPTER, upper_layers=1, output_layer=True).guide_lm(lm)
    own = {id(p) for p in guide.trainable_parameters()}
    names = [name for name, p in lm.model.named_parameters() if id(p) in own]
    assert sum("lm_head" in name for name in names) == 2
    assert all("lm_head" in name or name.startswith(decoder_layers(lm)[1]) for name in names)
    prompt = lm.encode("ab")
    z = Completion(guide, prompt, max_tokens=3).sample((8,))
    guide.save_pretrained(tmp_path / "adapter")
    saved = lm.with_adapter(tmp_path / "adapter")
    assert len(saved.trainable_parameters()) == len(own)
    mine, again = (Completion(q, prompt, max_tokens=3).log_prob(z) for q in (guide, saved))
    assert torch.allclose(mine, again, atol=1e-6)


def test_a_large_network_has_settings_of_its_own():
    """Of an experiment's recipe only what depends on the network's size is another."""
    lm = tiny_lm()
    own = Recipe(steps=7, quick_steps=3, replay=Replay, betas=(0.9, 0.95), output_layer=True)
    assert recipe_for(lm, own) is own
    found = recipe_for(lm, own, large=0)
    assert found == replace(PRETRAINED, steps=7, quick_steps=3, replay=Replay, betas=(0.9, 0.95), output_layer=True)
    assert recipe_for(lm, replace(own, objective=Linex), large=0).objective is Linex
    guide = found.guide_lm(lm)
    assert len(layers(guide)) == found.adapted(2)


def test_the_embedded_ones_are_not_large_and_a_recipe_that_is_given_counts():
    found = continuation.experiment()
    assert found.recipe == Recipe() and sum(p.numel() for p in found.lm.network.base_parameters) < LARGE / 2
    mine = Recipe(learning_rate=5e-4)
    assert continuation.experiment(recipe=mine).recipe is mine
