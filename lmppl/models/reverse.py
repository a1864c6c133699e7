"""Reverse on the embedded stories, or on the user's; the programs are in `programs/reverse.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from ..inference import Enumeration, OnPolicy, VarGrad
from ..language_model import LanguageModel
from .experiment import Experiment, Options, Recipe, Start, embedded_splits, split
from .infilling import read_stories
from .programs.reverse import Reverse

EMBEDDED_LONGEST, LONGEST_BEGINNING = 5, 24
# Chosen on embedded validation stories.  The posterior is about names, which have nearly equal embeddings: without an
# adapted output layer the guide stays at a total variation of 0.09, however long it trains.
EMBEDDED_RECIPE = Recipe(
    steps=600,
    quick_steps=200,
    learning_rate=3e-3,
    objective=lambda: VarGrad(exploration=OnPolicy()),
    output_layer=True,
)


def experiment(
    lm: LanguageModel | None = None, data: str | Path | None = None, **options: Unpack[Options]
) -> Experiment:
    """The beginning of a story, given how it goes on.

    It runs on the embedded story LM, whose posterior is known, or on ``lm`` with the stories of the file ``data``.

    :param lm: a language model; None: the embedded one.
    :param data: a text file with a story of three sentences in each line; None: the embedded stories.
    :param options: those of every experiment, see `experiment.Options`.
    :returns: an `Experiment`.
    :raises ValueError: for another language model without ``data``: the embedded stories are written in the embedded
        LM's vocabulary.
    """
    needs = "stories of its own, a file with one story per line"
    start = Start.of("reverse", "stories", lm, data, EMBEDDED_RECIPE if data is None else Recipe(), needs, **options)
    stories = embedded_splits("stories") if data is None else split(read_stories(data))
    longest = EMBEDDED_LONGEST
    if data is not None:
        longest = min(LONGEST_BEGINNING, start.longest([" " + s.x for s in stories[0]]))
    task = Reverse(start.lm, start.guide_lm, max_tokens=longest)
    return start.experiment(
        task,
        stories,
        lambda s: f"[...]{s.z}{s.y}    (told: {s.x})",
        site="x",
        # With 0.99 of the prior's mass, 3% of the posterior's would be missing.
        exact=Enumeration(task.model, mass=0.998) if data is None else None,
    )
