"""A distribution over texts written down as a table: an exact posterior, or a guide with one logit per text."""

from __future__ import annotations

import torch
from torch import Tensor

from lmppl import LanguageModel
from lmppl.distributions import TextTable


def Table(lm: LanguageModel, support: Tensor, logits: Tensor, stop: int = 0) -> TextTable:
    """p(text k) = softmax(logits)_k; ``support`` (K, E) holds complete texts that end with ``stop``."""
    return TextTable(lm, support, logits, torch.tensor([stop]))
