"""Probabilistic programming with language models."""

from lmppl import text
from lmppl.check import check
from lmppl.language_model import LanguageModel

__version__ = "0.1.0"

__all__ = ["LanguageModel", "check", "text"]
