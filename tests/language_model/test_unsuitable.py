"""Networks that are no causal language models, or have no weights, are refused when they are wrapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from tiny import tiny_lm, tiny_tokenizer
from tiny_masked import masked_lm

from lmppl import LanguageModel
from lmppl.adapters import CheckpointError
from lmppl.distributions import Completion

V = 8
IDS = {"vocab_size": V, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
SHAPE = {
    **IDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
WHISPER = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "max_target_positions": 32}
BART = hf.BartConfig(
    **IDS,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    max_position_embeddings=32,
    decoder_start_token_id=0,
)


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE))


def without_values() -> Any:
    model = llama()
    model.model.layers[1].to("meta")
    return model


def in_tuples() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE, return_dict=False))


def quantised() -> Any:
    return torch.ao.quantization.quantize_dynamic(llama().eval(), {torch.nn.Linear}, dtype=torch.qint8)


UNSUITABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "T5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        ),
        "T5ForConditionalGeneration has an encoder",
    ),
    "BART": (lambda: hf.BartForConditionalGeneration(BART), "BartForConditionalGeneration has an encoder"),
    "BERT": (lambda: hf.BertForMaskedLM(hf.BertConfig(**SHAPE)), "BertForMaskedLM reads the tokens that it predicts"),
    "BERT's decoder": (lambda: hf.BertLMHeadModel(hf.BertConfig(**SHAPE)), "is_decoder=True"),
    "XLNet": (
        lambda: hf.XLNetLMHeadModel(hf.XLNetConfig(**IDS, d_model=16, n_layer=2, n_head=2, d_inner=32)),
        "reads the tokens that it predicts",
    ),
    "no head": (lambda: hf.LlamaModel(hf.LlamaConfig(**SHAPE)), "LlamaModel returns .*no language-model head"),
    "a classifier": (
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**SHAPE)),
        r"returns logits \(2, 2\), and logits \(2, 5, 8\)",
    ),
    "a tagger": (lambda: hf.LlamaForTokenClassification(hf.LlamaConfig(**SHAPE)), r"returns logits \(2, 5, 2\)"),
    "a layer without values": (without_values, r"model.layers.1.self_attn.q_proj.weight has no values .*meta"),
    "tuples": (in_tuples, "return_dict = True"),
    "compiled": (lambda: torch.compile(llama(), backend="eager"), r"model.compile\(\)"),
    "quantised": (quantised, "model.layers.0.self_attn.q_proj is quantised"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.ao.quantization
@pytest.mark.parametrize("kind", UNSUITABLE)
def test_what_is_no_causal_language_model_is_refused_each_time(kind):
    make, reason = UNSUITABLE[kind]
    model = make()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"model: .*{reason}"):
            LanguageModel(model, tiny_tokenizer(V))


@pytest.mark.parametrize("error", [AssertionError, ImportError, AttributeError])
def test_a_model_that_cannot_run_here_yet_may_be_wrapped(error):
    """It may be moved to the device of its kernels afterwards."""
    model = llama()

    def kernel(*_: Any) -> None:
        raise error("no such kernel")

    model.register_forward_pre_hook(kernel)
    lm = LanguageModel(model, tiny_tokenizer(V))
    with pytest.raises(error, match="no such kernel"):
        Completion(lm, torch.tensor([[2, 3]]), max_tokens=1).sample()


def test_a_masked_language_model_stays_one():
    lm = masked_lm("bert")
    with pytest.raises(ValueError, match="MaskedLanguageModel"):
        LanguageModel(lm.model, lm.tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_in_the_manner_of_bert_is_accepted_and_the_trial_costs_nothing(dtype):
    model = hf.BertLMHeadModel(hf.BertConfig(**SHAPE, is_decoder=True, initializer_range=0.5)).to(dtype)
    assert LanguageModel(model, tiny_tokenizer(V)).tokens_scored == 0


def test_the_decoder_of_an_encoder_decoder_checkpoint_is_no_language_model(tmp_path):
    tiny_tokenizer(V).save_pretrained(tmp_path)
    hf.BartForConditionalGeneration(BART).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="encoder-decoder model .BartForConditionalGeneration"):
        LanguageModel.from_pretrained(tmp_path)
    hf.BartForCausalLM(BART).save_pretrained(tmp_path)  # trained as one
    assert LanguageModel.from_pretrained(tmp_path).vocab_size == V


def test_a_network_that_needs_a_cache_to_be_asked_for_is_no_other():
    """``use_cache=False`` in the configuration, and compilation in place, change no number."""
    plain, asked = tiny_lm("llama", dtype=torch.float32), tiny_lm("llama", dtype=torch.float32)
    asked.model.config.use_cache = False
    asked.model.compile(backend="eager")
    prompt = torch.tensor([[2, 3, 4]])
    z, log_prob = Completion(asked, prompt, max_tokens=3).sample_and_log_prob((4,))
    expected = Completion(plain, prompt, max_tokens=3).log_prob(z)
    assert (log_prob - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("model", "longest"),
    [
        (lambda: hf.RobertaForCausalLM(hf.RobertaConfig(**{**SHAPE, "pad_token_id": 1}, is_decoder=True)), 30),
        (lambda: hf.OPTForCausalLM(hf.OPTConfig(**SHAPE, ffn_dim=32, word_embed_proj_dim=16)), 32),
        (lambda: hf.BartForCausalLM(BART), 32),
        (lambda: hf.WhisperForCausalLM(hf.WhisperConfig(**IDS, **WHISPER)), 32),
    ],
)
def test_the_context_is_as_long_as_its_positions(model, longest):
    """RoBERTa's begin after that of padding: of its 32 positions it reads 30."""
    lm = LanguageModel(model().double(), tiny_tokenizer(V))
    assert lm.max_length == longest
    ids = torch.full((1, longest + 1), 3)
    assert lm.forward(ids[:, :-1], use_cache=False).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        lm.forward(ids, use_cache=False)
    z = Completion(lm, ids[:, : longest - 2], max_tokens=2, stop=None).sample()
    assert z.shape == (1, 2)
    with pytest.raises(ValueError, match=f"context holds {longest}"):
        Completion(lm, ids[:, : longest - 1], max_tokens=2, stop=None)
