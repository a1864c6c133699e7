"""Networks that read long texts otherwise than short ones (LongRoPE), and which view reads which text.

The law of a token is what the network says that reads the text so far, alone: up to so many tokens with the factors of
short texts, one token later with those of long ones, all of it anew.  So a text that crosses over is read twice: for
what predicts its first tokens, and for what predicts the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..language_model import LanguageModel


def by_length(lm: LanguageModel, length: Tensor) -> list[tuple[LanguageModel, Tensor]]:
    """The views that read texts of these lengths, the one for short texts first, and which of them each reads."""
    turn = lm.network.rotary.turn
    if turn is None or lm.long is not None:
        return [(lm, torch.ones_like(length, dtype=torch.bool))]
    views = (lm.reading(long=False), length <= turn), (lm.reading(long=True), length > turn)
    return [(view, which) for view, which in views if bool(which.any())]
