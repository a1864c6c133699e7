"""GGUF files: a model read from one is the model that was written, saved as an ordinary checkpoint; damage is told."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig
from tiny_gguf import TEMPLATE, tiny_llama, write

from lmppl import LanguageModel
from lmppl.adapters import CheckpointError

IDS = torch.tensor([[1, 40, 80, 200, 260], [2, 5, 261, 1, 77]])
TEXTS = ("the theme", " 12  tabs\tand\nlines", "<|im_start|>user\nthé<|im_end|>")
CHAT = [{"role": "user", "content": "What is the time?"}]


@pytest.fixture(scope="module")
def source():
    return tiny_llama()


@pytest.fixture(scope="module")
def directory(source, tmp_path_factory):
    """A directory that holds just the file."""
    path = tmp_path_factory.mktemp("gguf")
    write(path / "tiny.gguf", source)
    return path


@pytest.fixture(scope="module")
def lm(directory):
    return LanguageModel.from_pretrained(directory, gguf_file="tiny.gguf")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_it_is_the_model_that_was_written(source, lm):
    assert torch.equal(logits(lm), logits(source))
    assert (lm.bos_id, lm.eos_id, lm.vocab_size, lm.dtype) == (1, 2, 262, torch.float32)
    assert lm.decode(lm.encode(list(TEXTS[:2]))) == list(TEXTS[:2])
    assert (
        lm.encode("the theme").tolist() == [lm.encode(t).item() for t in ("t", "he", " the")] + lm.encode("me").tolist()
    )
    assert lm.tokenizer.chat_template == TEMPLATE


def test_it_is_what_transformers_reads_from_the_file(directory, lm):
    place = {"pretrained_model_name_or_path": directory, "gguf_file": "tiny.gguf"}
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(**place)), logits(lm))
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"]


def test_it_is_saved_as_an_ordinary_checkpoint_that_needs_no_gguf(lm, tmp_path, monkeypatch):
    lm.save_pretrained(tmp_path / "lm")
    names = {path.name for path in (tmp_path / "lm").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "lmppl.json",
    }  # fmt: skip
    assert "gguf" not in "".join((tmp_path / "lm" / name).read_text() for name in names if name.endswith("config.json"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm", output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "lm")
    assert not any(info.values()) and torch.equal(logits(plain), logits(lm))
    assert (plain.generation_config.bos_token_id, plain.generation_config.eos_token_id) == (1, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"]
    both = [t.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) for t in (tokenizer, lm.tokenizer)]
    assert both == ["<|im_start|>user\nWhat is the time?<|im_end|>\n<|im_start|>assistant\n"] * 2


def test_it_can_be_adapted_and_trained_in_another_precision(directory, source):
    lm = LanguageModel.from_pretrained(directory, gguf_file="tiny.gguf", dtype=torch.float64, device="cpu")
    assert lm.dtype == torch.float64
    torch.testing.assert_close(logits(lm), logits(source.to(torch.float64)))
    source.to(torch.float32)
    view = lm.with_adapter(LoraConfig(r=2, target_modules="all-linear"))
    view(IDS).logits.square().mean().backward()
    assert all(p.grad is not None for p in view.trainable_parameters())
    lm(IDS).logits.square().mean().backward()
    assert all(p.grad is not None for p in lm.trainable_parameters())


def test_files_beside_it_and_in_the_working_directory_are_not_read(directory, lm, tmp_path, monkeypatch):
    shutil.copy(directory / "tiny.gguf", tmp_path / "tiny.gguf")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "tiny.gguf", tiny_llama(seed=1))
    monkeypatch.chdir(tmp_path / "elsewhere")
    beside = LanguageModel.from_pretrained("..", gguf_file="tiny.gguf")
    assert torch.equal(logits(beside), logits(lm)) and beside.encode("the").tolist() == lm.encode("the").tolist()
    below = LanguageModel.from_pretrained(tmp_path, gguf_file="elsewhere/tiny.gguf")
    assert not torch.equal(logits(below), logits(lm))


def test_a_name_on_the_hub(directory, lm, tmp_path):
    """As the hub's own client keeps it in its cache."""
    commit = "0" * 40
    kept = tmp_path / "models--someone--tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(commit)
    (kept / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(directory / "tiny.gguf", kept / "snapshots" / commit / "tiny.gguf")
    where = {"cache_dir": tmp_path, "local_files_only": True}
    found = LanguageModel.from_pretrained("someone/tiny", gguf_file="tiny.gguf", **where)
    assert torch.equal(logits(found), logits(lm)) and found.model.name_or_path == "someone/tiny"
    with pytest.raises(CheckpointError, match=r"someone/tiny.*other\.gguf") as caught:
        LanguageModel.from_pretrained("someone/tiny", gguf_file="other.gguf", **where)
    assert "\n" not in str(caught.value)


# What goes wrong -----------------------------------------------------------------------------------------------------


def refused(path, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        LanguageModel.from_pretrained(path.parent, gguf_file=path.name)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0001, 0.002, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_off(directory, tmp_path, share):
    whole = (directory / "tiny.gguf").read_bytes()
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(whole[: max(4, int(share * len(whole)))])
    refused(torn, "cut off or damaged")


def test_a_file_that_is_damaged(directory, tmp_path):
    whole = (directory / "tiny.gguf").read_bytes()
    for position in (4, 16, 24, 40):  # version, number of keys, length of the first key, its type
        damaged = tmp_path / f"damaged-{position}.gguf"
        damaged.write_bytes(whole[:position] + b"\xff" * 4 + whole[position + 4 :])
        refused(damaged, "cut off or damaged")


def test_what_is_no_gguf_file_or_not_there(tmp_path):
    for name, content in {"empty.gguf": b"", "text.gguf": b"once upon a time", "short.gguf": b"GG"}.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "not a GGUF file")
    refused(tmp_path / "missing.gguf", "no such GGUF file")
    (tmp_path / "folder.gguf").mkdir()
    refused(tmp_path / "folder.gguf", "no such GGUF file")


def test_a_kind_that_transformers_does_not_know(source, tmp_path):
    refused(write(tmp_path / "odd.gguf", source, architecture="qwen2vl"), "architecture qwen2vl is not supported")


def test_a_weight_that_is_missing(source, tmp_path):
    refused(write(tmp_path / "partial.gguf", source, leave_out="blk.1.ffn_up"), "weights are missing: .*up_proj")


def test_scaled_positions_that_transformers_would_not_read(source, tmp_path):
    factors = {"rope_freqs.weight": np.ones(4, dtype=np.float32)}
    refused(
        write(tmp_path / "llama3.gguf", source, vectors=factors), r"rotary positions are scaled \(rope_freqs.weight\)"
    )
    scaling = {"llama.rope.scaling.type": "linear"}
    refused(write(tmp_path / "linear.gguf", source, strings=scaling), r"llama.rope.scaling.type = linear")
    write(tmp_path / "none.gguf", source, strings={"llama.rope.scaling.type": "none"})
    LanguageModel.from_pretrained(tmp_path, gguf_file="none.gguf")
    stated = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    lm = LanguageModel.from_pretrained(tmp_path, gguf_file="linear.gguf", rope_parameters=stated)
    assert not torch.equal(logits(lm), logits(source))


def test_without_the_library_it_is_said_what_to_install(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install pyro-lmppl\[gguf\]"):
        LanguageModel.from_pretrained(directory, gguf_file="tiny.gguf")


def test_a_directory_of_gguf_files_is_told_apart(directory):
    with pytest.raises(CheckpointError, match=r"pass gguf_file='tiny.gguf'"):
        LanguageModel.from_pretrained(directory)
    with pytest.raises(CheckpointError, match=r"gguf_file='tiny.gguf'\)"):
        LanguageModel.from_pretrained(directory / "tiny.gguf")
