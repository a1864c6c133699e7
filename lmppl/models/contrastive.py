"""Contrastive: what is likely after x and unlikely after x'.

q(z | x, x')  proportional to  p(z | x)^a / p(z | x')^b
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from random import Random
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ..constraints import Constraint, Slots
from ..distributions import Completion
from ..embedded.stories import ADJECTIVES, GETTING, NAMES, OBJECTS, PLACES, VERBS
from ..inference import Enumeration
from ..language_model import LanguageModel
from .data_files import read_lines
from .experiment import Experiment, Recipe, paper_setting, split

TEMPLATE = "{other}\n\n{x}"
LONGEST = 30  # tokens of a continuation on other language models
EMBEDDED_LONGEST = 5
EMBEDDED_PROMPT = "Story: {x}\nStory:"  # what follows is the same story's next sentence, or another story's first
SIZES = 512, 16, 16  # pairs for training, validation and test
RECIPE = Recipe(steps=300, quick_steps=100)


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


def sentences(lm: LanguageModel) -> Slots:
    """The 2,560 sentences of the embedded stories: beginnings, middles and endings."""
    who, got, adjectives, things, verbs, names, places = (
        [f" {word}" for word in words] for words in (("He", "She"), GETTING, ADJECTIVES, OBJECTS, VERBS, NAMES, PLACES)
    )
    return Slots(
        lm,
        [names, [" went"], [" to"], [" the"], places, ["."]],
        [who, got, [" the"], adjectives, things, ["."]],
        [who, verbs, [" it"], ["."]],
    )


def character_pairs() -> list[list[Pair]]:
    """Beginnings of stories for training, validation and test, no beginning in two of them."""
    random = Random("characters")
    told = [EMBEDDED_PROMPT.format(x=f"{name} went to the {place}.") for name in NAMES for place in PLACES]
    random.shuffle(told)
    groups = told[:48], told[48:56], told[56:]
    return [[Pair(*random.sample(g, 2)) for _ in range(n)] for g, n in zip(groups, SIZES, strict=True)]


def object_pairs() -> list[list[Pair]]:
    """Middles of stories that differ in their object, for training, validation and test: no two objects in two of them.

    In every other pair a verb fits both objects, so that the contrast must find the one that fits x alone.
    """
    random, count = Random("objects"), len(OBJECTS)
    close = [(i, (i + 1) % count) for i in range(count)]
    far = [(i, j) for i, j in combinations(range(count), 2) if j - i not in (1, count - 1)]
    random.shuffle(close)
    random.shuffle(far)

    def taken(pairs: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
        """``size`` pairs, which are then gone; where there are too few, they come again."""
        own, pairs[:] = pairs[:size], pairs[size:]
        return [own[i % len(own)] for i in range(size)]

    def told(things: tuple[int, int]) -> Pair:
        said = f"{random.choice(('He', 'She'))} {random.choice(GETTING)} the {random.choice(ADJECTIVES)}"
        return Pair(*(EMBEDDED_PROMPT.format(x=f"{said} {OBJECTS[i]}.") for i in random.sample(things, 2)))

    splits = [
        [told(pair) for both in zip(taken(close, n // 2), taken(far, n // 2), strict=True) for pair in both]
        for n in reversed(SIZES)
    ]
    return splits[::-1]


DIFFER = {"characters": character_pairs, "objects": object_pairs}


def read_pairs(path: str | Path) -> list[Pair]:
    """Pairs of prompts from a text file, two a line with a tab between them; empty lines are passed over.

    :raises ValueError: naming the file and line, where a line is not two prompts or the file has none.
    """
    pairs = []
    for number, line in read_lines(path):
        parts = [part.strip() for part in line.split("\t")]
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"data: {path}, line {number} is not two prompts with a tab between them")
        pairs.append(Pair(*parts))
    if not pairs:
        raise ValueError(f"data: {path} has no pair of prompts in it")
    return pairs


def experiment(
    lm: LanguageModel | None = None,
    data: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    setting: str = "posterior",
    device: str | None = None,
    a: float = 1.25,
    b: float = 0.25,
    max_tokens: int | None = None,
    differ: str | None = None,
) -> Experiment:
    """What is likely after one prompt and unlikely after another: p(z|x)^a / p(z|x')^b.

    On the embedded story LM, its sentences spelled by the grammar of the stories so that all of them can be counted, or
    on ``lm`` with the file ``data``, two prompts a line with a tab between them; ``checkpoint`` is a trained adapter to
    start from.

    :param differ: in what the two embedded prompts differ: "characters" (the default) or "objects", which is harder.
    :raises ValueError: for another language model without ``data``, and ``differ`` with it or unknown.
    """
    paper_setting(setting)  # the posterior, too
    recipe = recipe or RECIPE
    if lm is not None and data is None:
        raise ValueError("data: another language model needs prompts of its own, a file with two a line, tab between")
    known = data is None  # the target can be enumerated
    lm = lm or LanguageModel.embedded("stories", device=device)
    guide_lm = recipe.guide_lm(lm, seed, checkpoint)
    if differ is not None and (data is not None or differ not in DIFFER):
        raise ValueError(f"differ: expected one of {', '.join(map(repr, DIFFER))}, without `data`; got {differ!r}")
    train, held_out, test = split(read_pairs(data)) if data is not None else DIFFER[differ or "characters"]()
    longest = max_tokens or (EMBEDDED_LONGEST if known else LONGEST)
    task = Contrastive(lm, guide_lm, a=a, b=b, max_tokens=longest, allowed=sentences(lm) if known else None)

    def describe(i: int) -> str:
        return " [...]    and not after: ".join(prompt.replace("\n", " / ") for prompt in test[i])

    return Experiment(
        name="contrastive",
        lm=lm,
        guide_lm=guide_lm,
        model=task.model,
        guide=task.guide,
        batches=recipe.batches(*task.encode(train), seed=seed),
        held_out=task.encode(held_out),
        test=task.encode(test),
        describe=describe,
        exact=Enumeration(task.model) if known else None,
        recipe=recipe,
        target=f"p(z|x)^{a:g} / p(z|x')^{b:g}",
    )
