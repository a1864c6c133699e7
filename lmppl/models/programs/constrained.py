"""Constrained generation: a language model's texts that satisfy a condition, in its own proportions.

q(z | x)  proportional to  p(z | x) c(z)

    constraint "lexical":  c(z) = 1[z contains the words w], w observed
    constraint "regex":    c(z) = 1[z matches a pattern]
    constraint "learned":  c(z) = sigma(f(z)), a classifier's probability
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pyro
import torch
from torch import Tensor

from ...constraints import Constraint, every
from ...distributions import Completion
from ...distributions.table import TextTable
from ...inference.core.programs import Program
from ...language_model import LanguageModel

PLAIN = "{x}"  # the guide's prompt
LONGEST = 30  # tokens of a text
Condition = Callable[..., Tensor]


class Constrained:
    r"""The model and guide of constrained generation, for any language model.

    .. math:: \tilde p(z \mid x, w) = p(z \mid x) \, c(z, w), \qquad Z = P(c \mid x, w) \text{ for a hard condition}

    The condition is on the whole text, a factor.  Masking tokens inside the language model is another distribution,
    see docs/constraints.md.

    :param lm: the language model p, frozen.
    :param guide_lm: the guide's, usually ``lm.with_adapter(...)``; None: no guide.
    :param condition: ``condition(z, *given) -> log c`` (..., B), 0 and -inf for a hard one.
    :param max_tokens: the most tokens of a text before its stop.
    :param stop: as of `Completion`.
    :param template: the guide's prompt, with the field x, and w where the condition varies.
    :param allowed: a constraint on the next token, of p and of the guide.

    `model(x, *given)` and `guide(x, *given)` are Pyro programs over prompts x (B, L) and, where it varies, what the
    condition asks for, a text w (B, L'), with one plate.
    """

    def __init__(
        self,
        lm: LanguageModel,
        guide_lm: LanguageModel | None = None,
        *,
        condition: Condition,
        max_tokens: int = LONGEST,
        stop: str = "eos",
        template: str = PLAIN,
        allowed: Constraint | None = None,
    ):
        self.lm, self.guide_lm, self.condition = lm, guide_lm, condition
        self.max_tokens, self.stop, self.template, self.allowed = max_tokens, stop, template, allowed

    def model(self, x: Tensor, *given: Tensor, least: float = -torch.inf) -> Tensor:
        """z ~ LM(x), under the condition; log c counts as ``least`` where it is less."""
        with pyro.plate("prompts", len(x)):
            z = pyro.sample("z", self.completion(self.lm, x))
            pyro.factor("condition", self.condition(z, *given).clamp(min=least))
            return z

    def relaxed(self, penalty: float) -> Program:
        r"""The model to train on, with a hard condition softened to :math:`c \ge e^{-penalty}`.

        A guide cannot learn that something is impossible, and a constant reward for all that is asks it to unlearn the
        language model there.  Here what does not satisfy keeps the language model's proportions, at a share of at most
        :math:`e^{-penalty} / Z` of the target.
        """
        return partial(self.model, least=-penalty)

    def guide(self, x: Tensor, *given: Tensor) -> Tensor:
        """z ~ q(z | x, w), a language model that reads the prompt and the condition."""
        return self._write(self.allowed, x, *given)

    def masked(self, mask: Constraint, lm: LanguageModel | None = None) -> Program:
        """The guide (or the language model ``lm``), masked token by token: a proposal, and a different distribution."""
        allowed = mask if self.allowed is None else every(self.allowed, mask)
        return partial(self._write, allowed, lm=lm)

    def among(self, satisfying: Callable[..., Tensor]) -> Program:
        """The model's joint on the texts ``satisfying(x, *given)`` (K, L), for enumeration where no others can satisfy.

        z ~ uniform on those of them that do; the factor p(z | x) c(z, w) / uniform(z) makes up for it.
        """

        def program(x: Tensor, *given: Tensor) -> Tensor:
            texts = satisfying(x, *given)
            log_c = self.condition(texts[:, None], *given).expand(-1, len(x))  # (K, B)
            possible = torch.zeros_like(log_c).masked_fill(log_c == -torch.inf, -torch.inf)
            listed = TextTable(self.lm, texts, possible.T, self.lm.stop_ids(self.stop))
            with pyro.plate("prompts", len(x)):
                z = pyro.sample("z", listed)
                joint = self.completion(self.lm, x).log_prob(z) + self.condition(z, *given)
                log_uniform = listed.log_prob(z)
                pyro.factor("joint", joint - log_uniform.masked_fill(log_uniform == -torch.inf, 0.0))
                return z

        return program

    def completion(self, lm: LanguageModel, prompt: Tensor) -> Completion:
        """What a language model writes after a prompt."""
        return Completion(lm, prompt, max_tokens=self.max_tokens, stop=self.stop, allowed=self.allowed)

    def _write(self, allowed: Constraint | None, x: Tensor, *given: Tensor, lm: LanguageModel | None = None) -> Tensor:
        lm, template = (lm, PLAIN) if lm is not None else (self.guide_lm, self.template)
        if lm is None:
            raise ValueError("guide_lm: this Constrained was made without a guide")
        prompt = lm.fill(template, x=x, **({"w": given[0]} if "{w}" in template else {}))
        with pyro.plate("prompts", len(x)):
            written = Completion(lm, prompt, max_tokens=self.max_tokens, stop=self.stop, allowed=allowed)
            return pyro.sample("z", written)
