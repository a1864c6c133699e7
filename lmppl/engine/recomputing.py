"""Decoding without a cache, for networks that have none, or one that cannot be padded or reordered."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import text
from ..language_model import LanguageModel
from ..rows import distinct_rows
from .chunks import chunk_rows
from .decoding import Decoder
from .prompts import prompts
from .reading import counts_columns
from .scoring import with_bos
from .trials import agree, precise, verified
from .turning import Turning
from .views import by_length


class Recomputing:
    """The same as `Decoder`, with a pass over every whole sequence at each step."""

    def __init__(self, lm: LanguageModel, contexts: Tensor, index: Tensor):
        self.lm = lm
        self.tokens = with_bos(lm, contexts)[index]  # (R, W), right-padded
        self.alive = len(index)
        self._logits: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """(R, V): the logits of each row's next token."""
        if self._logits is None:
            self._logits = self._read()
        return self._logits

    @torch.no_grad()
    def _read(self) -> Tensor:
        rows, inverse = distinct_rows(self.tokens)
        last = text.length(rows) - 1
        parts = [
            (view, chunk)
            for view, which in by_length(self.lm, last + 1)
            for chunk in which.nonzero()[:, 0].split(chunk_rows(self.lm, rows.shape[1]))
        ]
        found = []
        for view, chunk in parts:
            length = int(last[chunk].max()) + 1
            out = view.forward(rows[chunk, :length].clamp(min=0), tokens=int((last[chunk] + 1).sum()), use_cache=False)
            found.append(out.logits[torch.arange(len(chunk), device=rows.device), last[chunk]])
        order = torch.cat([chunk for _, chunk in parts]).argsort()
        return precise(torch.cat(found))[order[inverse]]

    def step(self, tokens: Tensor, alive: int | None = None) -> None:
        """Appends ``tokens`` (R,) or (R, T)."""
        self.tokens, self._logits = text.cat(self.tokens, tokens.reshape(len(tokens), -1)), None

    def select(self, index: Tensor) -> None:
        """Replaces row r by row ``index[r]``."""
        self.tokens = self.tokens[index]
        self._logits = None if self._logits is None else self._logits[index]


def decoder(lm: LanguageModel, contexts: Tensor, index: Tensor) -> Decoder | Turning | Recomputing:
    """Returns a cached decoder if it is right for this network, else one without a cache."""
    if not _cache_agrees(lm) or (counts_columns(lm) and len(text.length(contexts).unique()) > 1):
        return Recomputing(lm, contexts, index)
    return (Decoder if lm.network.rotary.turn is None else Turning)(lm, contexts, index)


def _cache_agrees(lm: LanguageModel) -> bool:
    """Returns whether cached steps give this network's own logits."""
    return verified(lm, "cached_decoding", _trial)


def _trial(lm: LanguageModel) -> bool:
    # The decoder reads an adapter's prompts itself; those of the base network are kept. Both cases must be right,
    # because the result of this trial holds for both.
    return all(_agrees(lm, capacity) for capacity in {0, prompts(lm.network).capacity})


def _agrees(lm: LanguageModel, capacity: int) -> bool:
    """Returns whether they do if prompts of ``capacity`` tokens are kept."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocab_size, (2, 6), generator=generator).to(lm.device)
    contexts, swapped = ids[:, :3].clone(), torch.tensor([1, 0], device=lm.device)
    contexts[0, 1:] = text.PAD
    index = torch.tensor([0, 1], device=lm.device)
    with prompts(lm.network).aside(capacity):
        cached, whole = Decoder(lm, contexts, index), Recomputing(lm, contexts, index)
    for t in range(3, 6):
        for each in (cached, whole):
            each.step(ids[:, t])
            each.select(swapped)
        if bool(whole.logits.isnan().any()):  # damaged weights say nothing about the cache
            return True
        if not agree(lm, cached.logits, whole.logits, 1e-3):
            return False
    return True
