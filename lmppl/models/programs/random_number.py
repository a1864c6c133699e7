"""A random number: what a language model says is neither valid nor uniform, and the posterior is.

z ~ LM("... a random integer drawn uniformly between {a} and {b}: "),    1[a <= z <= b] observed

    target "valid":    p(z | a <= z <= b), the language model conditioned on validity
    target "uniform":  1[a <= z <= b] / (b - a + 1): a factor 1 / p(z) takes the language model's opinion back
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
    """The model and guide of a random number, for any language model.

    :param lm: the language model p, frozen.
    :param guide_lm: the guide's, usually ``lm.with_adapter(...)``; None: no guide.
    :param target: "uniform" or "valid".
    :param max_tokens: the most tokens of an answer before its stop.
    :param invalid: the logarithm of the factor on other answers, -inf: they are impossible.  With -6 they are there as
        the language model has them, e^-6 p(z), at most 2.5e-5 of the mass beside 101 numbers of joint 1: for large
        vocabularies, where a guide would have to put exact zeros on 10^14 texts that are all alike.

    `model(a, b)` and `guide(a, b)` are Pyro programs over bounds a, b (B,), with one plate of prompts.

    :raises ValueError: for a target that is neither.
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
        """z ~ LM(prompt); z is valid; perhaps its probability is cancelled."""
        prior = self.completion(self.lm, a, b)
        with pyro.plate("prompts", len(a)):
            z = pyro.sample("z", prior)
            valid = self.valid(z, a, b)
            pyro.factor("valid", torch.where(valid, 0.0, self.invalid))
            if self.target == "uniform":
                pyro.factor("no opinion", torch.where(valid, -_finite(prior.log_prob(z)), 0.0))
            return z

    def guide(self, a: Tensor, b: Tensor) -> Tensor:
        """z ~ q(z | a, b), a language model that reads the same prompt."""
        if self.guide_lm is None:
            raise ValueError("guide_lm: this RandomNumber was made without a guide")
        with pyro.plate("prompts", len(a)):
            return pyro.sample("z", self.completion(self.guide_lm, a, b))

    def digits(self, a: Tensor, b: Tensor) -> Tensor:
        """The model's joint of valid answers, which are made of digits: few enough to enumerate.

        z ~ LM(prompt) among digits and the stop, p_d(z); the factor p(z) / p_d(z) makes up for what was left out.
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
        """Whether an answer (..., B, L) is a number within the bounds, without leading zeros: (..., B)."""
        number = text.map(number_in, z, self.lm)
        return (a <= number) & (number <= b)

    def completion(self, lm: LanguageModel, a: Tensor, b: Tensor, allowed: Sequence[int] | None = None) -> Completion:
        """What a language model answers, with tokens ``allowed`` only."""
        prompts = lm.encode([Bounds(*pair).prompt for pair in zip(a.tolist(), b.tolist(), strict=True)])
        # Decoding drops an eos, so "4<eos>2." would read as 42: an answer may end with eos, and is then none.
        return Completion(lm, prompts, max_tokens=self.max_tokens, stop=(".", "eos"), allowed=allowed)


def number_in(answer: str) -> int:
    """The number of an answer with its stop; -1 where it is none.

    >>> [number_in(s) for s in ("42.", "042.", "a number.", ".")]
    [42, -1, -1, -1]
    """
    found = re.fullmatch(r"(0|[1-9]\d{0,8})\.", answer)
    return int(found[1]) if found else -1


def _finite(log_prob: Tensor) -> Tensor:
    """What a sampler never draws has no density to cancel: -inf counts as 0, and the site itself says -inf."""
    return log_prob.masked_fill(log_prob == -torch.inf, 0.0)


def tensors(pairs: Sequence[Bounds], device: str | torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The arguments (a, b) of model and guide, each (B,)."""
    a, b = torch.tensor(pairs, device=device).T
    return a.contiguous(), b.contiguous()
