"""`MaskedLanguageModel`: a view that reads both ways; what it shares with `LanguageModel` is tested there."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from peft import LoraConfig
from tiny import tiny_lm
from tiny_masked import ARCHITECTURES, masked_lm, masked_tokenizer

from lmppl import LanguageModel, MaskedLanguageModel
from lmppl.damage import CheckpointError
from lmppl.distributions import Completion, Unmasking

LORA = LoraConfig(r=2, target_modules="all-linear")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_base_and_adapter_are_saved_for_transformers_and_peft(arch, tmp_path):
    lm = masked_lm(arch, framed=True, vocab=7)
    view = lm.with_adapter(LORA)
    with torch.no_grad():
        for p in view.trainable_parameters():
            p.normal_()
    canvas = lm.join("ab", lm.gap(2), "c")
    path = Unmasking(lm, canvas).sample((20,))
    expected = [Unmasking(v, canvas).log_prob(path).detach() for v in (lm, view)]
    assert (expected[0] - expected[1]).abs().max() > 0.01
    lm.save_pretrained(tmp_path / "base")
    view.save_pretrained(tmp_path / "adapter")
    loaded = MaskedLanguageModel.from_pretrained(tmp_path / "base", dtype=torch.float64)
    for v, value in zip((loaded, loaded.with_adapter(tmp_path / "adapter")), expected, strict=True):
        assert (Unmasking(v, canvas).log_prob(path) - value).abs().max() < 1e-9
    plain = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    ids = torch.cat([lm.frame[0], canvas, lm.frame[1]])[None]
    with torch.no_grad():
        by_peft = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(ids).logits
        assert (by_peft - view.forward(ids).logits).abs().max() < 1e-9


def test_a_masked_language_model_is_not_taken_for_a_causal_one(tmp_path):
    lm = masked_lm()
    lm.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"it is a masked language model \(BertForMaskedLM\)"):
        LanguageModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lm: expected a LanguageModel, got MaskedLanguageModel"):
        Completion(lm, "ab", max_tokens=2)
    with pytest.raises(ValueError, match="lm: expected a MaskedLanguageModel, got LanguageModel"):
        Unmasking(tiny_lm(), torch.tensor([1]))
    with pytest.raises(ValueError, match="tokenizer: it has no mask token"):
        MaskedLanguageModel(lm.model, tiny_lm().tokenizer)
    with pytest.raises(ValueError, match="gguf_file"):
        MaskedLanguageModel.from_pretrained(tmp_path, gguf_file="x.gguf")


def test_gaps_and_frames():
    lm = masked_lm(framed=True, vocab=7)
    assert lm.gap(3).tolist() == [1, 1, 1]
    assert lm.join("a", lm.gap(1), lm.encode(["b", "c"])).tolist() == [[4, 1, 5], [4, 1, 6]]
    assert [ids.tolist() for ids in lm.frame] == [[2], [3]] and [len(ids) for ids in masked_lm().frame] == [0, 0]
    assert lm.encode("a<mask>b").tolist() == [4, 1, 5]
    for tokens in (0, 1.5, True):
        with pytest.raises(ValueError, match="tokens: expected a positive integer"):
            lm.gap(tokens)


def test_checkpointed_layers_give_the_same_gradient():
    lm = masked_lm()
    view = lm.with_adapter(LORA)
    with torch.no_grad():
        for p in view.trainable_parameters():
            p.normal_()
    d = Unmasking(view, lm.join("ab", lm.gap(2)))
    path = d.sample((10,))
    grads = []
    for on in (False, True):
        if on:
            lm.model.activation_checkpointing_enable()
        grads.append(torch.autograd.grad(d.log_prob(path).sum(), view.trainable_parameters()))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads, strict=True))


def test_the_tokenizer_of_tests_spells_its_letters():
    assert masked_tokenizer(5).decode([2, 3, 4]) == "abc"


def test_robertas_context_is_shorter_than_its_table_of_positions():
    """Positions begin after that of padding, which is 0 here; longer texts are refused by name."""
    lm = masked_lm("roberta")
    assert lm.max_length == 31 and masked_lm("bert").max_length == 32
    for length, fits in ((31, True), (32, False)):
        canvas = lm.join(torch.full((length - 1,), 3), lm.gap(1))
        if fits:
            assert Unmasking(lm, canvas).sample().shape[-1] > 0
        else:
            with pytest.raises(ValueError, match="context holds 31"):
                Unmasking(lm, canvas).sample()
