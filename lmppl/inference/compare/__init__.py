"""Several algorithms on one model, beside the truth."""

from .compare import compare
from .comparison import Comparison

__all__ = ["Comparison", "compare"]
