"""Checks of all that the package relies on, on a tiny random network of every family.

    python -m benchmarks.families
    python -m benchmarks.families --only Llama,Mamba

Each number is compared with a plain loop: one forward pass of transformers' own network for each prefix of each text,
alone, without a cache. Networks are in float64 if they allow it. *Differs by* is the largest difference between
log-probabilities, including those of draws and rewards. A family is named after its configuration, without "Config".
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
import transformers
import typer
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.paper.study import markdown
from lmppl import LanguageModel, text
from lmppl.distributions import Completion
from lmppl.engine.decoding import Decoder, shares_prompts
from lmppl.engine.reading import supports_trees
from lmppl.engine.recomputing import decoder
from lmppl.text import PAD

V, WINDOW, TOLERANCE = 11, 4, 1e-4
SHAPE = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": None,
}
GROUPED = {**SHAPE, "num_key_value_heads": 1}
GPT = {**SHAPE, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 32, "n_ctx": 64}
EXPERTS = {
    "num_experts": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "decoder_sparse_step": 1,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "qk_head_dim": 8,
    "v_head_dim": 8,
}
HEADS = {"head_dim": 8}
MAMBA = {"state_size": 4, "n_groups": 1, "head_dim": 8, "num_heads": 4, "expand": 2, "chunk_size": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2": GPT,
    "OpenAIGPT": GPT,
    "GPTNeo": {**SHAPE, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "GPTNeoX": SHAPE,
    "GPTJ": {**GPT, "rotary_dim": 4},
    "CodeGen": {**GPT, "num_attention_heads": 4, "n_head": 4, "rotary_dim": 4},
    "GPTBigCode": GPT,
    "OPT": {**SHAPE, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "Bloom": GPT,
    "Mpt": {**SHAPE, "d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64},
    "Falcon": SHAPE,
    "Llama": GROUPED,
    "Llama4Text": {**GROUPED, **HEADS, **EXPERTS, "intermediate_size_mlp": 32, "attention_chunk_size": 8},
    "Mistral": {**GROUPED, "sliding_window": WINDOW},
    "Mixtral": {**GROUPED, **EXPERTS},
    "Qwen2": GROUPED,
    "Qwen2Moe": {**GROUPED, **EXPERTS},
    "Qwen3": {**GROUPED, **HEADS},
    "Qwen3Moe": {**GROUPED, **HEADS, **EXPERTS},
    "Qwen3Next": {**GROUPED, **HEADS, **EXPERTS, **LINEAR},
    "Gemma": {**GROUPED, **HEADS},
    "Gemma2": {**GROUPED, **HEADS, **WINDOWS, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "Gemma3Text": {**GROUPED, **HEADS, **WINDOWS},
    "RecurrentGemma": {**GROUPED, **HEADS, "num_hidden_layers": 3, "attention_window_size": WINDOW, "lru_width": 16},
    "Phi": SHAPE,
    "Phi3": GROUPED,
    "StableLm": GROUPED,
    "Olmo": GROUPED,
    "Olmo2": GROUPED,
    "Olmoe": {**GROUPED, **EXPERTS},
    "Cohere": GROUPED,
    "Cohere2": {**GROUPED, **WINDOWS},
    "Granite": GROUPED,
    "GraniteMoe": {**GROUPED, **EXPERTS},
    "SmolLM3": {**GROUPED, "no_rope_layers": [1, 0]},
    "Starcoder2": GROUPED,
    "DeepseekV3": {**SHAPE, "num_key_value_heads": 2, **LATENT},
    "Glm": {**GROUPED, **HEADS},
    "Glm4": {**GROUPED, **HEADS},
    "GptOss": {**GROUPED, **HEADS, **EXPERTS, **WINDOWS},
    "Nemotron": GROUPED,
    "Exaone4": {**GROUPED, **HEADS, **WINDOWS},
    "Ernie4_5": {**GROUPED, **HEADS},
    "HunYuanDenseV1": {**GROUPED, **HEADS},
    "Olmo3": {**GROUPED, **WINDOWS},
    "Arcee": GROUPED,
    "Apertus": GROUPED,
    "Helium": {**GROUPED, **HEADS},
    "Persimmon": SHAPE,
    "Phimoe": {**GROUPED, **EXPERTS},
    "DeepseekV2": {**SHAPE, "num_key_value_heads": 2, **LATENT, "topk_method": "greedy"},
    "Glm4Moe": {**GROUPED, **HEADS, **LATENT, "n_shared_experts": 1},
    "SeedOss": {**GROUPED, **HEADS},
    "Ministral": {**GROUPED, **HEADS, **WINDOWS},
    "NanoChat": GROUPED,
    "FalconMamba": {**SHAPE, "state_size": 4},
    "FalconH1": {**GROUPED, **HEADS, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4},
    "Jamba": {**GROUPED, **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "ModernBertDecoder": {**GROUPED, "pad_token_id": 1, "local_attention": 8, "global_attn_every_n_layers": 2},
    "Lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "Bamba": {
        **GROUPED,
        "attn_layer_indices": [1],
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 4,
    },
    "Mamba": {**SHAPE, "state_size": 4},
    "Mamba2": {**SHAPE, **MAMBA},
    "Rwkv": {**SHAPE, "context_length": 64},
    "BertGeneration": {**SHAPE, "is_decoder": True},
    "Bert": {**SHAPE, "is_decoder": True},
    "XGLM": {**SHAPE, "d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 32},
    "BioGpt": SHAPE,
}


def language_model(family: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A tiny random network of a family, whose distributions are far from uniform; in `dtype` where it runs so."""
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    try:
        model(torch.zeros(1, 2, dtype=torch.long))
    except RuntimeError:  # somewhere it computes in float32
        model.float()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.4)
    return LanguageModel(model, _tokenizer())


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<eos>", *"abcdefghij"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


# The plain loop -------------------------------------------------------------------------------------------------------


def plainly(lm: LanguageModel, prompt: list[int], z: list[int], max_tokens: int) -> Tensor:
    """log p of each token of a text that ends with eos (0), one forward pass a token."""
    found = []
    for t, token in enumerate(z):
        if t == max_tokens:  # the stop is certain
            found.append(torch.zeros((), dtype=lm.dtype))
            continue
        ids = torch.tensor([prompt + z[:t]])
        logits = lm(ids, use_cache=False).logits[0, -1]
        found.append(logits.log_softmax(-1)[token])
    return torch.stack(found)


def ids(z: Tensor) -> list[int]:
    return [i for i in z.tolist() if i != PAD]


def ragged(*lengths: int, seed: int) -> Tensor:
    drawn = torch.randint(1, V, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return drawn.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], PAD)


PROMPTS, STOP = ragged(6, 1, 3, 9, seed=1), torch.tensor([0])
TEXTS = text.cat(ragged(2, 8, 5, 7, seed=2), STOP)


# What is asked --------------------------------------------------------------------------------------------------------


def scores(lm: LanguageModel) -> float:
    """Log-probabilities of tokens and of stopped prefixes, of unequal prompts and texts in one batch."""
    fn = Completion(lm, PROMPTS, max_tokens=8)
    with torch.no_grad():
        by_token, by_prefix = fn.token_log_probs(TEXTS), fn.prefix_log_probs(TEXTS)
        worst = 0.0
        for n, z in enumerate(TEXTS):
            expected = plainly(lm, ids(PROMPTS[n]), ids(z), 8)
            worst = max(worst, float((by_token[n, : len(expected)] - expected).abs().max()))
            for t in (0, 1, len(expected) - 1):
                stopped = plainly(lm, ids(PROMPTS[n]), [*ids(z)[:t], 0], 8).sum()
                worst = max(worst, float((by_prefix[n, t] - stopped).abs()))
    return worst


def draws(lm: LanguageModel) -> float:
    """What cached steps drew, alone and in a batch, scored by the plain loop."""
    fn = Completion(lm, PROMPTS, max_tokens=8)
    worst = 0.0
    with torch.no_grad():
        for rows in (fn, Completion(lm, PROMPTS[3], max_tokens=8)):
            z, log_prob = rows.sample_and_log_prob((3,))
            worst = max(worst, float((rows.log_prob(z) - log_prob).abs().max()))
            prompts, z, log_prob = (
                rows.prompt.expand(*z.shape[:-1], -1).flatten(0, -2),
                z.flatten(0, -2),
                log_prob.flatten(),
            )
            for prompt, one, found in zip(prompts, z, log_prob, strict=True):
                worst = max(worst, float((plainly(lm, ids(prompt), ids(one), 8).sum() - found).abs()))
    return worst


def rewards(lm: LanguageModel) -> float:
    """log p of what is observed after every prefix of two texts, as a GFlowNet's reward."""
    context = text.cat(PROMPTS[3], text.prefixes(ragged(5, 4, seed=3), stop=0))  # (P, 2, L)
    context = context.masked_fill(context == 0, PAD)
    y = text.cat(ragged(3, seed=4)[0], STOP)
    with torch.no_grad():
        found = Completion(lm, context, max_tokens=6).log_prob(y).flatten()
        expected = torch.stack([plainly(lm, ids(c), ids(y), 6).sum() for c in context.flatten(0, 1)])
    return float((found - expected).abs().max())


def adapters(lm: LanguageModel) -> float:
    """The gradient of an all-linear LoRA, relative to the plain loop's largest."""
    view = lm.with_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    loss = Completion(view, PROMPTS, max_tokens=8).log_prob(TEXTS).sum()
    plain = torch.stack([plainly(view, ids(p), ids(z), 8).sum() for p, z in zip(PROMPTS, TEXTS, strict=True)]).sum()
    parameters = view.trainable_parameters()
    pairs = zip(*(torch.autograd.grad(x, parameters, allow_unused=True) for x in (loss, plain)), strict=True)
    worst = largest = 0.0
    for a, b in pairs:
        if a is not None and b is not None:
            worst, largest = max(worst, float((a - b).abs().max())), max(largest, float(b.abs().max()))
    return worst / largest


def saved(lm: LanguageModel) -> float:
    """The network's logits once it is saved and loaded."""
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        lm.save_pretrained(directory)
        again = LanguageModel.from_pretrained(directory, dtype=lm.dtype)
        return float((again(PROMPTS[3][None]).logits - lm(PROMPTS[3][None]).logits).abs().max())


CHECKS: dict[str, Callable[[LanguageModel], float]] = {
    "scores": scores,
    "draws": draws,
    "rewards": rewards,
    "all-linear LoRA": adapters,
    "save, load": saved,
}


def row(family: str) -> Iterator[str]:
    """One line of the table."""
    yield family
    try:
        lm = language_model(family)
    except Exception as error:
        yield from ("", "", *[""] * len(CHECKS), f"not built: {_line(error)}")
        return
    worst, notes, found = 0.0, [], []
    for name, check in CHECKS.items():
        try:
            difference = check(lm)
        except Exception as error:
            found.append("no")
            notes.append(f"{name}: {_line(error)}")
            continue
        worst = max(worst, difference)
        found.append("yes" if difference < TOLERANCE else "no")
        if difference >= TOLERANCE:
            notes.append(f"{name}: differs by {difference:.1g}")
    single = language_model(family, torch.float32)  # what is found by trial, as it is found in everyday use
    packed = "yes" if supports_trees(single) and shares_prompts(single) else "a row a text"
    steps = decoder(single, PROMPTS, torch.arange(len(PROMPTS)))
    yield from (packed, "yes" if isinstance(steps, Decoder) else "reads anew", *found)
    exact = "float64" if lm.dtype == torch.float64 else "float32"
    yield "; ".join([f"{worst:.0e} in {exact}", *notes])


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def main(only: Annotated[str, typer.Option(help="Families, by comma.")] = "") -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    families = [f for f in FAMILIES if not only or f in only.split(",")]
    header = ["family", "packed", "cached", *CHECKS, "differs by"]
    rows = []
    for family in families:
        rows.append([*row(family)])
        print(" | ".join(rows[-1]), flush=True)
    print("\n" + markdown(header, rows))


if __name__ == "__main__":
    typer.run(main)
