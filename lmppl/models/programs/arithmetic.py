"""Arithmetic: the chain of thought from a sum to its answer, with a calculator in the language model.

z ~ LM(x) with the calculator's results filled in,    y ~ LM(x z) observed;    wanted: p(z | x, y)

    x  "Question: 6 - 0 - 4 = ? Answer:"    z  " 6 - 0 = 6, 6 - 4 = 2."    y  " The answer is 2."

Hu et al. 2024, "Amortizing intractable inference in large language models", section 4.4.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from ...distributions import Completion
from ...embedded import Question
from ...embedded.arithmetic import ANSWER, MAX_TOKENS
from ...language_model import LanguageModel
from ...text import length
from ...tools import Calculator

VOTES, LONGEST_ANSWER = 10, 4  # answers to a question; tokens after "The answer is", on other language models


class Arithmetic:
    r"""The model and guide of arithmetic: the chain of thought z between a sum x and its answer y.

    .. math:: p(z \mid x, y) \propto p(z \mid x) \, p(y \mid x z)

    :param lm: the language model p; it is not trained.
    :param guide_lm: the guide's language model, usually ``lm.with_adapter(...)``; None: there is no guide.
    :param max_tokens: the most tokens of a chain before its stop, the calculator's among them.
    :param stop: the chain's stop.
    :param sees_answer: whether the guide reads y before x.  By default it does not, because then it can predict: the
        answer is unknown when predicting.

    `model(x, y)` and `guide(x, y)` are Pyro programs over questions x (B, Lx) and answers y (B, Ly), with one plate.
    The latent site is "z", (B, L).

    Source: Hu et al. 2024, "Amortizing intractable inference in large language models", section 4.4.

    Example::

        lm = LanguageModel.embedded("arithmetic")
        task = Arithmetic(lm, lm.with_adapter(LoraConfig(r=16, target_modules="all-linear")))
        questions = embedded.data("arithmetic", "test_4")[:2]
        posterior = Importance(task.model, task.guide, num_particles=64).run(*task.encode(questions))
        posterior.table("z", 0)  # chains for the first question, with their probabilities
        task.predict(questions, votes=4)
    """

    def __init__(
        self,
        lm: LanguageModel,
        guide_lm: LanguageModel | None = None,
        *,
        max_tokens: int = MAX_TOKENS,
        stop: str = ".",
        sees_answer: bool = False,
    ):
        self.lm, self.guide_lm, self.tools = lm, guide_lm, (Calculator(),)
        self.max_tokens, self.stop, self.sees_answer = max_tokens, stop, sees_answer

    def model(self, x: Tensor, y: Tensor) -> Tensor:
        """z ~ LM(x); the text after x z begins with y.

        :param x: questions, (B, Lx).
        :param y: answers, (B, Ly).
        :returns: z, (..., B, L).
        """
        with pyro.plate("questions", len(x)):
            z = pyro.sample("z", self.chain(self.lm, x))
            pyro.sample("y", Completion(self.lm, self.lm.join(x, z), max_tokens=length(y), stop=None), obs=y)
            return z

    def guide(self, x: Tensor, y: Tensor) -> Tensor:
        """z ~ q(z | x), or q(z | x, y) where the guide sees the answer.

        :param x: questions, (B, Lx).
        :param y: answers, (B, Ly).
        :returns: z, (..., B, L).
        """
        if self.guide_lm is None:
            raise ValueError("guide_lm: this Arithmetic was made without a guide")
        with pyro.plate("questions", len(x)):
            return pyro.sample("z", self.chain(self.guide_lm, self.lm.join(y, x) if self.sees_answer else x))

    def chain(self, lm: LanguageModel, x: Tensor, temperature: float = 1.0) -> Completion:
        """The distribution of the chains that a language model writes after a question.

        :param lm: a language model.
        :param x: questions, (B, Lx).
        :param temperature: of every token.
        :returns: a `Completion` with the calculator.
        """
        return Completion(lm, x, max_tokens=self.max_tokens, stop=self.stop, tools=self.tools, temperature=temperature)

    def encode(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """The arguments of model and guide for these questions.

        :param questions: B of them.
        :returns: (x, y).
        """
        return self.lm.encode([q.x for q in questions]), self.lm.encode([q.y for q in questions])

    def chains(self, questions: Sequence[Question]) -> Tensor:
        """The correct chain of each question.

        :param questions: B of them.
        :returns: texts (B, L).
        """
        return self.lm.encode([q.chain for q in questions])

    @torch.no_grad()
    def predict(
        self,
        questions: Sequence[Question],
        lm: LanguageModel | None = None,
        votes: int = VOTES,
        temperature: float = 1.0,
    ) -> list[list[Prediction]]:
        """Draws chains z_n ~ q(z | x), each with an answer y_n ~ p(y | x z_n), without knowing y.

        :param questions: B of them.
        :param lm: the language model that writes the chains; None: the guide's, or where there is none the model's.
        :param votes: how many chains for each question.
        :param temperature: of every token.
        :returns: for each question a list of ``votes`` predictions.
        :raises ValueError: where the guide sees the answer.
        """
        if self.sees_answer:
            raise ValueError("sees_answer: a guide that reads the answer cannot predict it")
        x, _ = self.encode(questions)
        return self.answered(
            x, self.chain(lm or self.guide_lm or self.lm, x, temperature).sample((votes,)), temperature
        )

    @torch.no_grad()
    def answered(self, x: Tensor, z: Tensor, temperature: float = 1.0) -> list[list[Prediction]]:
        """Draws an answer y_n ~ p(y | x z_n) after each of these chains.

        :param x: questions, (B, Lx).
        :param z: chains, (n, B, L).
        :param temperature: of every token.
        :returns: for each question a list of n predictions.
        """
        told = self.lm.join(x, z, ANSWER)
        last = Completion(self.lm, told, max_tokens=LONGEST_ANSWER, stop=self.stop, temperature=temperature).sample()
        written = zip(self.lm.decode(z), self.lm.decode(last), strict=True)
        by_vote = [[Prediction(c, number_in(a)) for c, a in zip(*row, strict=True)] for row in written]
        return [list(votes) for votes in zip(*by_vote, strict=True)]


class Prediction(NamedTuple):
    """A chain, and the answer given after it; None, where the answer is not a number."""

    chain: str
    answer: int | None


def number_in(answer: str) -> int | None:
    """The number in an answer with its stop; None where there is none.

    >>> [number_in(s) for s in (" 12.", " -4.", " so.", " 1 2.")]
    [12, -4, None, None]
    """
    found = re.fullmatch(r" ?(-?[0-9]{1,9}) ?\.?", answer)
    return int(found[1]) if found else None
