"""A tiny Llama and its byte-level tokenizer as one GGUF file, written as llama.cpp's converter would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he"]
TOKENS = CONTROL + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUANTISED = gguf.GGMLQuantizationType.Q8_0
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Two layers of width 32, whose matrices are numbers that 8-bit blocks hold exactly."""
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.4, generator=generator)
            if weight.dim() > 1:
                weight.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), QUANTISED), QUANTISED)))
    return model


def write(
    path: Path,
    model: LlamaForCausalLM,
    architecture: str = "llama",
    quantised: bool = True,
    strings: Mapping[str, str] | None = None,
    vectors: Mapping[str, Any] | None = None,
    leave_out: str = "nothing",
) -> Path:
    """The model, with further metadata and tensors if asked for, and without those of a name."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in CONTROL else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    for role, name in {"bos": 1, "eos": 2, "unk": 0, "pad": 2}.items():
        getattr(writer, f"add_{role}_token_id")(name)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for key, text in (strings or {}).items():
        writer.add_string(key, text)
    tensors = {
        _name(key): _order(key, weight, config) for key, weight in model.state_dict().items() if "lm_h" not in key
    }
    for name, tensor in {**tensors, **(vectors or {})}.items():
        if leave_out in name:
            continue
        if quantised and tensor.ndim > 1:
            writer.add_tensor(name, gguf.quantize(tensor, QUANTISED), raw_dtype=QUANTISED)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name(key: str) -> str:
    if not key.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[key]
    layer, part = key.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{NAMES[part]}.weight"


def _order(key: str, weight: torch.Tensor, config: LlamaConfig) -> np.ndarray:
    """llama.cpp rotates neighbouring numbers of a head, transformers those half a head apart."""
    array = weight.numpy()
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if part in key:
            halves = array.reshape(heads, 2, -1, array.shape[1])  # (head, half, pair, width)
            array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
    return array
