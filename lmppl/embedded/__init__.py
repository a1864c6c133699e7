"""The small language models that ship with the package, and their data.

On each of them the exact posterior is known, so that every algorithm can be compared with the truth within minutes.
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

    :param name: "stories", "numbers", "subjectivity", "arithmetic" or "masked_stories".
    :raises ValueError: for another name.

    >>> path("stories").name
    'stories'
    """
    shipped = {config.parent.name for config in _WEIGHTS.glob("*/config.json")}
    if not isinstance(name, str) or name not in shipped:
        raise ValueError(f"name={name!r}: expected one of {_listed(shipped)}")
    return _WEIGHTS / name


def data(name: str, split: str) -> list[Any]:
    """The data of an embedded model, by split; the same on every call.

    No observation is in two splits; of stories, no (place, verb) pair is.

    :param name: "stories" (a list of `Story`), "numbers" (`Bounds`), "subjectivity" (`Sentence`) or "arithmetic"
        (`Question`).
    :param split: "train", "validation" or "test"; of "arithmetic" "rationales", "train", "validation", "test_3",
        "test_4" or "test_5".
    :returns: a list.
    :raises ValueError: for another name or split.

    >>> data("stories", "test")[0].x
    'Eve went to the market.'
    """
    if not isinstance(name, str) or name not in _DATA:
        raise ValueError(f"name={name!r}: expected one of {_listed(_DATA)}")
    return _DATA[name](split)


def _listed(names) -> str:
    return ", ".join(map(repr, sorted(names)))
