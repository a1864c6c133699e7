"""Pyro distributions over text: samples and values are texts, LongTensors of token ids padded on the right with -1.

`Completion` is the one that most programs need. `docs/extending.md` shows how to write your own.
"""

from .autoregressive import AutoregressiveText
from .completion import Completion
from .composed import TextMixture, TextProduct
from .next_token import NextToken
from .table import Table, TextTable
from .token_steps import DeadEnd
from .unmasking import Unmasking

__all__ = [
    "AutoregressiveText",
    "Completion",
    "DeadEnd",
    "NextToken",
    "Table",
    "TextMixture",
    "TextProduct",
    "TextTable",
    "Unmasking",
]
