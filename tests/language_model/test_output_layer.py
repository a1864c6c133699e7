"""An adapter on the output layer too: still a distribution, still disturbing nobody, saved and loaded."""

from __future__ import annotations

import pytest
import torch
from reference import Law, Plain, tokens
from tiny import tiny_lm

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.models import Recipe
from lmppl.models.experiment import linear_layers

pytestmark = pytest.mark.usefixtures("double_precision")

ADAPTER = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_every_linear_layer_is_named_and_no_other(arch):
    lm = tiny_lm(arch, vocab=6)
    before = linear_layers(lm)
    assert "lm_head" in before and not any("wte" in n or "norm" in n or "ln_" in n for n in before)
    assert len(before) == 1 + 2 * {"gpt2": 4, "llama": 7}[arch]  # of two blocks, and the output layer
    Recipe(adapter=ADAPTER, output_layer=True).guide_lm(lm)
    assert linear_layers(lm) == before


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@torch.no_grad()
def test_draws_and_scores_are_those_of_plain_loops_and_the_base_is_left_alone(arch, tmp_path):
    lm = tiny_lm(arch, vocab=6)
    prompt, end = lm.encode("ab"), lm.token_id(".")
    support = Law(Plain(lm), tokens(prompt), 2, stops=(end,)).support()
    base = Completion(lm, prompt, max_tokens=2, stop=".")
    guide = Recipe(adapter=ADAPTER, output_layer=True).guide_lm(lm)
    weight = lm.model.get_output_embeddings().get_base_layer().weight
    assert (weight is lm.model.get_input_embeddings().weight) == (arch == "gpt2")  # tied, and not
    mine = Completion(guide, prompt, max_tokens=2, stop=".")
    law = Law(Plain(guide), tokens(prompt), 2, stops=(end,)).support()
    values, log_q = mine.sample_and_log_prob((64,))
    assert log_q.tolist() == pytest.approx([law[tokens(v)] for v in values], abs=1e-9)
    for value, log_p in support.items():
        z = torch.tensor(value)
        assert float(mine.log_prob(z)) == pytest.approx(law[value], abs=1e-9)
        assert float(base.log_prob(z)) == pytest.approx(log_p, abs=1e-9)
    assert max(abs(law[z] - support[z]) for z in law) > 0.1  # the adapter does something
    guide.save_pretrained(tmp_path / "adapter")
    again = Completion(lm.with_adapter(tmp_path / "adapter"), prompt, max_tokens=2, stop=".")
    assert again.log_prob(values).tolist() == pytest.approx(log_q.tolist(), abs=1e-9)
    lm.save_pretrained(tmp_path / "base")
    reloaded = LanguageModel.from_pretrained(tmp_path / "base")
    alone = Completion(reloaded, prompt, max_tokens=2, stop=".").log_prob(values)
    assert alone.tolist() == pytest.approx(base.log_prob(values).tolist(), abs=1e-9)
