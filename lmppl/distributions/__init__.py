"""Pyro distributions over text."""

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
