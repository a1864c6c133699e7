"""Pyro distributions over text."""

from .autoregressive import AutoregressiveText
from .completion import Completion
from .next_token import NextToken
from .table import Table, TextTable
from .token_steps import DeadEnd
from .unmasking import Unmasking

__all__ = ["AutoregressiveText", "Completion", "DeadEnd", "NextToken", "Table", "TextTable", "Unmasking"]
