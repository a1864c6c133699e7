"""Continuation: the next sentence, from a language model whose whole *sequence* is tempered.

q(z | x)  proportional to  p(z | x)^(1/T)

Hu et al. 2024, "Amortizing intractable inference in large language models", section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ...constraints import Constraint
from ...distributions import Completion
from ...language_model import LanguageModel

PLAIN = "{x}"  # the guide's prompt
EMBEDDED_LONGEST = 7  # tokens of an embedded story's next sentence, before its stop


class Continuation:
    r"""The model and guide of tempered continuation, for any language model.

    .. math:: \tilde p(z \mid x) = p(z \mid x)^{1/T}

    A token temperature divides every token's logits and renormalises token by token; here the whole sequence is
    tempered and the sum over texts is one, so that a likely beginning that leads to unlikely texts is avoided.

    :param lm: the language model p, frozen.
    :param guide_lm: the guide's, usually ``lm.with_adapter(...)``; None: no guide.
    :param max_tokens: the most tokens of a continuation before its stop.
    :param stop: its stop, a sentence end.
    :param allowed: a constraint on its tokens, of model and guide: that a chat model begins no turn, for instance.
    :param template: the guide's prompt, with the field x and, for one guide of several temperatures, the field T.
    :param write: the words for a temperature.

    `model(x, T)` and `guide(x, T)` are Pyro programs over prompts x (B, L) and temperatures T (B,), with one plate.
    """

    def __init__(
        self,
        lm: LanguageModel,
        guide_lm: LanguageModel | None = None,
        *,
        max_tokens: int = EMBEDDED_LONGEST,
        stop: str = ".",
        allowed: Constraint | None = None,
        template: str = PLAIN,
        write: Callable[[float], str] = "{:g}".format,
    ):
        self.lm, self.guide_lm = lm, guide_lm
        self.max_tokens, self.stop, self.template, self.write = max_tokens, stop, template, write
        self.allowed = allowed

    @property
    def text(self) -> dict[str, Any]:
        """The arguments of a `Completion` besides its language model and prompt."""
        return dict(max_tokens=self.max_tokens, stop=self.stop, allowed=self.allowed)

    def model(self, x: Tensor, T: Tensor) -> Tensor:
        """z ~ LM(x), its log-probability times 1 / T."""
        with pyro.plate("prompts", len(x)), poutine.scale(scale=1 / T):
            return pyro.sample("z", Completion(self.lm, x, **self.text))

    def guide(self, x: Tensor, T: Tensor) -> Tensor:
        """z ~ q(z | x), or q(z | x, T) where the template has T."""
        if self.guide_lm is None:
            raise ValueError("guide_lm: this Continuation was made without a guide")
        with pyro.plate("prompts", len(x)):
            return pyro.sample("z", Completion(self.guide_lm, self.guide_prompt(x, T), **self.text))

    def guide_prompt(self, x: Tensor, T: Tensor) -> Tensor:
        """What the guide reads, (B, L)."""
        fields = {"x": x}
        if "{T}" in self.template:
            fields["T"] = self.lm.encode([self.write(round(t, 6)) for t in T.tolist()])
        return self.lm.fill(self.template, **fields)

    def encode(self, prompts: Sequence[str], temperature: float | Sequence[float]) -> tuple[Tensor, Tensor]:
        """The arguments (x, T) of model and guide; several temperatures take turns.

        :raises ValueError: naming ``temperature``, where one is not positive.
        """
        several = temperatures(temperature)
        turns = [several[i % len(several)] for i in range(len(prompts))]
        return self.lm.encode(list(prompts)), torch.tensor(turns, device=self.lm.device)


def temperatures(given: float | Sequence[float]) -> tuple[float, ...]:
    """One or several temperatures, checked."""
    several = (float(given),) if isinstance(given, int | float) else tuple(float(t) for t in given)
    if not several or not all(0 < t < float("inf") for t in several):
        raise ValueError(f"temperature: expected positive numbers, got {given}")
    return several
