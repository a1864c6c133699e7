"""Pyro distributions over text."""

from .completion import Completion
from .next_token import NextToken
from .token_steps import DeadEnd

__all__ = ["Completion", "DeadEnd", "NextToken"]
