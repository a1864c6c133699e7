r"""Transfer: one guide for many posteriors, which reads a description of the task.

A task says what is known of a text z that follows x, and leaves blank what is not:

    x   what comes before it (blank: z is a beginning)
    y   what follows it, observed;   v   what else might have followed it, observed as well
    w   words, one of which it contains
    T   the temperature of all of this

    p(z | task)  proportional to  [ LM(z | x) LM(y | x z) LM(v | x z) e^(-s 1[z has none of w]) ]^(1/T)

Blanks make the families: infilling (x, y), reverse (y), lexical (x, w), tempered (x, T), two endings (x, y, v).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ... import text
from ...constraints import Constraint
from ...distributions import Completion
from ...language_model import LanguageModel
from ...text import length

PREFIX = ""
TEMPLATE = "Temperature:{T}\nWords:{w}\nEnding:{y}{v}\nText:{x}"


class Description(NamedTuple):
    """A task in strings: "" is a blank; ``w`` has its words with spaces between; each text begins with its space."""

    x: str = ""
    y: str = ""
    v: str = ""
    w: str = ""
    T: float = 1.0


class Transfer:
    r"""The model and guide of all tasks that leave blanks, for any language model.

    .. math:: p(z \mid x, y, v, w, T) \propto
              \big[ p(z \mid x) \, p(y \mid x z) \, p(v \mid x z) \, e^{-s \, 1[z \text{ has none of } w]} \big]^{1/T}

    An observation that is blank says nothing: an empty y or v is certain, no words exclude nothing, and T = 1 leaves
    the rest be.  So any choice of blanks is a task of the same program, and the guide may be asked for choices that it
    was never trained on.

    :param lm: the language model p, frozen.
    :param guide_lm: the guide's, usually ``lm.with_adapter(...)``; None: no guide.
    :param prefix: what stands before x.
    :param strength: s, nats: what contains none of the words has e^-s of its probability; finite, so that a guide can
        learn it.
    :param max_tokens: the most tokens of z before its stop.
    :param stop: its stop, a sentence end.
    :param allowed: a constraint on its tokens, of model and guide.
    :param template: the guide's prompt, with the fields x, y, v, w and T; its end is where z begins.
    :param write: the words for a temperature.

    `model(x, y, v, w, T)` and `guide(x, y, v, w, T)` are Pyro programs over texts x, y, v and w, (B, L) each, and
    temperatures T (B,), with one plate.

    :raises ValueError: for a strength that is negative or not finite.
    """

    def __init__(
        self,
        lm: LanguageModel,
        guide_lm: LanguageModel | None = None,
        *,
        prefix: str = PREFIX,
        strength: float = 8.0,
        max_tokens: int = 30,
        stop: str = ".",
        allowed: Constraint | None = None,
        template: str = TEMPLATE,
        write: Callable[[float], str] = " {:g}".format,
    ):
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength: expected nats, zero or more, got {strength}")
        self.lm, self.guide_lm, self.prefix, self.strength = lm, guide_lm, lm.encode(prefix), strength
        self.max_tokens, self.stop, self.allowed = max_tokens, stop, allowed
        self.template, self.write = template, write

    def model(self, x: Tensor, y: Tensor, v: Tensor, w: Tensor, T: Tensor) -> Tensor:
        """z ~ LM(x); what follows x z begins with y, or with v, independently; z has one of the words; all to 1 / T."""
        before = self.lm.join(self.prefix, x)
        with pyro.plate("tasks", len(x)), poutine.scale(scale=1 / T):
            z = pyro.sample("z", self.completion(self.lm, before))
            told = self.lm.join(before, z)
            for name, seen in (("y", y), ("v", v)):
                pyro.sample(name, Completion(self.lm, told, max_tokens=length(seen), stop=None), obs=seen)
            pyro.factor("words", -self.strength * (~self.has_one(z, w)).to(T.dtype))
            return z

    def guide(self, x: Tensor, y: Tensor, v: Tensor, w: Tensor, T: Tensor) -> Tensor:
        """z ~ q(z | task), a language model that reads the description."""
        with pyro.plate("tasks", len(x)):
            return pyro.sample("z", self.proposal(x, y, v, w, T))

    def proposal(
        self, x: Tensor, y: Tensor, v: Tensor, w: Tensor, T: Tensor, lm: LanguageModel | None = None
    ) -> Completion:
        """q(z | task), by the guide's language model, or another one that reads descriptions."""
        lm = self.guide_lm if lm is None else lm
        if lm is None:
            raise ValueError("guide_lm: this Transfer was made without a guide")
        return self.completion(lm, self.described(x, y, v, w, T))

    def prior(self, x: Tensor) -> Completion:
        """LM(z | x)."""
        return self.completion(self.lm, self.lm.join(self.prefix, x))

    def described(self, x: Tensor, y: Tensor, v: Tensor, w: Tensor, T: Tensor) -> Tensor:
        """What the guide reads, (B, L)."""
        fields = {"x": x, "y": y, "v": v, "w": w}
        if "{T}" in self.template:
            fields["T"] = self.lm.encode([self.write(t) for t in T.tolist()])
        return self.lm.fill(self.template, **{n: v for n, v in fields.items() if f"{{{n}}}" in self.template})

    def has_one(self, z: Tensor, w: Tensor) -> Tensor:
        """Whether texts z (..., B, L) have one of the words of each task, w (B, Lw), as whole words: (..., B)."""
        asked = [tuple(words.split()) for words in self.lm.decode(w)]
        kinds = list(dict.fromkeys(asked))  # (K)

        def of(said: str) -> Tensor:
            found = set(re.findall(r"\w+", said))
            return torch.tensor([not words or not found.isdisjoint(words) for words in kinds], device="cpu")

        has = text.map(of, z, self.lm).to(z.device)  # (..., B or 1, K)
        which = torch.tensor([kinds.index(words) for words in asked], device=z.device)
        batch = *has.shape[:-2], len(asked)
        return has.expand(*batch, -1).gather(-1, which.expand(batch)[..., None])[..., 0]

    def completion(self, lm: LanguageModel, prompt: Tensor) -> Completion:
        """What a language model writes after a prompt."""
        return Completion(lm, prompt, max_tokens=self.max_tokens, stop=self.stop, allowed=self.allowed)

    def encode(self, tasks: Sequence[Description]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The arguments (x, y, v, w, T) of model and guide.

        :raises ValueError: for a temperature that is not positive.
        """
        if wrong := [task.T for task in tasks if not 0 < task.T < float("inf")]:
            raise ValueError(f"T: expected positive temperatures, got {wrong[0]}")
        x, y, v, w = (self.lm.encode([getattr(task, name) for task in tasks]) for name in "xyvw")
        return x, y, v, w, torch.tensor([task.T for task in tasks], device=self.lm.device)
