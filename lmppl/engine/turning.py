"""Decoding with networks that read long texts with other factors than short ones (`views`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import text
from ..language_model import LanguageModel
from ..rows import distinct_rows
from .decoding import Decoder
from .scoring import with_bos
from .views import by_length


class Turning:
    """The same as `Decoder`: one decoder for short rows, and another for all rows as soon as one of them is long."""

    def __init__(self, lm: LanguageModel, contexts: Tensor, index: Tensor):
        self.lm = lm
        self.tokens = with_bos(lm, contexts)[index]  # (R, W), right-padded
        self.length = text.length(self.tokens)
        self.decoders: dict[bool | None, Decoder] = {}  # by whether they read long texts
        self._provide()

    def _provide(self) -> None:
        """Creates the decoders that the rows' lengths need, and drops the others."""
        views = [view for view, _ in by_length(self.lm, self.length)]
        for view in views:
            if view.long not in self.decoders:
                tokens = self.tokens if view.long else self.tokens[:, : view.max_length]
                rows, index = distinct_rows(tokens)
                self.decoders[view.long] = Decoder(view, rows, index, whole=True)
        self.decoders = {view.long: self.decoders[view.long] for view in views}

    @property
    def logits(self) -> Tensor:
        """(R, V): the logits of each row's next token."""
        found = [decoder.logits for decoder in self.decoders.values()]
        if len(found) == 1:
            return found[0]
        _, is_long = by_length(self.lm, self.length)[1]
        return torch.where(is_long[:, None], found[1], found[0])

    def step(self, tokens: Tensor, alive: int | None = None) -> None:
        """Appends ``tokens`` (R,) or (R, T)."""
        tokens = tokens.reshape(len(tokens), -1)
        for decoder in self.decoders.values():
            decoder.step(tokens, alive)
        self.tokens = text.cat(self.tokens, tokens)
        self.length = self.length + tokens.shape[1]
        self._provide()

    def select(self, index: Tensor) -> None:
        """Replaces row r by row ``index[r]``."""
        for decoder in self.decoders.values():
            decoder.select(index)
        self.tokens, self.length = self.tokens[index], self.length[index]
        self._provide()
