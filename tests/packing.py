"""Watching the engine: scores token by token, packed or plain as the test wants, and the sizes of forward passes."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from lmppl import LanguageModel, text
from lmppl.engine.scoring import score
from lmppl.engine.tuning import TUNING
from lmppl.text import PAD

V = 6


def gather(value: torch.Tensor):
    """A head that keeps log p of each token of ``value`` (*batch, T)."""

    def head(logits, rows):
        flat = value.reshape(-1, value.shape[-1])[rows]
        log_probs = logits.log_softmax(-1).gather(-1, flat.clamp(min=0)[..., None])[..., 0]
        return log_probs.masked_fill(flat == PAD, 0.0)

    return head


def scored(lm: LanguageModel, context: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(*batch, T): log p of every token of ``value`` after ``context``."""
    batch = torch.broadcast_shapes(context.shape[:-1], value.shape[:-1])
    return score(lm, context, value, gather(value.expand(*batch, -1)))


@contextmanager
def packing(always: bool):
    """Pack whenever a tree is there at all, or never."""
    before = TUNING.worthwhile
    TUNING.worthwhile = 1e9 if always else -1.0
    try:
        yield
    finally:
        TUNING.worthwhile = before


@contextmanager
def spied(lm: LanguageModel):
    """The number of tokens of every forward call."""
    sizes: list[int] = []
    forward = type(lm).forward

    def spy(self, input_ids, **kwargs):
        sizes.append(input_ids.numel())
        return forward(self, input_ids, **kwargs)

    type(lm).forward = spy
    try:
        yield sizes
    finally:
        type(lm).forward = forward


def stopped_prefixes(prompt: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """(P, *batch, L): the prompt, then every prefix of z."""
    return text.cat(prompt, text.prefixes(z, stop=0))
