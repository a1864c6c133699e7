"""Infilling on the embedded stories, or on the user's; the programs are in `programs/infilling.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Unpack

from ..embedded import Story
from ..inference import Enumeration
from ..language_model import LanguageModel
from .data_files import read_each
from .experiment import Experiment, Options, Recipe, Start, embedded_splits, power, split, tempered
from .programs.infilling import TEMPLATE, Infilling

EMBEDDED_LONGEST, LONGEST_MIDDLE = 7, 24
PAPER_TEMPERATURE = 0.85  # the final reward temperature of the paper's released setting


def story(line: str) -> Story:
    """The story of three sentences in a line."""
    sentences = re.split(r"(?<=[.!?])\s+", line.strip())
    if len(sentences) != 3:
        raise ValueError(f"has {len(sentences)} sentences; a story has three")
    x, z, y = sentences
    return Story(x, " " + z, " " + y)


def read_stories(path: str | Path) -> list[Story]:
    """Stories from a text file, a story of three sentences in each line; errors as in `read_each`."""
    return read_each(path, story, "story")


def experiment(
    lm: LanguageModel | None = None,
    data: str | Path | None = None,
    *,
    template: str = TEMPLATE,
    **options: Unpack[Options],
) -> Experiment:
    """The missing middle sentence of a story, given its beginning and its end.

    It runs on the embedded story LM, whose posterior is known, or on ``lm`` with the stories of the file ``data``.

    :param lm: a language model; None: the embedded one.
    :param data: a text file with a story of three sentences in each line; None: the embedded stories.
    :param template: the guide's prompt, with the fields x and y.
    :param options: those of every experiment, see `experiment.Options`.
    :returns: an `Experiment`.
    :raises ValueError: for another language model without ``data``: the embedded stories are written in the embedded
        LM's vocabulary.
    """
    needs = "stories of its own, a file with one story per line"
    start = Start.of("infilling", "stories", lm, data, Recipe(), needs, **options)
    stories = embedded_splits("stories") if data is None else split(read_stories(data))
    longest = EMBEDDED_LONGEST if data is None else min(LONGEST_MIDDLE, start.longest([s.z for s in stories[0]]))
    task = Infilling(start.lm, start.guide_lm, max_tokens=longest, template=template)
    temperature = PAPER_TEMPERATURE if start.paper else 1.0
    model = tempered(task.model, temperature)
    return start.experiment(
        task,
        stories,
        lambda s: f"{s.x} [...]{s.y}    (told: {s.z.strip()})",
        model=model,
        exact=Enumeration(model, mass=0.998) if data is None else None,
        target=power(temperature),
    )
