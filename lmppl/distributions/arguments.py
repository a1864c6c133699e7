"""What distributions over texts ask of their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import text
from ..language_model import LanguageModel


def as_text(lm: LanguageModel, given: Tensor | str | list[Any], name: str) -> Tensor:
    """A text, or the documents that strings begin; ValueError naming the argument for anything else."""
    if not isinstance(given, Tensor):
        try:
            given = lm.encode(given, start=True)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    text.validate(given, name, lm.vocab_size)
    return given.to(lm.device)


def as_count(value: int | Tensor, name: str, device: torch.device) -> Tensor:
    """A LongTensor of numbers of tokens; ValueError naming the argument for anything else."""
    count = torch.as_tensor(value, device=device)
    if count.is_floating_point() or count.dtype == torch.bool or bool((count < 0).any()) or not count.numel():
        raise ValueError(f"{name}: expected a non-negative integer or a LongTensor of them, got {value!r}")
    return count


def refuse_nan(log_probs: Tensor) -> None:
    """ValueError where a network's log-probabilities are NaN."""
    if bool(log_probs.isnan().any()):
        raise ValueError("lm: the network's logits are NaN; its weights are damaged or its dtype overflows")
