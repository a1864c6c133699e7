"""Networks that read long texts with other factors than short ones (LongRoPE): which view reads which text.

The probability of a token is what the network returns when it reads the text before it and nothing else. Up to a
certain length it uses the factors of short texts; one token later, it reads everything anew with those of long texts.
So a text that crosses this length is read twice: for the predictions of its first tokens, and for those of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..language_model import LanguageModel


def by_length(lm: LanguageModel, length: Tensor) -> list[tuple[LanguageModel, Tensor]]:
    """Returns the views that read texts of these lengths, the one for short texts first, and which texts each reads."""
    turn = lm.network.rotary.turn
    if turn is None or lm.long is not None:
        return [(lm, torch.ones_like(length, dtype=torch.bool))]
    views = (lm.reading(long=False), length <= turn), (lm.reading(long=True), length > turn)
    return [(view, which) for view, which in views if bool(which.any())]
