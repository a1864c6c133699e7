"""What a language model is built of (what it reads, its size), and what it must show before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .tokenizer import WORD


class Gate(NamedTuple):
    """A figure, and the bounds within which it must be."""

    what: str
    value: float
    least: float = -math.inf
    most: float = math.inf

    def __str__(self) -> str:
        asked = [f"at {w} {b:g}" for w, b in (("least", self.least), ("most", self.most)) if math.isfinite(b)]
        return f"{self.what:<44} {self.value:8.4f}" + (f"  ({', '.join(asked)})" if asked else "")


class Report(dict[str, Gate]):
    """Gates by name."""

    @property
    def passed(self) -> bool:
        return all(gate.least <= gate.value <= gate.most for gate in self.values())

    def __str__(self) -> str:
        return "\n".join([*map(str, self.values()), "passed" if self.passed else "NOT PASSED"])


class World(NamedTuple):
    """Everything that decides the weights besides the seed, and the report on them."""

    words: tuple[str, ...]
    rows: Callable[[Random, Callable[[str], list[int]], int], Iterator[list[int]]]  # (random, encode, width)
    report: Callable[[PreTrainedModel, PreTrainedTokenizerFast, int], Report]  # over so many test observations
    word: str = WORD  # a regular expression
    width: int = 64
    layers: int = 2
    heads: int = 4
    scale: float = 0.02  # standard deviation of the initial weights
    context: int = 128  # tokens in a row, and the longest text that the model reads
    rows_a_step: int = 32
    steps: int = 3200
    learning_rate: float = 4e-3
    warmup: int = 100
    rotary: bool = False  # a Llama instead of a GPT-2
    # A BERT instead, which learns the words under masks: rows (row, token) filled up with eos -> which are masked.
    masks: Callable[[Tensor, PreTrainedTokenizerFast], Tensor] | None = None
