"""Probabilistic programming with language models.

Names of the package are imported when they are first used: ``lmppl --help`` needs no language model and is fast.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmppl import text
    from lmppl.inference.judging.check import check
    from lmppl.language_model import LanguageModel
    from lmppl.masked_language_model import MaskedLanguageModel

__version__ = "0.1.0"

__all__ = ["LanguageModel", "MaskedLanguageModel", "check", "text"]

_HOMES = {
    "LanguageModel": "lmppl.language_model",
    "MaskedLanguageModel": "lmppl.masked_language_model",
    "check": "lmppl.inference.judging.check",
}
_MODULES = {module.name for module in iter_modules(__path__) if not module.name.startswith("_")}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(import_module(_HOMES[name]), name)
    elif name in _MODULES:
        found = import_module(f"lmppl.{name}")
    else:
        raise AttributeError(f"module 'lmppl' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
