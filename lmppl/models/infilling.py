"""Infilling: the missing middle of a story, given its beginning and its end.

z ~ LM(x),    y ~ LM(x z) observed;    wanted: p(z | x, y)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pyro
from torch import Tensor

from ..distributions import Completion
from ..embedded import Story
from ..inference import Enumeration
from ..language_model import LanguageModel
from ..text import length
from .data_files import read_lines
from .experiment import Experiment, Recipe, embedded_splits, paper_setting, split, tempered

TEMPLATE = "Ending:{y}\nBeginning:{x}\nMiddle:"
LONGEST_MIDDLE = 24
PAPER_TEMPERATURE = 0.85  # the final reward temperature of the paper's released setting


class Infilling:
    """The model and guide of infilling, for any language model.

    :param lm: the language model p, frozen.
    :param guide_lm: the guide's, usually ``lm.with_adapter(...)``; None: no guide.
    :param max_tokens: the most tokens of a middle before its stop.
    :param stop: the middle's stop, a sentence end.
    :param template: the guide's prompt, with fields x and y.

    `model(x, y)` and `guide(x, y)` are Pyro programs over texts x (B, Lx) and y (B, Ly), with one plate of stories.
    """

    def __init__(
        self,
        lm: LanguageModel,
        guide_lm: LanguageModel | None = None,
        *,
        max_tokens: int = 7,
        stop: str = ".",
        template: str = TEMPLATE,
    ):
        self.lm, self.guide_lm = lm, guide_lm
        self.max_tokens, self.stop, self.template = max_tokens, stop, template

    def model(self, x: Tensor, y: Tensor) -> Tensor:
        """z ~ LM(x); the text after x z begins with y."""
        with pyro.plate("stories", len(x)):
            z = pyro.sample("z", Completion(self.lm, x, max_tokens=self.max_tokens, stop=self.stop))
            pyro.sample("y", Completion(self.lm, self.lm.join(x, z), max_tokens=length(y), stop=None), obs=y)
            return z

    def guide(self, x: Tensor, y: Tensor) -> Tensor:
        """z ~ q(z | x, y), a language model that reads both ends."""
        if self.guide_lm is None:
            raise ValueError("guide_lm: this Infilling was made without a guide")
        prompt = self.guide_lm.fill(self.template, x=x, y=y)
        with pyro.plate("stories", len(x)):
            return pyro.sample("z", Completion(self.guide_lm, prompt, max_tokens=self.max_tokens, stop=self.stop))

    def encode(self, stories: Sequence[Story]) -> tuple[Tensor, Tensor]:
        """The arguments (x, y) of model and guide for these stories."""
        return self.lm.encode([s.x for s in stories]), self.lm.encode([s.y for s in stories])


def read_stories(path: str | Path) -> list[Story]:
    """Stories from a text file, a story of three sentences a line; empty lines are passed over.

    :raises ValueError: naming the file and line, where a line has not three sentences or the file has no story.
    """
    stories = []
    for number, line in read_lines(path):
        sentences = re.split(r"(?<=[.!?])\s+", line.strip())
        if len(sentences) != 3:
            raise ValueError(f"data: {path}, line {number} has {len(sentences)} sentences; a story has three")
        x, z, y = sentences
        stories.append(Story(x, " " + z, " " + y))
    if not stories:
        raise ValueError(f"data: {path} has no story in it")
    return stories


def experiment(
    lm: LanguageModel | None = None,
    data: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    setting: str = "posterior",
    device: str | None = None,
    template: str = TEMPLATE,
) -> Experiment:
    """The missing middle sentence of a story, given its beginning and its end.

    On the embedded story LM, where the posterior is known, or on ``lm`` with the stories of the file ``data``;
    ``checkpoint`` is a trained adapter to start from.

    :raises ValueError: for another language model without ``data``: the embedded stories are written in its vocabulary.
    """
    recipe = recipe or Recipe()
    if lm is not None and data is None:
        raise ValueError("data: another language model needs stories of its own, a file with a story a line")
    lm = lm or LanguageModel.embedded("stories", device=device)
    guide_lm = recipe.guide_lm(lm, seed, checkpoint)
    temperature = PAPER_TEMPERATURE if paper_setting(setting) else 1.0
    if data is None:
        train, held_out, test = embedded_splits("stories")
        task = Infilling(lm, guide_lm, template=template)
        exact = Enumeration(tempered(task.model, temperature), mass=0.998)
    else:
        train, held_out, test = split(read_stories(data))
        longest = int(length(lm.encode([s.z for s in train])).max())
        task = Infilling(lm, guide_lm, max_tokens=min(LONGEST_MIDDLE, longest), template=template)
        exact = None
    return Experiment(
        name="infilling",
        lm=lm,
        guide_lm=guide_lm,
        model=tempered(task.model, temperature),
        guide=task.guide,
        batches=recipe.batches(*task.encode(train), seed=seed),
        held_out=task.encode(held_out),
        test=task.encode(test),
        describe=lambda i: f"{test[i].x} [...]{test[i].y}    (told: {test[i].z.strip()})",
        exact=exact,
        recipe=recipe,
        target="the posterior"
        if temperature == 1
        else f"p(z|x, y) to the power 1 / {temperature:g}, the paper's setting",
    )
