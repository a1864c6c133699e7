"""Decoding with a KV cache: many rows advance together, each distinct prompt is read once, rows can be reordered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import DynamicCache

from .. import text
from ..language_model import LanguageModel
from .chunks import chunk_rows
from .merging import Weights, merged, reading
from .prompts import recalled
from .reading import supports_trees
from .room import make_room
from .scoring import with_bos
from .shared_prompts import SharedPrompts, behind
from .trials import agree, precise, verified
from .tuning import TUNING


class Decoder:
    """The state of R sequences that grow token by token.

    ``contexts`` (U, Lc) are the distinct prompts, and ``index`` (R,) is the number of each row's prompt. ``logits`` (R,
    V) predict each row's next token. `step` appends a token to every row; `select` reorders, repeats or drops rows (as
    SMC resampling does). ``whole``: the contexts already have a bos if they need one.
    """

    @torch.no_grad()
    def __init__(
        self, lm: LanguageModel, contexts: Tensor, index: Tensor, *, share: bool | None = None, whole: bool = False
    ):
        self.lm = lm
        contexts = contexts if whole else with_bos(lm, contexts)
        length = text.length(contexts)  # (U,)
        width = int(length.max())
        # Padded on the left: an attention window counts columns back from a token, and so counts only text.
        position = torch.arange(width, device=length.device) - (width - length)[:, None]  # (U, width)
        ids = contexts.gather(1, position.clamp(min=0))
        padded = bool((length < width).any())
        mask = (position >= 0).long() if padded else None
        places = {"attention_mask": mask, "position_ids": position.clamp(min=0)} if padded else {}
        count = int(length.sum())
        if (past := recalled(lm, contexts, length - 1, exactly=True)) is not None:  # all tokens except the last
            ids, count = ids[:, -1:], len(ids)
            places |= {"past_key_values": past.cache, "position_ids": position[:, -1:]}
        out = lm.forward(ids.clamp(min=0), tokens=count, use_cache=True, logits_to_keep=1, **places)
        # A network without attention has another name for its cache, and needs no mask after the padding is read.
        attends = hasattr(out, "past_key_values")
        self._cache_name = "past_key_values" if attends else "cache_params"
        self.cache = out[self._cache_name]
        self.logits = precise(out.logits[:, -1])[index]  # (R, V)
        self.position = length[index]  # (R,): the position of each row's next token
        self.prompts: SharedPrompts | None = None
        self.mask = None
        self._steps, self._merged = 0, Weights()
        if share is None:
            share = (len(index) - len(contexts)) * width >= TUNING.repeated and shares_prompts(lm)
        if share:
            self.prompts, self.cache = SharedPrompts(self.cache, index, mask), DynamicCache()
            return
        self.mask = mask[index] if mask is not None and attends else None
        if not _identity(index, len(contexts)):
            self.cache.reorder_cache(index)
        make_room(self.cache)

    @torch.no_grad()
    def step(self, tokens: Tensor, alive: int | None = None) -> None:
        """Appends ``tokens`` (R,) or (R, T); ``alive`` is the number of them to count as tokens scored."""
        tokens = tokens.reshape(len(tokens), -1)
        count = tokens.numel() if alive is None else alive
        at_once = tokens.shape[1] == 1 or verified(self.lm, "several_at_once", _several_at_once)
        for some in (tokens,) if at_once else tokens.split(1, 1):
            self._read(some, count)
            count = 0

    def _read(self, tokens: Tensor, count: int) -> None:
        T = tokens.shape[1]
        self._steps += 1
        if self._steps == TUNING.steps_apart + 1:
            self._merged = merged(self.lm)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), T)], 1)
        # A row that has ended advances with the others, but never beyond the network's positions.
        position = self.position[:, None] + torch.arange(T, device=tokens.device)
        if self.lm.max_length is not None:
            position = position.clamp(max=self.lm.max_length - 1)
        out = self.lm.forward(
            tokens,
            tokens=count,
            use_cache=True,
            attention_mask=self.mask,
            position_ids=position,
            logits_to_keep=1,
            within=self._within,
            **{self._cache_name: self.cache},
        )
        self.cache, self.logits = out[self._cache_name], precise(out.logits[:, -1])
        self.position = self.position + T

    @contextmanager
    def _within(self) -> Iterator[None]:
        shared = nullcontext() if self.prompts is None else behind(self.lm.model, self.prompts)
        with reading(self.lm, self._merged), shared:
            yield

    @torch.no_grad()
    def select(self, index: Tensor) -> None:
        """Replaces row r by row ``index[r]``."""
        if _identity(index, len(self.position)):
            return
        self.cache.reorder_cache(index)
        if self.prompts is not None:
            self.prompts.select(index)
        self.logits, self.position = self.logits[index], self.position[index]
        self.mask = None if self.mask is None else self.mask[index]


def _identity(index: Tensor, n: int) -> bool:
    return len(index) == n and bool((index == torch.arange(n, device=index.device)).all())


def _several_at_once(lm: LanguageModel) -> bool:
    """Returns whether two tokens in one pass give the same as two passes; some recurrent networks need single steps."""
    ids = torch.randint(lm.vocab_size, (2, 5), generator=torch.Generator().manual_seed(0)).to(lm.device)
    together, apart = (Decoder(lm, ids[:, :3], torch.arange(2, device=lm.device)) for _ in range(2))
    together._read(ids[:, 3:], 0)
    for t in (3, 4):
        apart._read(ids[:, t : t + 1], 0)
    return agree(lm, together.logits, apart.logits, 1e-3)


def rows_at_once(lm: LanguageModel, prompts: Tensor, tokens: int) -> int:
    """Returns how many rows that continue ``prompts`` (U, A) by ``tokens`` tokens fit the token budget."""
    fewest = chunk_rows(lm, prompts.shape[1] + tokens)
    return max(fewest, chunk_rows(lm, tokens) - prompts.numel() // tokens) if shares_prompts(lm) else fewest


def shares_prompts(lm: LanguageModel) -> bool:
    """Returns whether attention to a single copy of a prompt gives this network's own logits."""
    return supports_trees(lm) and verified(lm, "shared_prompts", _shared)


def _shared(lm: LanguageModel) -> bool:
    ids = torch.randint(lm.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0)).to(lm.device)
    contexts, index = ids[:, :4].clone(), torch.tensor([0, 1, 0], device=lm.device)
    contexts[0, 2:] = text.PAD
    shared, apart = (Decoder(lm, contexts, index, share=share) for share in (True, False))
    for t, swapped in ((4, [2, 0, 1]), (5, [0, 0, 2])):
        for each in (shared, apart):
            each.step(ids[:, t][index])
            each.select(torch.tensor(swapped, device=lm.device))
        if not agree(lm, shared.logits, apart.logits, 1e-3):
            return False
    return True
