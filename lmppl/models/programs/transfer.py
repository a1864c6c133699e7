"""Transfer: one guide for many posteriors, which reads a description of the task.

A task states what is known of a text z that follows x; what is unknown is left blank:

    x   what comes before it (blank: z is a beginning) y   what follows it, observed;   v   what else might have
    followed it, observed as well w   words, of which it contains at least one T   the temperature of all of this

    p(z | task)  proportional to  [ LM(z | x) LM(y | x z) LM(v | x z) e^(-s 1[z has none of w]) ]^(1/T)

The blanks define the families: infilling (x, y), reverse (y), lexical (x, w), tempered (x, T), two endings (x, y, v).
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
    """A task in strings: "" is a blank; ``w`` has words separated by spaces; each text begins with its space."""

    x: str = ""
    y: str = ""
    v: str = ""
    w: str = ""
    T: float = 1.0


class Transfer:
    r"""The model and guide of all tasks that leave blanks: a text z, given what a description states.

    .. math:: p(z \mid x, y, v, w, T) \propto
              \big[ p(z \mid x) \, p(y \mid x z) \, p(v \mid x z) \, e^{-s \, 1[z \text{ has none of } w]} \big]^{1/T}

    A blank is no observation: an empty y or v has probability 1, no words exclude nothing, and T = 1 changes nothing.
    So any choice of blanks is a task of the same program, and the guide can be applied to choices on which it was not
    trained.

    :param lm: the language model p; it is not trained.
    :param guide_lm: the guide's language model, usually ``lm.with_adapter(...)``; None: there is no guide.
    :param prefix: the text before x.
    :param strength: s >= 0, nats: a text that contains none of the words has e^-s of its probability; finite, so that a
        guide can learn it.
    :param max_tokens: the most tokens of z before its stop.
    :param stop: the stop of z, the end of a sentence.
    :param allowed: a constraint on the tokens of z, in model and guide; None: there is none.
    :param template: the guide's prompt, with the fields x, y, v, w and T; z follows it.
    :param write: a function from a temperature to its string in the prompt.

    `model(x, y, v, w, T)` and `guide(x, y, v, w, T)` are Pyro programs over texts x, y, v and w, (B, L) each, and
    temperatures T (B,), with one plate.  The latent site is "z", (B, max_tokens + 1).

    :raises ValueError: for a strength that is negative or not finite.

    Example::

        lm = LanguageModel.embedded("stories")
        q = lm.with_adapter(LoraConfig(r=16, target_modules="all-linear"))
        task = Transfer(lm, q, max_tokens=7, template="Ending:{y}{v}\nNote:{w}\nBeginning:{x}")
        infilling = Description(x="Tom went to the attic.", y=" He oiled it.")
        lexical = Description(x="Mia went to the beach.", w=" ball kite")
        arguments = task.encode([infilling, lexical])
        posterior = Importance(task.model, task.guide, num_particles=64).run(*arguments)
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
        """z ~ LM(x); y and v follow x z, independently; z has one of the words; all to the power 1 / T.

        :param x: what comes before, (B, Lx).
        :param y: what follows, (B, Ly).
        :param v: what else might have followed, (B, Lv).
        :param w: words, (B, Lw).
        :param T: temperatures, (B,).
        :returns: z, (..., B, max_tokens + 1).
        """
        before = self.lm.join(self.prefix, x)
        with pyro.plate("tasks", len(x)), poutine.scale(scale=1 / T):
            z = pyro.sample("z", self.completion(self.lm, before))
            told = self.lm.join(before, z)
            for name, seen in (("y", y), ("v", v)):
                pyro.sample(name, Completion(self.lm, told, max_tokens=length(seen), stop=None), obs=seen)
            pyro.factor("words", -self.strength * (~self.has_one(z, w)).to(T.dtype))
            return z

    def guide(self, x: Tensor, y: Tensor, v: Tensor, w: Tensor, T: Tensor) -> Tensor:
        """z ~ q(z | task), by a language model that reads the description.

        :param x: what comes before, (B, Lx).
        :param y: what follows, (B, Ly).
        :param v: what else might have followed, (B, Lv).
        :param w: words, (B, Lw).
        :param T: temperatures, (B,).
        :returns: z, (..., B, max_tokens + 1).
        """
        with pyro.plate("tasks", len(x)):
            return pyro.sample("z", self.proposal(x, y, v, w, T))

    def proposal(
        self, x: Tensor, y: Tensor, v: Tensor, w: Tensor, T: Tensor, lm: LanguageModel | None = None
    ) -> Completion:
        """q(z | task), by the guide's language model, or another one that reads descriptions.

        :param x: what comes before, (B, Lx).
        :param y: what follows, (B, Ly).
        :param v: what else might have followed, (B, Lv).
        :param w: words, (B, Lw).
        :param T: temperatures, (B,).
        :param lm: a language model; None: the guide's.
        :returns: a `Completion`.
        :raises ValueError: where there is none.
        """
        lm = self.guide_lm if lm is None else lm
        if lm is None:
            raise ValueError("guide_lm: this Transfer was made without a guide")
        return self.completion(lm, self.described(x, y, v, w, T))

    def prior(self, x: Tensor) -> Completion:
        """LM(z | x).

        :param x: what comes before, (B, Lx).
        :returns: a `Completion`.
        """
        return self.completion(self.lm, self.lm.join(self.prefix, x))

    def described(self, x: Tensor, y: Tensor, v: Tensor, w: Tensor, T: Tensor) -> Tensor:
        """What the guide reads.

        :param x: what comes before, (B, Lx).
        :param y: what follows, (B, Ly).
        :param v: what else might have followed, (B, Lv).
        :param w: words, (B, Lw).
        :param T: temperatures, (B,).
        :returns: texts (B, L).
        """
        fields = {"x": x, "y": y, "v": v, "w": w}
        if "{T}" in self.template:
            fields["T"] = self.lm.encode([self.write(t) for t in T.tolist()])
        return self.lm.fill(self.template, **{n: v for n, v in fields.items() if f"{{{n}}}" in self.template})

    def has_one(self, z: Tensor, w: Tensor) -> Tensor:
        """Whether texts contain one of the words of their tasks, as a whole word.

        :param z: texts, (..., B, L).
        :param w: words, (B, Lw); no words: True.
        :returns: (..., B).
        """
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
        """The distribution of what a language model writes after a prompt.

        :param lm: a language model.
        :param prompt: texts (..., B, L).
        :returns: a `Completion`.
        """
        return Completion(lm, prompt, max_tokens=self.max_tokens, stop=self.stop, allowed=self.allowed)

    def encode(self, tasks: Sequence[Description]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The arguments of model and guide.

        :param tasks: B descriptions.
        :returns: (x, y, v, w, T).
        :raises ValueError: for a temperature that is not positive.
        """
        if wrong := [task.T for task in tasks if not 0 < task.T < float("inf")]:
            raise ValueError(f"T: expected positive temperatures, got {wrong[0]}")
        x, y, v, w = (self.lm.encode([getattr(task, name) for task in tasks]) for name in "xyvw")
        return x, y, v, w, torch.tensor([task.T for task in tasks], device=self.lm.device)
