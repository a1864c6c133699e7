"""n-gram language models: random ones, and one whose every prediction is written down."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tiny import tiny_tokenizer

from lmppl import LanguageModel
from lmppl.ngram import NGram, NGramConfig


def ngram_lm(vocab: int = 6, order: int = 1, seed: int = 0, scale: float = 1.0) -> LanguageModel:
    """Random logits of standard deviation ``scale``, in double precision."""
    network = NGram(NGramConfig(vocab_size=vocab, order=order, eos_token_id=0, bos_token_id=0)).double()
    with torch.no_grad():
        network.table.normal_(std=scale, generator=torch.Generator().manual_seed(seed))
    return LanguageModel(network, tiny_tokenizer(vocab))


def written_lm(log_weights: Mapping[tuple[int, ...], torch.Tensor], vocab: int, order: int) -> LanguageModel:
    """After exactly these tokens (at most ``order``) the next one has these log weights (V,)."""
    lm = ngram_lm(vocab, order, scale=0.0)
    with torch.no_grad():
        for context, logits in log_weights.items():
            row = lm.model.rows(torch.tensor([context]))[0, -1]
            lm.model.table[row] = logits
    return lm
