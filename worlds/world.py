"""What a language model is built of: what it reads, how it is judged, and its size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .tokenizer import WORD


class World(NamedTuple):
    """Everything that decides the weights besides the seed, and the report on them."""

    words: tuple[str, ...]
    rows: Callable[[Random, Callable[[str], list[int]], int], Iterator[list[int]]]  # (random, encode, width)
    report: Callable[[PreTrainedModel, PreTrainedTokenizerFast, int], object]  # over so many test observations
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
