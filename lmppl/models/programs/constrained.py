"""Constrained generation: the texts of a language model that satisfy a condition, with their relative probabilities.

q(z | x)  proportional to  p(z | x) c(z)

    constraint "lexical":  c(z) = 1[z contains the words w], w observed constraint "regex":    c(z) = 1[z matches a
    pattern] constraint "learned":  c(z) = sigma(f(z)), a classifier's probability
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
    r"""The model and guide of constrained generation: a text z after a prompt x that satisfies a condition c.

    .. math:: \tilde p(z \mid x, w) = p(z \mid x) \, c(z, w), \qquad Z = P(c \mid x, w) \text{ for a hard condition}

    The condition is a factor on the whole text.  Masking tokens inside the language model gives another distribution,
    see docs/constraints.md.

    :param lm: the language model p; it is not trained.
    :param guide_lm: the guide's language model, usually ``lm.with_adapter(...)``; None: there is no guide.
    :param condition: a function ``condition(z, *given) -> log c``, (..., B); 0 and -inf for a hard condition.
    :param max_tokens: the most tokens of a text before its stop.
    :param stop: the text's stop, as in `Completion`.
    :param template: the guide's prompt, with the field x, and w where the condition varies.
    :param allowed: a constraint on the next token, in p and in the guide; None: there is none.

    `model(x, *given)` and `guide(x, *given)` are Pyro programs over prompts x (B, L) and, where the condition varies, a
    text w (B, L') that states it, with one plate.  The latent site is "z", (B, max_tokens + 1).

    Example::

        lm = LanguageModel.embedded("stories")
        q = lm.with_adapter(LoraConfig(r=16, target_modules="all-linear"))

        def is_old(z):  # log c: 0 or -inf
            return text.map(lambda said: 0.0 if " old " in said else -torch.inf, z, lm)

        task = Constrained(lm, q, condition=is_old, max_tokens=5, stop=".")
        x = lm.encode(["Tom went to the attic.", "Mia went to the beach."])
        posterior = Importance(task.model, num_particles=200).run(x)
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
        """z ~ LM(x), under the condition.

        :param x: prompts, (B, L).
        :param given: what the condition asks for, a text w (B, L'); nothing where the condition does not vary.
        :param least: log c counts as this where it is less.
        :returns: z, (..., B, max_tokens + 1).
        """
        with pyro.plate("prompts", len(x)):
            z = pyro.sample("z", self.completion(self.lm, x))
            pyro.factor("condition", self.condition(z, *given).clamp(min=least))
            return z

    def relaxed(self, penalty: float) -> Program:
        r"""The model to train on, with a hard condition softened to :math:`c \ge e^{-penalty}`.

        A guide cannot learn that something is impossible.  A constant reward for all impossible texts asks it to
        unlearn the language model there.  Here they keep the language model's proportions, with a share of at most
        :math:`e^{-penalty} / Z` of the target.

        :param penalty: nats.
        :returns: a Pyro program.
        """
        return partial(self.model, least=-penalty)

    def guide(self, x: Tensor, *given: Tensor) -> Tensor:
        """z ~ q(z | x, w), by a language model that reads the prompt and the condition.

        :param x: prompts, (B, L).
        :param given: as in `model`.
        :returns: z, (..., B, max_tokens + 1).
        """
        return self._write(self.allowed, x, *given)

    def masked(self, mask: Constraint, lm: LanguageModel | None = None) -> Program:
        """The guide, or another language model, masked token by token: a proposal, which is not the posterior.

        :param mask: a constraint on the next token.
        :param lm: the language model; None: the guide's.
        :returns: a Pyro program with the model's arguments.
        """
        allowed = mask if self.allowed is None else every(self.allowed, mask)
        return partial(self._write, allowed, lm=lm)

    def among(self, satisfying: Callable[..., Tensor]) -> Program:
        """The model's joint on a list of texts, for enumeration where no other text can satisfy the condition.

        z is drawn uniformly from those in the list that satisfy it; the factor p(z | x) c(z, w) / uniform(z) corrects
        for this.

        :param satisfying: a function ``satisfying(x, *given)`` that returns the texts, (K, L).
        :returns: a Pyro program with the model's arguments.
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
        """The distribution of what a language model writes after a prompt.

        :param lm: a language model.
        :param prompt: texts (..., B, L).
        :returns: a `Completion`.
        """
        return Completion(lm, prompt, max_tokens=self.max_tokens, stop=self.stop, allowed=self.allowed)

    def _write(self, allowed: Constraint | None, x: Tensor, *given: Tensor, lm: LanguageModel | None = None) -> Tensor:
        lm, template = (lm, PLAIN) if lm is not None else (self.guide_lm, self.template)
        if lm is None:
            raise ValueError("guide_lm: this Constrained was made without a guide")
        prompt = lm.fill(template, x=x, **({"w": given[0]} if "{w}" in template else {}))
        with pyro.plate("prompts", len(x)):
            written = Completion(lm, prompt, max_tokens=self.max_tokens, stop=self.stop, allowed=allowed)
            return pyro.sample("z", written)
