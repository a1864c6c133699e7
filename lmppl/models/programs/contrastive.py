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
    """Two prompts: what is written should follow ``x`` and not ``other``."""

    x: str
    other: str


class Contrastive:
    r"""The model and guide of contrastive continuation, for any language model.

    .. math:: \tilde p(z \mid x, x') = p(z \mid x)^a \, p(z \mid x')^{-b}, \qquad
              Z = \sum_z \tilde p(z \mid x, x')

    z has at most ``max_tokens`` tokens, so Z is a finite sum; it is finite if every text that is possible after x is
    possible after x', as it is with a softmax and the same ``allowed`` on both sides.  How much of it is worth reading:

    - a - b = 1: :math:`\log Z = b \, D_a(p(\cdot|x) \,\|\, p(\cdot|x'))`, the Rényi divergence of order a.  Texts to
      which the prompts make no difference keep their probability, so nonsense stays as rare as it was;
    - a - b < 1: nonsense gains, about as if tempered at 1 / (a - b), and at a <= b there is no end to it but
      ``max_tokens``;
    - b to infinity, a fixed: the text that is least probable after x', whatever x says of it.

    With b = 0 it is a tempered `Continuation`, with a = 1 as well the language model itself; so is x = x', a - b = 1.

    :param lm: the language model p, frozen.
    :param guide_lm: the guide's, usually ``lm.with_adapter(...)``; None: no guide.
    :param a: the power of p(z | x), positive.
    :param b: of p(z | x'), not negative.
    :param max_tokens: the most tokens of a continuation before its stop.
    :param stop: its stop, a sentence end.
    :param template: the guide's prompt, with fields x and other.
    :param allowed: a constraint on the next token, for p after both prompts and for the guide.

    `model(x, other)` and `guide(x, other)` are Pyro programs over prompts x (B, L) and x' (B, L'), with one plate.

    :raises ValueError: for powers out of their range.
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
        """z ~ LM(x), its log-probability times a, less b times the one after the other prompt."""
        with pyro.plate("pairs", len(x)):
            with poutine.scale(scale=self.a):
                z = pyro.sample("z", self.completion(self.lm, x))
            log_other = self.completion(self.lm, other).log_prob(z)
            # What is impossible after both is so already by its own site; 0 / 0 would be no number.
            pyro.factor("contrast", -self.b * log_other.masked_fill(log_other == -torch.inf, 0.0))
            return z

    def guide(self, x: Tensor, other: Tensor) -> Tensor:
        """z ~ q(z | x, x'), a language model that reads both prompts."""
        if self.guide_lm is None:
            raise ValueError("guide_lm: this Contrastive was made without a guide")
        with pyro.plate("pairs", len(x)):
            prompt = self.guide_lm.fill(self.template, x=x, other=other)
            return pyro.sample("z", self.completion(self.guide_lm, prompt))

    def completion(self, lm: LanguageModel, prompt: Tensor) -> Completion:
        """What a language model writes after a prompt."""
        return Completion(lm, prompt, max_tokens=self.max_tokens, stop=self.stop, allowed=self.allowed)

    def encode(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """The arguments (x, other) of model and guide."""
        return self.lm.encode([p.x for p in pairs]), self.lm.encode([p.other for p in pairs])
