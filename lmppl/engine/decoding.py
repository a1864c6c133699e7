"""Decoding: a KV cache that steps many rows together, with each distinct prompt prefilled once and rows reordered."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import text
from ..language_model import LanguageModel
from .scoring import with_bos


class Decoder:
    """The state of R sequences that grow token by token.

    ``contexts`` (U, Lc) are the distinct prompts and ``index`` (R,) says which one each row continues.  ``logits``
    (R, V) predict each row's next token; `step` appends a token to every row; `select` reorders, repeats or drops rows
    (SMC resampling).
    """

    @torch.no_grad()
    def __init__(self, lm: LanguageModel, contexts: Tensor, index: Tensor):
        self.lm = lm
        contexts = with_bos(lm, contexts)
        length = text.length(contexts)  # (U,)
        contexts = contexts[:, : int(length.max())]
        last = length - 1
        uniform = bool((length == contexts.shape[1]).all())
        keep = torch.unique(last)
        out = lm.forward(
            contexts.clamp(min=0), tokens=int(length.sum()), use_cache=True, logits_to_keep=keep if not uniform else 1
        )
        self.cache = out.past_key_values
        at = torch.searchsorted(keep, last) if not uniform else torch.zeros_like(last)
        self.logits = out.logits[torch.arange(len(last), device=last.device), at][index]  # (R, V)
        self.position = length[index]  # (R,): where each row's next token goes
        self.mask = None if uniform else (contexts != text.PAD).long()[index]
        if not _identity(index, len(contexts)):
            self.cache.reorder_cache(index)

    @torch.no_grad()
    def step(self, tokens: Tensor, alive: int | None = None) -> None:
        """Append ``tokens`` (R,) or (R, T); ``alive`` of them still matter, for the count of tokens scored."""
        tokens = tokens.reshape(len(tokens), -1)
        T = tokens.shape[1]
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), T)], 1)
        out = self.lm.forward(
            tokens,
            tokens=tokens.numel() if alive is None else alive,
            past_key_values=self.cache,
            use_cache=True,
            attention_mask=self.mask,
            position_ids=self.position[:, None] + torch.arange(T, device=tokens.device),
            logits_to_keep=1,
        )
        self.cache, self.logits = out.past_key_values, out.logits[:, -1]
        # A row that has ended goes on with its neighbours, but never past the positions that the network knows.
        self.position = self.position + T
        if self.lm.max_length is not None:
            self.position = self.position.clamp(max=self.lm.max_length - 1)

    @torch.no_grad()
    def select(self, index: Tensor) -> None:
        """Row r becomes row ``index[r]``."""
        if _identity(index, len(self.position)):
            return
        self.cache.reorder_cache(index)
        self.logits, self.position = self.logits[index], self.position[index]
        self.mask = None if self.mask is None else self.mask[index]


def _identity(index: Tensor, n: int) -> bool:
    return len(index) == n and bool((index == torch.arange(n, device=index.device)).all())
