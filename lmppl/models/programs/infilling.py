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
    r"""The model and guide of infilling: the missing middle z of a story with beginning x and end y.

    .. math:: p(z \mid x, y) \propto p(z \mid x) \, p(y \mid x z)

    :param lm: the language model p; it is not trained.
    :param guide_lm: the guide's language model, usually ``lm.with_adapter(...)``; None: there is no guide.
    :param max_tokens: the most tokens of a middle before its stop.
    :param stop: the middle's stop, the end of a sentence.
    :param allowed: a constraint on the tokens of the middle, in model and guide; None: there is none.
    :param template: the guide's prompt, with the fields x and y.

    `model(x, y)` and `guide(x, y)` are Pyro programs over texts x (B, Lx) and y (B, Ly), with one plate of stories.
    The latent site is "z", (B, max_tokens + 1).

    Source: Hu et al. 2024, "Amortizing intractable inference in large language models", section 4.2.

    Example::

        lm = LanguageModel.embedded("stories")
        q = lm.with_adapter(LoraConfig(r=16, target_modules="all-linear"))
        task = Infilling(lm, q)
        x, y = task.encode(embedded.data("stories", "test")[:4])
        posterior = Importance(task.model, task.guide, num_particles=64).run(x, y)
        posterior.table("z", 0)  # middles of the first story, with their probabilities
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
        """The arguments of the middle's `Completion` besides its language model and prompt."""
        return dict(max_tokens=self.max_tokens, stop=self.stop, allowed=self.allowed)

    def model(self, x: Tensor, y: Tensor) -> Tensor:
        """z ~ LM(x); the text after x z begins with y.

        :param x: beginnings, (B, Lx).
        :param y: ends, (B, Ly).
        :returns: z, (..., B, max_tokens + 1).
        """
        with pyro.plate("stories", len(x)):
            z = pyro.sample("z", Completion(self.lm, x, **self.text))
            pyro.sample("y", Completion(self.lm, self.lm.join(x, z), max_tokens=length(y), stop=None), obs=y)
            return z

    def guide(self, x: Tensor, y: Tensor) -> Tensor:
        """z ~ q(z | x, y), by a language model that reads beginning and end.

        :param x: beginnings, (B, Lx).
        :param y: ends, (B, Ly).
        :returns: z, (..., B, max_tokens + 1).
        """
        if self.guide_lm is None:
            raise ValueError("guide_lm: this Infilling was made without a guide")
        prompt = self.guide_lm.fill(self.template, x=x, y=y)
        with pyro.plate("stories", len(x)):
            return pyro.sample("z", Completion(self.guide_lm, prompt, **self.text))

    def encode(self, stories: Sequence[Story]) -> tuple[Tensor, Tensor]:
        """The arguments of model and guide for these stories.

        :param stories: B of them.
        :returns: (x, y).
        """
        return self.lm.encode([s.x for s in stories]), self.lm.encode([s.y for s in stories])
