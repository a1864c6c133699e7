"""Contrastive on the embedded stories, or on the user's prompts; the programs are in `programs/contrastive.py`."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from random import Random
from typing import Unpack

from ..constraints import Slots
from ..embedded.stories import ADJECTIVES, GETTING, NAMES, OBJECTS, PLACES, VERBS
from ..inference import Enumeration
from ..language_model import LanguageModel
from .data_files import read_each
from .experiment import Experiment, Options, Recipe, Start, split
from .programs.contrastive import EMBEDDED_LONGEST, Contrastive, Pair

LONGEST = 30  # tokens of a continuation on other language models
EMBEDDED_PROMPT = "Story: {x}\nStory:"  # the same story's next sentence follows, or another story's first
SIZES = 512, 16, 16  # pairs for training, validation and test
RECIPE = Recipe(steps=300, quick_steps=100)


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
    """Pairs of beginnings of stories for training, validation and test; no beginning is in two of them."""
    random = Random("characters")
    told = [EMBEDDED_PROMPT.format(x=f"{name} went to the {place}.") for name in NAMES for place in PLACES]
    random.shuffle(told)
    groups = told[:48], told[48:56], told[56:]
    return [[Pair(*random.sample(g, 2)) for _ in range(n)] for g, n in zip(groups, SIZES, strict=True)]


def object_pairs() -> list[list[Pair]]:
    """Pairs of middles that differ in their object, for training, validation and test, without common pairs.

    In every other pair one verb fits both objects, so that the contrast must find the verb that fits x alone.
    """
    random, count = Random("objects"), len(OBJECTS)
    close = [(i, (i + 1) % count) for i in range(count)]
    far = [(i, j) for i, j in combinations(range(count), 2) if j - i not in (1, count - 1)]
    random.shuffle(close)
    random.shuffle(far)

    def taken(pairs: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
        """Removes ``size`` pairs from the list and returns them, repeated where there are too few."""
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


def pair(line: str) -> Pair:
    """The two prompts of a line, with a tab between them."""
    parts = [part.strip() for part in line.split("\t")]
    if len(parts) != 2 or not all(parts):
        raise ValueError("is not two prompts with a tab between them")
    return Pair(*parts)


def read_pairs(path: str | Path) -> list[Pair]:
    """Pairs of prompts from a text file, two in each line with a tab between them; errors as in `read_each`."""
    return read_each(path, pair, "pair of prompts")


def experiment(
    lm: LanguageModel | None = None,
    data: str | Path | None = None,
    *,
    a: float = 1.25,
    b: float = 0.25,
    max_tokens: int | None = None,
    differ: str | None = None,
    **options: Unpack[Options],
) -> Experiment:
    """What is likely after one prompt and unlikely after another: p(z|x)^a / p(z|x')^b.

    It runs on the embedded story LM, limited to sentences of the stories so that all of them can be counted, or on
    ``lm`` with the prompts of the file ``data``.

    :param lm: a language model; None: the embedded one.
    :param data: a text file with two prompts in each line, with a tab between them; None: the embedded stories.
    :param a: the power of p(z|x), positive.
    :param b: the power of p(z|x'), not negative.
    :param max_tokens: the most tokens of a sentence before its stop; None: 5 on the embedded stories, 30 with ``data``.
    :param differ: how the two embedded prompts differ: in "characters" (None, the default) or in "objects", which is
        harder.
    :param options: those of every experiment, see `experiment.Options`.
    :returns: an `Experiment`.
    :raises ValueError: for another language model without ``data``, and ``differ`` with ``data`` or unknown.
    """
    if differ is not None and (data is not None or differ not in DIFFER):
        raise ValueError(f"differ: expected one of {', '.join(map(repr, DIFFER))}, without `data`; got {differ!r}")
    needs, known = "prompts of its own, a file with two per line and a tab between", data is None
    start = Start.of("contrastive", "stories", lm, data, RECIPE, needs, **options)
    pairs = DIFFER[differ or "characters"]() if data is None else split(read_pairs(data))
    longest, allowed = (EMBEDDED_LONGEST, sentences(start.lm)) if known else (LONGEST, None)
    longest = longest if max_tokens is None else max_tokens
    task = Contrastive(start.lm, start.guide_lm, a=a, b=b, max_tokens=longest, allowed=allowed)
    return start.experiment(
        task,
        pairs,
        lambda told: " [...]    and not after: ".join(prompt.replace("\n", " / ") for prompt in told),
        exact=Enumeration(task.model) if known else None,
        target=f"p(z|x)^{a:g} / p(z|x')^{b:g}",
    )
