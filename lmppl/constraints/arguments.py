"""What constraints, and distributions over texts, ask of their arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..language_model import LanguageModel


def as_lm(given: Any) -> LanguageModel:
    """A language model of this package; ValueError for a name, or a network without its tokenizer."""
    if isinstance(given, LanguageModel):
        return given
    if isinstance(given, str):
        raise ValueError(f"lm: expected a LanguageModel, got {given!r}; LanguageModel.from_pretrained loads one")
    raise ValueError(
        f"lm: expected a LanguageModel, got {type(given).__name__}; wrap a network by LanguageModel(model, tokenizer)"
    )


def as_list(given: Any, name: str, expected: str) -> list[Any]:
    """What is given one after another; ValueError naming the argument for one thing alone, a text among them."""
    alone = isinstance(given, str | bytes) or (isinstance(given, Tensor) and not given.dim())
    if alone or not isinstance(given, Iterable):
        raise ValueError(f"{name}: expected {expected}, got {given!r}")
    return list(given)
