"""Pyro distributions over text."""

from .autoregressive import AutoregressiveText
from .completion import Completion
from .next_token import NextToken
from .table import Table, TextTable
from .token_steps import DeadEnd

__all__ = ["AutoregressiveText", "Completion", "DeadEnd", "NextToken", "Table", "TextTable"]
