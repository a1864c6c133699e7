"""Continuation: the next sentence, from a language model whose whole *sequences* are tempered.

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
    r"""The model and guide of tempered continuation: the next sentence z after a prompt x, at temperature T.

    .. math:: \tilde p(z \mid x) = p(z \mid x)^{1/T}, \qquad Z = \sum_z p(z \mid x)^{1/T}

    A token temperature divides every token's logits and normalises token by token.  Here the whole sequence is tempered
    and normalised over texts, so that a likely beginning that leads to unlikely texts is avoided.

    :param lm: the language model p; it is not trained.
    :param guide_lm: the guide's language model, usually ``lm.with_adapter(...)``; None: there is no guide.
    :param max_tokens: the most tokens of a continuation before its stop.
    :param stop: the continuation's stop, the end of a sentence.
    :param allowed: a constraint on its tokens, in model and guide, e.g. that a chat model begins no turn; None: there
        is none.
    :param template: the guide's prompt, with the field x and, for one guide of several temperatures, the field T.
    :param write: a function from a temperature to its string in the prompt.

    `model(x, T)` and `guide(x, T)` are Pyro programs over prompts x (B, L) and temperatures T (B,), with one plate.
    The latent site is "z", (B, max_tokens + 1).

    Source: Hu et al. 2024, "Amortizing intractable inference in large language models", section 4.1.

    Example::

        lm = LanguageModel.embedded("stories")
        q = lm.with_adapter(LoraConfig(r=16, target_modules="all-linear"))
        task = Continuation(lm, q)
        x, T = task.encode(["Tom went to the attic.", "Mia went to the beach."], temperature=0.8)
        posterior = Importance(task.model, task.guide, num_particles=64).run(x, T)
        posterior.table("z", 0)  # continuations of the first prompt, with their probabilities
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
        """The arguments of the continuation's `Completion` besides its language model and prompt."""
        return dict(max_tokens=self.max_tokens, stop=self.stop, allowed=self.allowed)

    def model(self, x: Tensor, T: Tensor) -> Tensor:
        """z ~ LM(x), with its log-probability divided by T.

        :param x: prompts, (B, L).
        :param T: temperatures, (B,).
        :returns: z, (..., B, max_tokens + 1).
        """
        with pyro.plate("prompts", len(x)), poutine.scale(scale=1 / T):
            return pyro.sample("z", Completion(self.lm, x, **self.text))

    def guide(self, x: Tensor, T: Tensor) -> Tensor:
        """z ~ q(z | x), or q(z | x, T) where the template has the field T.

        :param x: prompts, (B, L).
        :param T: temperatures, (B,).
        :returns: z, (..., B, max_tokens + 1).
        """
        if self.guide_lm is None:
            raise ValueError("guide_lm: this Continuation was made without a guide")
        with pyro.plate("prompts", len(x)):
            return pyro.sample("z", Completion(self.guide_lm, self.guide_prompt(x, T), **self.text))

    def guide_prompt(self, x: Tensor, T: Tensor) -> Tensor:
        """What the guide reads.

        :param x: prompts, (B, L).
        :param T: temperatures, (B,).
        :returns: texts (B, L').
        """
        fields = {"x": x}
        if "{T}" in self.template:
            fields["T"] = self.lm.encode([self.write(round(t, 6)) for t in T.tolist()])
        return self.lm.fill(self.template, **fields)

    def encode(self, prompts: Sequence[str], temperature: float | Sequence[float]) -> tuple[Tensor, Tensor]:
        """The arguments of model and guide.

        :param prompts: B strings.
        :param temperature: one temperature, or several, which the prompts take in turn.
        :returns: (x, T).
        :raises ValueError: naming ``temperature``, where one is not positive.
        """
        several = temperatures(temperature)
        turns = [several[i % len(several)] for i in range(len(prompts))]
        return self.lm.encode(list(prompts)), torch.tensor(turns, device=self.lm.device)


def temperatures(given: float | Sequence[float]) -> tuple[float, ...]:
    """One or several temperatures as a tuple; raises ValueError where one is not positive."""
    several = (float(given),) if isinstance(given, int | float) else tuple(float(t) for t in given)
    if not several or not all(0 < t < float("inf") for t in several):
        raise ValueError(f"temperature: expected positive numbers, got {given}")
    return several
