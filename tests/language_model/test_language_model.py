"""Language models: text in and out, checkpoints, and the errors."""

from __future__ import annotations

import copy
import json
import os
import socket
import time

import pytest
import torch
import transformers
from huggingface_hub import constants
from peft import LoraConfig, PromptTuningConfig
from tiny import ARCHITECTURES, tiny_lm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmppl import LanguageModel, hub, text
from lmppl.adapters import CheckpointError
from lmppl.text import PAD

LORA = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)


@pytest.fixture(params=ARCHITECTURES)
def lm(request) -> LanguageModel:
    return tiny_lm(request.param, dtype=torch.float32)


def logits(lm: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return lm(torch.tensor([[2, 3, 4], [5, 2, 0]])).logits


# Text in and out -----------------------------------------------------------------------------------------------------


def test_encode_nests_and_decode_mirrors():
    lm = tiny_lm()
    nested = [["ab", "", "c"], ["abc", ".", "a.b"]]
    t = lm.encode(nested)
    assert t.shape == (2, 3, 3) and t.dtype == torch.long
    assert lm.decode(t) == nested
    assert lm.decode(lm.encode("ab")) == "ab"
    assert lm.encode("").shape == (0,) and lm.decode(lm.encode("")) == ""
    assert lm.encode([]).shape == (0, 0) and lm.decode(lm.encode(["", ""])) == ["", ""]


@pytest.mark.parametrize("stop", ["eos", ".", 5])
def test_encode_appends_the_stop(stop):
    lm = tiny_lm()
    plain, ended = lm.encode(["a", "bc"]), lm.encode(["a", "bc"], stop=stop)
    assert text.equal(ended, text.cat(plain, torch.tensor([lm.token_id(stop)]))).all()


def test_decode_drops_special_tokens_and_padding():
    lm = tiny_lm(pad_is_eos=False, add_bos=True)
    t = torch.tensor([[lm.bos_id, *lm.encode("ab").tolist(), lm.eos_id, PAD]])
    assert lm.decode(t) == ["ab"]


def test_bos_falls_back_to_eos():
    plain, with_bos = tiny_lm(), tiny_lm(pad_is_eos=False, add_bos=True)
    assert (plain.bos_id, plain.adds_bos) == (plain.eos_id, False)
    assert (with_bos.bos_id, with_bos.adds_bos) == (with_bos.tokenizer.bos_token_id, True)
    assert with_bos.encode("a").tolist() == [with_bos.tokenizer.convert_tokens_to_ids("a")]  # no bos


@pytest.mark.parametrize(
    ("ends", "found"), [([0, 3], (0, 3)), (4, (4,)), ([3, 5, 99], (3, 5)), ([99], (0,)), (None, (0,))]
)
def test_eos_is_where_generate_stops(ends, found):
    """The generation configuration's ends, special to the tokenizer or not; the configuration's where it has none."""
    made = tiny_lm(vocab=8, dtype=torch.float32)
    made.model.generation_config.eos_token_id = ends
    lm = LanguageModel(made.model, made.tokenizer)
    assert lm.eos_ids == found
    prompts = torch.randint(1, 8, (20, 2), generator=torch.Generator().manual_seed(0))
    rules = {"do_sample": True, "max_new_tokens": 30, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = lm.model.generate(prompts, eos_token_id=list(lm.eos_ids), **rules)
        torch.manual_seed(0)
        assert found == (0,) or torch.equal(drawn, lm.model.generate(prompts, **rules))


def test_encode_is_cached_without_being_wrong():
    lm = tiny_lm()
    first = lm.encode("ab")
    first[0] = 7
    assert lm.encode("ab").tolist() != first.tolist()


def test_join_drops_the_eos_at_the_end_of_a_text_and_keeps_what_is_inside():
    lm = tiny_lm()
    x = lm.encode(["a.", "bb"], stop="eos")
    z = lm.encode(["c", "", "a"], stop=".")
    joined = lm.join(x[:, None], z, "b")
    assert lm.decode(joined) == [[f"{x}{z}.b" for z in ("c", "", "a")] for x in ("a.", "bb")]
    assert not (joined == lm.eos_id).any()
    middle = torch.tensor([2, lm.eos_id, 3])
    assert lm.join(middle).tolist() == middle.tolist()
    assert lm.join(middle, lm.encode("", stop="eos"), "a").tolist() == [*middle.tolist(), *lm.encode("a").tolist()]
    twice = torch.tensor([[2, lm.eos_id, lm.eos_id], [2, lm.eos_id, PAD]])
    assert lm.join(twice, "a").tolist() == [[2, lm.eos_id, lm.encode("a").item()], [2, lm.encode("a").item(), PAD]]


def test_fill_is_string_formatting():
    lm = tiny_lm()
    template, xs, ys = "a{x}b.{y}c{x}", ["a", "", "cc"], ["b", "ac"]
    filled = lm.fill(template, x=lm.encode(xs, stop="eos")[:, None], y=lm.encode(ys))
    assert lm.decode(filled) == [[template.format(x=x, y=y) for y in ys] for x in xs]
    assert lm.decode(lm.fill("{x}b", x="a")) == "ab"


@pytest.mark.parametrize(
    ("template", "fields", "name"),
    [
        ("{x}{y}", {"x": "a"}, "'y'"),
        ("{x}", {"x": "a", "z": "b"}, "z"),
        ("{x!r}", {"x": "a"}, "'x'"),
        ("{x}", {"x": 1}, "x"),
    ],
)
def test_fill_names_the_field_that_is_wrong(template, fields, name):
    with pytest.raises(ValueError, match=name):
        tiny_lm().fill(template, **fields)


def test_stop_ids():
    lm = tiny_lm()
    assert lm.stop_ids(None).shape == (0,)
    assert lm.stop_ids("eos").tolist() == [lm.eos_id]
    assert lm.stop_ids([".", "eos", 5, 5]).tolist() == [lm.token_id("."), lm.eos_id, 5]
    assert lm.stop_ids(torch.tensor([3, 4])).tolist() == [3, 4]


@pytest.mark.parametrize("stop", ["ab", "", -1, 8, True, 1.5, [], ["ab"], [9]])
def test_a_stop_is_one_token_of_the_vocabulary(stop):
    with pytest.raises(ValueError, match="stop"):
        tiny_lm().stop_ids(stop)


@pytest.mark.parametrize("bad", [3, ["a", ["b"]], [["a"], ["a", "b"]], None])
def test_encode_refuses_uneven_nesting(bad):
    with pytest.raises(ValueError, match="text"):
        tiny_lm().encode(bad)


def test_ids_outside_the_vocabulary_are_refused_both_ways():
    lm = tiny_lm(vocab=8)
    with pytest.raises(ValueError, match="text .* 8"):
        lm.decode(torch.tensor([8]))
    small = LanguageModel(lm.model, tiny_lm(vocab=12).tokenizer)
    with pytest.raises(ValueError, match="outside the model's 8"):
        small.encode("ah")


def test_a_trained_tokenizer_round_trips(stories):
    strings = ["Tom went to the park.", " He found a ball.", "\n", "naïve — 1.5 , isn't"]
    assert stories.decode(stories.encode(strings, stop="eos")) == strings
    for stop in (".", "\n", "eos"):
        assert stories.stop_ids(stop).shape == (1,)


# The network ---------------------------------------------------------------------------------------------------------


def test_facts_about_the_network(lm):
    assert logits(lm).shape[-1] == lm.vocab_size == 8
    assert lm.max_length == 64 and lm.dtype == torch.float32 and lm.device.type == "cpu"


def test_the_output_is_the_models_own_and_dropout_is_off(lm):
    plain = copy.deepcopy(lm.model).eval()
    lm.train()
    lm.model.train()
    expected = plain(torch.tensor([[2, 3, 4], [5, 2, 0]])).logits
    assert torch.equal(logits(lm), expected)


def test_tokens_scored_counts_for_all_views(lm):
    view = lm.with_adapter(LORA)
    logits(lm), logits(view)
    lm(torch.tensor([[1, 2]]), tokens=1)
    assert lm.tokens_scored == view.tokens_scored == 6 + 6 + 1


def test_wrapping_a_model_twice_shares_the_network():
    lm = tiny_lm()
    again = LanguageModel(lm.model, lm.tokenizer)
    view = lm.with_adapter(LORA)
    for p in view.trainable_parameters():
        p.data.normal_()
    base = logits(lm)
    assert not torch.equal(logits(view), base) and torch.equal(logits(again), base)


def test_double_precision_holds_in_adapters_too():
    view = tiny_lm(dtype=torch.float64).with_adapter(LORA)
    assert view.dtype == torch.float64 and {p.dtype for p in view.trainable_parameters()} == {torch.float64}
    assert logits(view).dtype == torch.float64


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")  # peft's, about merging: we never do
def test_a_base_model_with_adapters_is_saved_clean_for_transformers(lm, tmp_path):
    view = lm.with_adapter(LoraConfig(r=2, target_modules="all-linear", modules_to_save=[head(lm)]))
    for p in view.trainable_parameters():
        p.data.normal_()
    logits(view)
    lm.save_pretrained(tmp_path / "lm")
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm", output_loading_info=True)
    assert not any(info.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "lm")
    finer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype=torch.float64).eval()
    found = finer(torch.tensor([[2, 3, 4], [5, 2, 0]])).logits
    close = {"rtol": 1e-12, "atol": 1e-12}  # not equal: transformers' gelu_new is many operations
    torch.testing.assert_close(found, logits(LanguageModel(finer, tokenizer)), **close)
    assert torch.equal(logits(LanguageModel(plain, tokenizer)), logits(lm))
    assert tokenizer("ab.", add_special_tokens=False)["input_ids"] == lm.encode("ab.").tolist()
    again = LanguageModel.from_pretrained(tmp_path / "lm")
    assert torch.equal(logits(again), logits(lm)) and again.eos_id == lm.eos_id
    assert [p.name for p in tmp_path.iterdir()] == ["lm"]  # nothing left of the writing


def head(lm: LanguageModel) -> str:
    output = lm.model.get_output_embeddings()
    return next(name for name, module in lm.model.named_modules() if module is output)


def test_saving_again_replaces_the_files_and_nothing_else(tmp_path):
    (tmp_path / "log.txt").write_text("mine")
    first, second = tiny_lm(seed=0), tiny_lm(seed=1)
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path)
    assert torch.equal(logits(LanguageModel.from_pretrained(tmp_path)), logits(second))
    assert (tmp_path / "log.txt").read_text() == "mine"


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    lm = tiny_lm()
    monkeypatch.setattr(lm.tokenizer, "save_pretrained", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        lm.save_pretrained(tmp_path / "lm")
    assert not list(tmp_path.iterdir())


def one_line(error: BaseException) -> bool:
    return "\n" not in str(error)


def test_a_path_that_is_no_checkpoint(tmp_path):
    cases = {"missing": None, "empty": {}, "odd": {"config.json": "{}"}, "torn": {"config.json": "{"}}
    for name, files in cases.items():
        path = tmp_path / name
        if files is not None:
            path.mkdir()
            for file, content in files.items():
                (path / file).write_text(content)
        with pytest.raises(CheckpointError, match=name) as caught:
            LanguageModel.from_pretrained(path)
        assert one_line(caught.value) and isinstance(caught.value, OSError) and isinstance(caught.value, ValueError)


def test_a_checkpoint_that_is_not_whole(tmp_path):
    tiny_lm().save_pretrained(tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="torn"):
        LanguageModel.from_pretrained(tmp_path / "torn")
    tiny_lm().save_pretrained(tmp_path / "deeper")
    config = json.loads((tmp_path / "deeper" / "config.json").read_text())
    (tmp_path / "deeper" / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    with pytest.raises(CheckpointError, match="weights are missing"):
        LanguageModel.from_pretrained(tmp_path / "deeper")
    (tmp_path / "deeper" / "config.json").write_text(json.dumps({**config, "n_layer": 1}))
    with pytest.raises(CheckpointError, match=r"config.json describes a smaller network than the weights.*h\.1\."):
        LanguageModel.from_pretrained(tmp_path / "deeper")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"years of work", b"[1]", b"\x80\x04\x95\x00.", b"half"])
def test_a_damaged_file_of_a_checkpoint_is_named(tmp_path, file, content):
    """With the manifest of a save and without one."""
    tiny_lm().save_pretrained(tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=file) as caught:
            LanguageModel.from_pretrained(tmp_path)
        assert one_line(caught.value)
        (tmp_path / "lmppl.json").unlink(missing_ok=True)


def test_weights_of_another_save_are_refused_and_an_edited_configuration_is_not(tmp_path):
    for seed in (0, 1):
        tiny_lm(seed=seed).save_pretrained(tmp_path / f"{seed}")
    (tmp_path / "1" / "model.safetensors").replace(tmp_path / "0" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing, damaged or changed since it was saved"):
        LanguageModel.from_pretrained(tmp_path / "0")
    tiny_lm().save_pretrained(tmp_path / "edited")
    path = tmp_path / "edited" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [0, 1]}))
    assert LanguageModel.from_pretrained(tmp_path / "edited").eos_ids == (0, 1)


def test_several_chat_templates_are_saved(tmp_path):
    lm = tiny_lm()
    lm.tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tools": "a"}
    for _ in range(2):
        lm.save_pretrained(tmp_path)
    loaded = LanguageModel.from_pretrained(tmp_path).tokenizer
    assert loaded.chat_template == lm.tokenizer.chat_template


def test_a_name_is_not_waited_for_where_the_hub_is_out_of_reach(monkeypatch):
    """Within the patience of one attempt; a hub that answers is asked."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert hub.answers(there)
        monkeypatch.setattr(constants, "ENDPOINT", there)
        assert not hub.out_of_reach("nowhere") and not hub.out_of_reach(".")
    assert not hub.answers(there)
    started = time.monotonic()
    for load in (LanguageModel.from_pretrained, tiny_lm().with_adapter):
        with pytest.raises(
            CheckpointError, match="nowhere: .*there is no such directory, and http.* cannot be reached"
        ):
            load("nowhere")
    assert time.monotonic() - started < hub.PATIENCE


def test_an_adapter_is_no_checkpoint(tmp_path):
    tiny_lm().with_adapter(LORA).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="with_adapter"):
        LanguageModel.from_pretrained(tmp_path / "a")


def test_the_shared_checkpoint_loads(checkpoint):
    stories = LanguageModel.from_pretrained(checkpoint, dtype=torch.float64)
    plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()
    x = stories.encode("Tom went to the park.")[None]
    torch.testing.assert_close(stories(x).logits, plain(x).logits, rtol=1e-9, atol=1e-9)
    assert torch.equal(stories(x).logits, LanguageModel(plain, stories.tokenizer)(x).logits)


def test_prompt_learning_is_refused():
    with pytest.raises(ValueError, match="peft_config"):
        tiny_lm().with_adapter(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_a_tokenizer_that_was_told_what_to_write_for_the_unknown_is_taken_at_its_word():
    """An ordinary token stands in; one that is special would be lost, and is refused."""
    for unknown, special in (("a", []), ("<unk>", ["<unk>"])):
        ids = {word: i for i, word in enumerate(["<eos>", "<unk>", "a", "b"])}
        backend = Tokenizer(models.WordLevel(ids, unk_token=unknown))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<eos>", additional_special_tokens=special
        )
        lm = LanguageModel(tiny_lm(vocab=4).model, tokenizer)
        if special:
            with pytest.raises(ValueError, match="text 'bz' cannot be encoded at 'z'"):
                lm.encode(["b", "bz"])
        else:
            assert lm.decode(lm.encode("bz")) == "ba"
