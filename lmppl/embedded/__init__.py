"""The small language models that ship with the package, and the data that go with them.

On each the exact posterior is known, so every algorithm can be held against the truth within minutes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import arithmetic as _arithmetic
from . import numbers as _numbers
from . import stories as _stories
from . import subjectivity as _subjectivity
from .arithmetic import Question
from .numbers import Bounds
from .stories import Story
from .subjectivity import Sentence

__all__ = ["Bounds", "Question", "Sentence", "Story", "data", "path"]

_WEIGHTS = Path(__file__).parent / "weights"
_DATA: dict[str, Callable[[str], list[Any]]] = {
    "stories": _stories.stories,
    "numbers": _numbers.bounds,
    "subjectivity": _subjectivity.sentences,
    "arithmetic": _arithmetic.questions,
}


def path(name: str) -> Path:
    """The directory of an embedded checkpoint, in Hugging Face layout.

    Raises ValueError where `name` is not one of them.
    """
    shipped = {config.parent.name for config in _WEIGHTS.glob("*/config.json")}
    if not isinstance(name, str) or name not in shipped:
        raise ValueError(f"name={name!r}: expected one of {_listed(shipped)}")
    return _WEIGHTS / name


def data(name: str, split: str) -> list[Any]:
    """The stories, the bounds of "numbers", the sentences of "subjectivity" or the questions of "arithmetic", by split.

    The splits are "train", "validation" and "test"; "arithmetic" has "rationales", "train", "validation", "test_3",
    "test_4" and "test_5". The same on every call; no (place, verb) pair, no bounds, no sentence and no question is in
    two. Raises ValueError for an unknown name or split.
    """
    if not isinstance(name, str) or name not in _DATA:
        raise ValueError(f"name={name!r}: expected one of {_listed(_DATA)}")
    return _DATA[name](split)


def _listed(names) -> str:
    return ", ".join(map(repr, sorted(names)))
