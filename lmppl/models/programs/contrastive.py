"""Contrastive: what is likely after x and unlikely after x'.

q(z | x, x')  proportional to  p(z | x)^a / p(z | x')^b
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ...constraints import Constraint
from ...distributions import Completion
from ...language_model import LanguageModel

TEMPLATE = "{other}\n\n{x}"
EMBEDDED_LONGEST = 5


class Pair(NamedTuple):
    """Two prompts: the text written should follow ``x`` and not ``other``."""

    x: str
    other: str


class Contrastive:
    r"""The model and guide of contrastive continuation: a text z that is likely after x and unlikely after x'.

    .. math:: \tilde p(z \mid x, x') = p(z \mid x)^a \, p(z \mid x')^{-b}, \qquad
              Z = \sum_z \tilde p(z \mid x, x')

    z has at most ``max_tokens`` tokens, so that Z is a finite sum.  Z is finite if every text that is possible after x
    is possible after x', as it is with a softmax and the same ``allowed`` for both.  What the powers do:

    - a - b = 1: :math:`\log Z = b \, D_a(p(\cdot|x) \,\|\, p(\cdot|x'))`, the Rényi divergence of order a.  A text that
      is equally likely after both prompts keeps its probability times a constant, so that nonsense stays rare;
    - a - b < 1: nonsense becomes more likely, about as with tempering at 1 / (a - b); for a <= b it is limited only by
      ``max_tokens``;
    - b to infinity at a fixed a: the text that is least likely after x', whatever its probability after x.

    With b = 0 it is a tempered `Continuation`, with a = 1 as well the language model itself.  It is the language model,
    too, where x = x' and a - b = 1.

    :param lm: the language model p; it is not trained.
    :param guide_lm: the guide's language model, usually ``lm.with_adapter(...)``; None: there is no guide.
    :param a: the power of p(z | x), positive.
    :param b: the power of p(z | x'), not negative.
    :param max_tokens: the most tokens of a continuation before its stop.
    :param stop: the continuation's stop, the end of a sentence.
    :param template: the guide's prompt, with the fields x and other.
    :param allowed: a constraint on the next token, for p after both prompts and for the guide; None: there is none.
    :raises ValueError: for powers out of their range.

    `model(x, other)` and `guide(x, other)` are Pyro programs over prompts x (B, L) and x' (B, L'), with one plate.  The
    latent site is "z", (B, max_tokens + 1).

    Example::

        lm = LanguageModel.embedded("stories")
        q = lm.with_adapter(LoraConfig(r=16, target_modules="all-linear"))
        task = Contrastive(lm, q, a=1.25, b=0.25)
        x, other = task.encode([Pair("Tom went to the attic.", "Mia went to the beach.")])
        posterior = Importance(task.model, task.guide, num_particles=64).run(x, other)
        posterior.table("z", 0)  # what fits Tom's story and not Mia's
    """

    def __init__(
        self,
        lm: LanguageModel,
        guide_lm: LanguageModel | None = None,
        *,
        a: float = 1.25,
        b: float = 0.25,
        max_tokens: int = EMBEDDED_LONGEST,
        stop: str = ".",
        template: str = TEMPLATE,
        allowed: Constraint | None = None,
    ):
        if not 0 < a < float("inf") or not 0 <= b < float("inf"):
            raise ValueError(f"a, b: expected a positive and b not negative, got {a} and {b}")
        self.lm, self.guide_lm, self.a, self.b = lm, guide_lm, a, b
        self.max_tokens, self.stop, self.template, self.allowed = max_tokens, stop, template, allowed

    def model(self, x: Tensor, other: Tensor) -> Tensor:
        """z ~ LM(x), with a times its log-probability minus b times that after the other prompt.

        :param x: prompts that z should follow, (B, L).
        :param other: prompts that z should not follow, (B, L').
        :returns: z, (..., B, max_tokens + 1).
        """
        with pyro.plate("pairs", len(x)):
            with poutine.scale(scale=self.a):
                z = pyro.sample("z", self.completion(self.lm, x))
            log_other = self.completion(self.lm, other).log_prob(z)
            # A text that is impossible after both prompts has probability 0 by its own site; 0 / 0 would be NaN.
            pyro.factor("contrast", -self.b * log_other.masked_fill(log_other == -torch.inf, 0.0))
            return z

    def guide(self, x: Tensor, other: Tensor) -> Tensor:
        """z ~ q(z | x, x'), by a language model that reads both prompts.

        :param x: prompts that z should follow, (B, L).
        :param other: prompts that z should not follow, (B, L').
        :returns: z, (..., B, max_tokens + 1).
        """
        if self.guide_lm is None:
            raise ValueError("guide_lm: this Contrastive was made without a guide")
        with pyro.plate("pairs", len(x)):
            prompt = self.guide_lm.fill(self.template, x=x, other=other)
            return pyro.sample("z", self.completion(self.guide_lm, prompt))

    def completion(self, lm: LanguageModel, prompt: Tensor) -> Completion:
        """The distribution of what a language model writes after a prompt.

        :param lm: a language model.
        :param prompt: texts (..., B, L).
        :returns: a `Completion`.
        """
        return Completion(lm, prompt, max_tokens=self.max_tokens, stop=self.stop, allowed=self.allowed)

    def encode(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """The arguments of model and guide.

        :param pairs: B pairs of prompts.
        :returns: (x, other).
        """
        return self.lm.encode([p.x for p in pairs]), self.lm.encode([p.other for p in pairs])
