"""The worlds that the embedded language models know; `python -m worlds.build` trains one from scratch.

What is needed to run an experiment (data, weights) is `lmppl.embedded`; this folder is not installed.
"""

from . import arithmetic, masked_stories, numbers, stories, subjectivity
from .world import World

WORLDS: dict[str, World] = {
    "stories": stories.WORLD,
    "masked_stories": masked_stories.WORLD,
    "places": stories.KNOWS_PLACES,  # not shipped
    "numbers": numbers.WORLD,
    "subjectivity": subjectivity.WORLD,
    "arithmetic": arithmetic.WORLD,
}
