"""Tiny randomly initialised masked language models, and what `Unmasking` computes once more by plain loops."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny import LETTERS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, DistilBertConfig, ModernBertConfig, PreTrainedTokenizerFast

from lmppl import MaskedLanguageModel

ARCHITECTURES = ("bert", "distilbert", "modernbert", "roberta")


def masked_tokenizer(vocab: int = 6, framed: bool = False) -> PreTrainedTokenizerFast:
    """One token a character: pad (0), mask (1), [CLS] and [SEP] where framed, and letters up to `vocab` tokens."""
    special = ["<pad>", "<mask>"] + (["<cls>", "<sep>"] if framed else [])
    ids = {word: i for i, word in enumerate([*special, *LETTERS][:vocab])}
    backend = Tokenizer(models.WordLevel(ids))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    if framed:
        backend.post_processor = processors.TemplateProcessing(
            single="<cls> $A <sep>", special_tokens=[("<cls>", 2), ("<sep>", 3)]
        )
    frame = {"cls_token": "<cls>", "sep_token": "<sep>"} if framed else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", mask_token="<mask>", **frame)


def masked_config(arch: str, vocab: int) -> Any:
    """Layers of width 16 with 2 heads; dropout is on, so that a test notices a network left in train mode."""
    common = {"vocab_size": vocab, "pad_token_id": 0, "max_position_embeddings": 32}
    if arch == "distilbert":
        return DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, **common)
    wide = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **common)
    if arch == "modernbert":
        return ModernBertConfig(**wide, embedding_dropout=0.1, mlp_dropout=0.1, attention_dropout=0.1)
    if arch == "roberta":
        return transformers.RobertaConfig(**wide)
    return BertConfig(**wide)


def masked_lm(
    arch: str = "bert", vocab: int = 6, seed: int = 0, framed: bool = False, dtype: torch.dtype = torch.float64
) -> MaskedLanguageModel:
    """A masked language model whose words are far from evenly distributed, and depend on the order."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForMaskedLM.from_config(masked_config(arch, vocab), dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.4)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.1)
    return MaskedLanguageModel(model, masked_tokenizer(vocab, framed))


def plain_step(
    lm: MaskedLanguageModel, state: list[int], order: str = "random", words: list[int] | None = None
) -> dict[tuple[int, int], Tensor]:
    """log p(position, word) of the next step after one state, by one forward pass of it alone.

    ``words``: those that are allowed; None: all but the mask.
    """
    frame = [ids.tolist() for ids in lm.frame]
    logits = lm.forward(torch.tensor([frame[0] + state + frame[1]])).logits[0, len(frame[0]) :]
    open_ = [i for i, token in enumerate(state) if token == lm.mask_id]
    rest = [w for w in range(lm.vocab_size) if w != lm.mask_id]
    log_words, score = {}, {}
    for i in open_:
        own = torch.stack([logits[i, w] for w in words or rest])
        log_words[i] = dict(zip(words or rest, own - own.logsumexp(0), strict=True))
        score[i] = {
            "random": torch.zeros(()).double(),
            "left-to-right": torch.tensor(0.0 if i == open_[0] else -torch.inf).double(),
            "confidence": max(log_words[i].values()),
            "learned": torch.stack([logits[i, w] for w in rest]).logsumexp(0) - logits[i, lm.mask_id],
        }[order]
    total = torch.stack([*score.values()]).logsumexp(0)
    return {(i, w): score[i] - total + log_words[i][w] for i in open_ for w in log_words[i]}


def plain_paths(
    lm: MaskedLanguageModel, canvas: list[int], order: str = "random", words: list[int] | None = None
) -> dict[Any, Tensor]:
    """log p of every path, a tuple of (position, word), one step after another."""
    found, unfinished = {}, {(): torch.zeros(()).double()}
    while unfinished:
        path, log_p = unfinished.popitem()
        state = list(canvas)
        for i, w in path:
            state[i] = w
        if lm.mask_id not in state:
            found[path] = log_p
            continue
        for step, log_step in plain_step(lm, state, order, words).items():
            unfinished[(*path, step)] = log_p + log_step
    return found
