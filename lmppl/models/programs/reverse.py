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
    r"""The model and guide of reverse inference: the beginning x of a story that goes on with y.

    .. math:: p(x \mid y) \propto p(x) \, p(y \mid x)

    :param lm: the language model p; it is not trained.
    :param guide_lm: the guide's language model, usually ``lm.with_adapter(...)``; None: there is no guide.
    :param prefix: the text before every beginning; "": none.
    :param max_tokens: the most tokens of a beginning before its stop.
    :param stop: the beginning's stop, the end of a sentence.
    :param template: the guide's prompt, with the field y.

    `model(y)` and `guide(y)` are Pyro programs over texts y (B, L), with one plate of stories.  The latent site is "x",
    (B, max_tokens + 1).

    Example::

        lm = LanguageModel.embedded("stories")
        q = lm.with_adapter(LoraConfig(r=16, target_modules="all-linear"))
        task = Reverse(lm, q)
        (y,) = task.encode(embedded.data("stories", "test")[:4])
        posterior = SMC(task.model, task.guide, num_particles=64).run(y)
        posterior.table("x", 0)  # beginnings of the first story, with their probabilities
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
        """x ~ LM(prefix); the text after prefix and x begins with y.

        :param y: how the stories go on, (B, L).
        :returns: x, (..., B, max_tokens + 1).
        """
        with pyro.plate("stories", len(y)):
            x = pyro.sample("x", Completion(self.lm, self.prefix, max_tokens=self.max_tokens, stop=self.stop))
            told = self.lm.join(self.prefix, x)
            pyro.sample("y", Completion(self.lm, told, max_tokens=length(y), stop=None), obs=y)
            return x

    def guide(self, y: Tensor) -> Tensor:
        """x ~ q(x | y), by a language model that reads y.

        :param y: how the stories go on, (B, L).
        :returns: x, (..., B, max_tokens + 1).
        """
        if self.guide_lm is None:
            raise ValueError("guide_lm: this Reverse was made without a guide")
        prompt = self.guide_lm.fill(self.template, y=y)
        with pyro.plate("stories", len(y)):
            return pyro.sample("x", Completion(self.guide_lm, prompt, max_tokens=self.max_tokens, stop=self.stop))

    def encode(self, stories: Sequence[Story]) -> tuple[Tensor]:
        """The argument of model and guide: each story after its first sentence.

        :param stories: B of them.
        :returns: (y,).
        """
        return (self.lm.encode([s.z + s.y for s in stories]),)
