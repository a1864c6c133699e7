"""Reverse: the beginning of a story, given how it goes on.

x ~ LM(prefix),    y ~ LM(x) observed;    wanted: p(x | y)
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro
from torch import Tensor

from ...distributions import Completion
from ...embedded import Story
from ...language_model import LanguageModel
from ...text import length

PREFIX = "Beginning:"
TEMPLATE = "Ending:{y}\nBeginning:"


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
