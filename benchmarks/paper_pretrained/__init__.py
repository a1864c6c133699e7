"""The paper's experiments on a pretrained language model and its data; `python -m benchmarks.paper_pretrained`.

``run(cell, seed, short, lm, data)`` of a study gets a fresh language model, so that adapters do not accumulate, and the
folder of data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.paper.study import Figures, Study
from lmppl import LanguageModel

from . import arithmetic, continuation, grpo, infilling, random_number, subjectivity, uncertainty


@dataclass(frozen=True)
class Place:
    """The checkpoint, the folder of data, and the device."""

    lm: Path
    data: Path | None = None
    device: str = "cpu"


def on_checkpoint(study: Study) -> Study:
    """The study as the runner calls it, ``run(cell, seed, short, place)``; it counts the tokens of each unit."""

    def run(cell: str, seed: int, short: bool, place: Place) -> Figures:
        lm = LanguageModel.from_pretrained(place.lm, device=place.device)
        return study.run(cell, seed, short, lm, place.data) | {"scored": lm.network.tokens_scored}

    return replace(study, run=run)


STUDIES: tuple[Study, ...] = tuple(
    map(
        on_checkpoint,
        (
            subjectivity.STUDY,
            uncertainty.STUDY,
            continuation.STUDY,
            infilling.STUDY,
            random_number.STUDY,
            arithmetic.STUDY,
            grpo.STUDY,
        ),
    )
)
