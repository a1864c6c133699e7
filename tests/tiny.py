"""Tiny randomly initialised language models, small enough to enumerate."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import torch
import transformers
from paths import SHARED
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from lmppl import LanguageModel
from lmppl.distributions import Completion

ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3", "neox")
GPT2 = SHARED / "lms" / "gpt2-tokenizer"  # a real tokenizer, where there is one
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tiny_tokenizer(vocab: int = 8, pad_is_eos: bool = True, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a character: eos (0), then pad (1) and bos where asked for, ".", and letters up to `vocab` tokens.

    Any other character is read as an "a".
    """
    special = ["<eos>"] + ([] if pad_is_eos else ["<pad>"]) + (["<bos>"] if add_bos else [])
    words = special + ["."] + list(LETTERS)
    if len(special) + 2 > vocab or vocab > len(words):
        raise ValueError(f"vocab={vocab} must lie between {len(special) + 2} and {len(words)}")
    ids = {word: i for i, word in enumerate(words[:vocab])}
    backend = Tokenizer(models.WordLevel(ids))
    backend.normalizer = normalizers.Replace(Regex(f"[^{''.join(words[len(special) : vocab])}]"), "a")
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    from tokenizers import decoders, processors

    backend.decoder = decoders.Fuse()
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        bos_token="<bos>" if add_bos else None,
        pad_token="<eos>" if pad_is_eos else "<pad>",
    )


def tiny_config(arch: str, vocab: int, max_length: int = 64, layers: int = 2) -> transformers.PreTrainedConfig:
    """Layers of width 16 with 2 heads; dropout is on, so that a test notices a network left in train mode."""
    common = {
        "vocab_size": vocab,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": max_length,
        "eos_token_id": 0,
        "bos_token_id": 0,
        "pad_token_id": None,
    }
    grouped = {**common, "num_key_value_heads": 1, "attention_dropout": 0.1}
    if arch == "gpt2":
        return GPT2Config(
            vocab_size=vocab,
            n_embd=16,
            n_layer=layers,
            n_head=2,
            n_positions=max_length,
            bos_token_id=0,
            eos_token_id=0,
        )
    if arch == "llama":
        return LlamaConfig(**grouped, tie_word_embeddings=False)
    if arch == "qwen2":
        return Qwen2Config(**grouped, tie_word_embeddings=True)
    if arch == "qwen3":
        return Qwen3Config(**grouped, head_dim=8, tie_word_embeddings=True)
    if arch == "neox":
        return GPTNeoXConfig(**common, hidden_dropout=0.1, attention_dropout=0.1)
    raise ValueError(f"arch={arch!r} is none of {ARCHITECTURES}")


def adapter(lm: LanguageModel, seed: int, r: int = 4, std: float = 0.1) -> LanguageModel:
    """An adapter that is not its base model."""
    view = lm.with_adapter(LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in view.trainable_parameters():
            p.normal_(std=std, generator=generator)
    return view


@cache
def _prototype(
    arch: str, vocab: int, seed: int, layers: int, dtype: torch.dtype, max_length: int, default: torch.dtype
) -> Any:
    """The network of a `tiny_lm`; ``default`` is the precision of what is not given one (see `precision.double`)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(arch, vocab, max_length, layers), dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.4)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model


@cache
def _facts(
    arch: str, vocab: int, layers: int, dtype: torch.dtype, max_length: int, default: torch.dtype
) -> dict[str, bool]:
    """What trials show of such a network, whatever its seed."""
    lm = LanguageModel(deepcopy(_prototype(arch, vocab, 0, layers, dtype, max_length, default)), tiny_tokenizer(vocab))
    with torch.random.fork_rng():
        d = Completion(lm, torch.tensor([1, 1]), max_tokens=2)
        d.log_prob(d.sample((2,)))
    return dict(lm.network.facts)


def tiny_lm(
    arch: str = "gpt2",
    vocab: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    pad_is_eos: bool = True,
    add_bos: bool = False,
    max_length: int = 64,
    tried: bool = True,
    layers: int = 2,
) -> LanguageModel:
    """A language model whose next-token distributions are far from uniform.

    ``tried``: what trials show of a network (cached decoding, tree attention, ...) is known, from another of its kind.
    """
    kind = layers, dtype, max_length, torch.get_default_dtype()
    lm = LanguageModel(deepcopy(_prototype(arch, vocab, seed, *kind)), tiny_tokenizer(vocab, pad_is_eos, add_bos))
    if tried:
        lm.network.facts.update(_facts(arch, vocab, *kind))
    return lm


def flat_lm(*args: Any, **kwargs: Any) -> LanguageModel:
    """A `tiny_lm` of one layer: where a network is only what probabilities come from, and half as many are as good."""
    return tiny_lm(*args, layers=1, **kwargs)
