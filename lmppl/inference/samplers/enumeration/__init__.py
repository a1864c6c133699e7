"""The exact posterior by best-first search of the token tree."""

from .enumeration import Enumerated, Enumeration

__all__ = ["Enumerated", "Enumeration"]
