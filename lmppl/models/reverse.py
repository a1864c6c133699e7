"""Reverse: the beginning of a story, given how it goes on.

x ~ LM(prefix),    y ~ LM(x) observed;    wanted: p(x | y)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyro
from torch import Tensor

from ..distributions import Completion
from ..embedded import Story
from ..inference import Enumeration, OnPolicy, VarGrad
from ..language_model import LanguageModel
from ..text import length
from .experiment import Experiment, Recipe, embedded_splits, paper_setting, split
from .infilling import read_stories

PREFIX = "Beginning:"
TEMPLATE = "Ending:{y}\nBeginning:"
LONGEST_BEGINNING = 24
# On the embedded stories, chosen on validation stories: names are what the posterior is about and have nearly equal
# embeddings, so that without its output layer the guide stays at a total variation of 0.09, however long it trains.
EMBEDDED_RECIPE = Recipe(
    steps=600,
    quick_steps=200,
    learning_rate=3e-3,
    objective=lambda: VarGrad(exploration=OnPolicy()),
    output_layer=True,
)


class Reverse:
    """The model and guide of reverse inference, for any language model.

    :param lm: the language model p, frozen.
    :param guide_lm: the guide's, usually ``lm.with_adapter(...)``; None: no guide.
    :param prefix: what stands before every beginning; empty: the language model's own first words.
    :param max_tokens: the most tokens of a beginning before its stop.
    :param stop: its stop, a sentence end.
    :param template: the guide's prompt, with the field y.

    `model(y)` and `guide(y)` are Pyro programs over endings y (B, L), with one plate of stories.
    """

    def __init__(
        self,
        lm: LanguageModel,
        guide_lm: LanguageModel | None = None,
        *,
        prefix: str = PREFIX,
        max_tokens: int = 5,
        stop: str = ".",
        template: str = TEMPLATE,
    ):
        self.lm, self.guide_lm = lm, guide_lm
        self.prefix, self.max_tokens, self.stop, self.template = lm.encode(prefix), max_tokens, stop, template

    def model(self, y: Tensor) -> Tensor:
        """x ~ LM(prefix); the text after prefix and x begins with y."""
        with pyro.plate("stories", len(y)):
            x = pyro.sample("x", Completion(self.lm, self.prefix, max_tokens=self.max_tokens, stop=self.stop))
            told = self.lm.join(self.prefix, x)
            pyro.sample("y", Completion(self.lm, told, max_tokens=length(y), stop=None), obs=y)
            return x

    def guide(self, y: Tensor) -> Tensor:
        """x ~ q(x | y), a language model that reads the ending."""
        if self.guide_lm is None:
            raise ValueError("guide_lm: this Reverse was made without a guide")
        prompt = self.guide_lm.fill(self.template, y=y)
        with pyro.plate("stories", len(y)):
            return pyro.sample("x", Completion(self.guide_lm, prompt, max_tokens=self.max_tokens, stop=self.stop))

    def encode(self, stories: Sequence[Story]) -> tuple[Tensor]:
        """The argument (y,) of model and guide: all of a story after its first sentence."""
        return (self.lm.encode([s.z + s.y for s in stories]),)


def experiment(
    lm: LanguageModel | None = None,
    data: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    setting: str = "posterior",
    device: str | None = None,
) -> Experiment:
    """The beginning of a story, given how it goes on.

    On the embedded story LM, where the posterior is known, or on ``lm`` with the stories of the file ``data``;
    ``checkpoint`` is a trained adapter to start from.

    :raises ValueError: for another language model without ``data``: the embedded stories are written in its vocabulary.
    """
    paper_setting(setting)  # the posterior, too
    recipe = recipe or (EMBEDDED_RECIPE if data is None else Recipe())
    if lm is not None and data is None:
        raise ValueError("data: another language model needs stories of its own, a file with a story a line")
    lm = lm or LanguageModel.embedded("stories", device=device)
    guide_lm = recipe.guide_lm(lm, seed, checkpoint)
    if data is None:
        train, held_out, test = embedded_splits("stories")
        task = Reverse(lm, guide_lm)
        exact = Enumeration(task.model, mass=0.998)  # with 0.99 of the prior's mass it would lack 3% of the posterior's
    else:
        train, held_out, test = split(read_stories(data))
        longest = int(length(lm.encode([" " + s.x for s in train])).max())
        task = Reverse(lm, guide_lm, max_tokens=min(LONGEST_BEGINNING, longest))
        exact = None
    return Experiment(
        name="reverse",
        lm=lm,
        guide_lm=guide_lm,
        model=task.model,
        guide=task.guide,
        batches=recipe.batches(*task.encode(train), seed=seed),
        held_out=task.encode(held_out),
        test=task.encode(test),
        describe=lambda i: f"[...]{test[i].z}{test[i].y}    (told: {test[i].x})",
        site="x",
        exact=exact,
        recipe=recipe,
    )
