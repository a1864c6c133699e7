"""Pyro distributions over text."""

from .completion import Completion
from .token_steps import DeadEnd

__all__ = ["Completion", "DeadEnd"]
