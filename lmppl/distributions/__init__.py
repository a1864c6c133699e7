"""Pyro distributions over text."""

from .completion import Completion
from .next_token import NextToken
from .table import Table, TextTable
from .token_steps import DeadEnd

__all__ = ["Completion", "DeadEnd", "NextToken", "Table", "TextTable"]
