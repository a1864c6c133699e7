"""A random number: a language model's numbers are neither always valid nor uniform; the posterior's are.

z ~ LM("... a random integer drawn uniformly between {a} and {b}: "),    1[a <= z <= b] observed

    target "valid":    p(z | a <= z <= b), the language model conditioned on validity target "uniform":  1[a <= z <= b]
    / (b - a + 1): a factor 1 / p(z) cancels the language model's preferences
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pyro
import torch
from torch import Tensor

from ... import text
from ...distributions import Completion
from ...embedded import Bounds
from ...embedded.numbers import MAX_TOKENS
from ...language_model import LanguageModel

TARGETS = "uniform", "valid"


class RandomNumber:
    r"""The model and guide of a random number z between bounds a and b.

    .. math:: \text{"valid": } p(z \mid a \le z \le b), \qquad
              \text{"uniform": } \frac{1[a \le z \le b]}{b - a + 1}

    :param lm: the language model p; it is not trained.
    :param guide_lm: the guide's language model, usually ``lm.with_adapter(...)``; None: there is no guide.
    :param target: "uniform" or "valid".
    :param max_tokens: the most tokens of an answer before its stop.
    :param invalid: the logarithm of the factor on invalid answers.  -inf: they are impossible.  With -6 they have the
        density e^-6 p(z), at most 2.5e-5 of the mass beside 101 numbers of density 1.  Use that for large vocabularies,
        where the guide would otherwise have to give probability zero to each of some 10^14 texts.
    :raises ValueError: for another ``target``.

    `model(a, b)` and `guide(a, b)` are Pyro programs over bounds a, b (B,), with one plate of prompts.  The latent site
    is "z", (B, max_tokens + 1).

    Source: Hu et al. 2024, "Amortizing intractable inference in large language models", section 2.

    Example::

        lm = LanguageModel.embedded("numbers")
        task = RandomNumber(lm, lm.with_adapter(LoraConfig(r=16, target_modules="all-linear")), target="valid")
        a, b = torch.tensor([0, 10]), torch.tensor([100, 30])
        posterior = Importance(task.model, task.guide, num_particles=256).run(a, b)
        Enumeration(task.digits).run(a, b).table("z", 0)  # the exact posterior
    """

    def __init__(
        self,
        lm: LanguageModel,
        guide_lm: LanguageModel | None = None,
        *,
        target: str = "uniform",
        max_tokens: int = MAX_TOKENS,
        invalid: float = -math.inf,
    ):
        if target not in TARGETS:
            raise ValueError(f"target: expected one of {', '.join(map(repr, TARGETS))}, got {target!r}")
        self.lm, self.guide_lm, self.target, self.max_tokens = lm, guide_lm, target, max_tokens
        self.invalid = invalid

    def model(self, a: Tensor, b: Tensor) -> Tensor:
        """z ~ LM(prompt); z is valid; for the target "uniform" the factor 1 / p(z).

        :param a: lower bounds, (B,).
        :param b: upper bounds, (B,).
        :returns: z, (..., B, max_tokens + 1).
        """
        prior = self.completion(self.lm, a, b)
        with pyro.plate("prompts", len(a)):
            z = pyro.sample("z", prior)
            valid = self.valid(z, a, b)
            pyro.factor("valid", torch.where(valid, 0.0, self.invalid))
            if self.target == "uniform":
                pyro.factor("no opinion", torch.where(valid, -_finite(prior.log_prob(z)), 0.0))
            return z

    def guide(self, a: Tensor, b: Tensor) -> Tensor:
        """z ~ q(z | a, b), by a language model that reads the same prompt.

        :param a: lower bounds, (B,).
        :param b: upper bounds, (B,).
        :returns: z, (..., B, max_tokens + 1).
        """
        if self.guide_lm is None:
            raise ValueError("guide_lm: this RandomNumber was made without a guide")
        with pyro.plate("prompts", len(a)):
            return pyro.sample("z", self.completion(self.guide_lm, a, b))

    def digits(self, a: Tensor, b: Tensor) -> Tensor:
        """The model's joint on valid answers, which are made of digits: few enough to enumerate.

        z ~ LM(prompt) among digits and the stop, p_d(z); the factor p(z) / p_d(z) corrects for the tokens left out.

        :param a: lower bounds, (B,).
        :param b: upper bounds, (B,).
        :returns: z, (..., B, max_tokens + 1).
        """
        among = [self.lm.token_id(digit) for digit in "0123456789."]
        prior, spelled = self.completion(self.lm, a, b), self.completion(self.lm, a, b, allowed=among)
        with pyro.plate("prompts", len(a)):
            z = pyro.sample("z", spelled)
            pyro.factor("valid", torch.where(self.valid(z, a, b), 0.0, -torch.inf))
            joint = prior.log_prob(z) if self.target == "valid" else 0.0
            pyro.factor("any answer", joint - _finite(spelled.log_prob(z)))
            return z

    def valid(self, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Whether answers are numbers within the bounds, without leading zeros.

        :param z: answers, (..., B, L).
        :param a: lower bounds, (B,).
        :param b: upper bounds, (B,).
        :returns: (..., B).
        """
        number = text.map(number_in, z, self.lm)
        return (a <= number) & (number <= b)

    def completion(self, lm: LanguageModel, a: Tensor, b: Tensor, allowed: Sequence[int] | None = None) -> Completion:
        """The distribution of a language model's answers.

        :param lm: a language model.
        :param a: lower bounds, (B,).
        :param b: upper bounds, (B,).
        :param allowed: the ids of the only tokens that may be drawn; None: all.
        :returns: a `Completion`.
        """
        prompts = lm.encode([Bounds(*pair).prompt for pair in zip(a.tolist(), b.tolist(), strict=True)])
        # Decoding drops an eos, so "4<eos>2." would read as 42.  So eos ends an answer, too, and makes it invalid.
        return Completion(lm, prompts, max_tokens=self.max_tokens, stop=(".", "eos"), allowed=allowed)


def number_in(answer: str) -> int:
    """The number in an answer with its stop; -1 where there is none.

    >>> [number_in(s) for s in ("42.", "042.", "a number.", ".")]
    [42, -1, -1, -1]
    """
    found = re.fullmatch(r"(0|[1-9]\d{0,8})\.", answer)
    return int(found[1]) if found else -1


def _finite(log_prob: Tensor) -> Tensor:
    """-inf as 0: a text that is never drawn has no density to cancel, and its own site gives -inf already."""
    return log_prob.masked_fill(log_prob == -torch.inf, 0.0)


def tensors(pairs: Sequence[Bounds], device: str | torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The arguments (a, b) of model and guide, each (B,)."""
    a, b = torch.tensor(pairs, device=device).T
    return a.contiguous(), b.contiguous()
