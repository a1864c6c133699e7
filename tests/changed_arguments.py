"""Each argument of `Completion` at a value that matters, so that a test can ask who has heard of it."""

from __future__ import annotations

import inspect
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.text import PAD


def after_a(text: str) -> str | None:
    """A tool: a "b" comes after an "a"."""
    return "b" if text.endswith("a") else None


PLAIN: dict[str, Any] = {"max_tokens": 3}
CHANGED: dict[str, list[Any]] = {
    "max_tokens": [2, torch.tensor([1, 3])],
    "min_tokens": [1, torch.tensor([0, 2])],
    "stop": [".", ["eos", "."], ["eos", "ab"], None],
    "allowed": [[0, 1, 2], lambda prefix: torch.arange(4) != (prefix[:, -1:] if prefix.shape[1] else 3)],
    "temperature": [0.5, torch.tensor([0.5, 2.0])],
    "tools": [(after_a,)],
}
CASES = [(name, i) for name, values in CHANGED.items() for i in range(len(values))]
NO_RULE = {"lm", "prompt", "validate_args"}  # whose texts these are, and whether they are checked
# A new argument needs a value here, and the tests then say where it was forgotten.
assert set(inspect.signature(Completion).parameters) == NO_RULE | set(CHANGED)


def changed(lm: LanguageModel, name: str, i: int) -> Completion:
    """Of a tiny model with the tokens eos, ".", "a", "b": texts after two prompts."""
    return Completion(lm, torch.tensor([[2, PAD], [3, 2]]), **PLAIN | {name: CHANGED[name][i]})


def plain(lm: LanguageModel) -> Completion:
    return Completion(lm, torch.tensor([[2, PAD], [3, 2]]), **PLAIN)


def all_texts() -> Tensor:
    """Of up to four tokens, stops anywhere: (K, 1, 4)."""
    rows = [list(z) + [PAD] * (4 - n) for n in range(5) for z in product(range(4), repeat=n)]
    return torch.tensor(rows)[:, None]
