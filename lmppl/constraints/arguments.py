"""Checks of the arguments of constraints and of distributions over texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor

from ..language_model import LanguageModel
from ..view import View

V = TypeVar("V", bound=View)


def as_lm(given: Any) -> LanguageModel:
    """Returns a causal language model of this package.

    Raises ValueError for a name, or a network without its tokenizer.
    """
    return as_view(given, LanguageModel)


def as_view(given: Any, kind: type[V]) -> V:
    """Returns a language model of the class ``kind``; raises ValueError as `as_lm` does."""
    if isinstance(given, kind):
        return given
    name = kind.__name__
    if isinstance(given, str):
        raise ValueError(f"lm: expected a {name}, got {given!r}; {name}.from_pretrained loads one")
    raise ValueError(f"lm: expected a {name}, got {type(given).__name__}; wrap a network by {name}(model, tokenizer)")


def as_list(given: Any, name: str, expected: str) -> list[Any]:
    """Returns an iterable as a list; raises ValueError, naming the argument, for a single thing such as a string."""
    alone = isinstance(given, str | bytes) or (isinstance(given, Tensor) and not given.dim())
    if alone or not isinstance(given, Iterable):
        raise ValueError(f"{name}: expected {expected}, got {given!r}")
    return list(given)
