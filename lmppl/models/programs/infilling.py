"""Infilling: the missing middle of a story, given its beginning and its end.

z ~ LM(x),    y ~ LM(x z) observed;    wanted: p(z | x, y)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
from torch import Tensor

from ...constraints import Constraint
from ...distributions import Completion
from ...embedded import Story
from ...language_model import LanguageModel
from ...text import length

TEMPLATE = "Ending:{y}\nBeginning:{x}\nMiddle:"


class Infilling:
    """The model and guide of infilling, for any language model.

    :param lm: the language model p, frozen.
    :param guide_lm: the guide's, usually ``lm.with_adapter(...)``; None: no guide.
    :param max_tokens: the most tokens of a middle before its stop.
    :param stop: the middle's stop, a sentence end.
    :param allowed: a constraint on its tokens, of model and guide.
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
        allowed: Constraint | None = None,
        template: str = TEMPLATE,
    ):
        self.lm, self.guide_lm = lm, guide_lm
        self.max_tokens, self.stop, self.template = max_tokens, stop, template
        self.allowed = allowed

    @property
    def text(self) -> dict[str, Any]:
        """The arguments of a `Completion` besides its language model and prompt."""
        return dict(max_tokens=self.max_tokens, stop=self.stop, allowed=self.allowed)

    def model(self, x: Tensor, y: Tensor) -> Tensor:
        """z ~ LM(x); the text after x z begins with y."""
        with pyro.plate("stories", len(x)):
            z = pyro.sample("z", Completion(self.lm, x, **self.text))
            pyro.sample("y", Completion(self.lm, self.lm.join(x, z), max_tokens=length(y), stop=None), obs=y)
            return z

    def guide(self, x: Tensor, y: Tensor) -> Tensor:
        """z ~ q(z | x, y), a language model that reads both ends."""
        if self.guide_lm is None:
            raise ValueError("guide_lm: this Infilling was made without a guide")
        prompt = self.guide_lm.fill(self.template, x=x, y=y)
        with pyro.plate("stories", len(x)):
            return pyro.sample("z", Completion(self.guide_lm, prompt, **self.text))

    def encode(self, stories: Sequence[Story]) -> tuple[Tensor, Tensor]:
        """The arguments (x, y) of model and guide for these stories."""
        return self.lm.encode([s.x for s in stories]), self.lm.encode([s.y for s in stories])
