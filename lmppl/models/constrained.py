"""Constrained generation: the conditions, on the embedded stories or on the user's prompts.

The programs are in `programs/constrained.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from .. import embedded, text
from ..constraints import Slots, regex
from ..embedded.stories import ADJECTIVES, GETTING, NAMES, OBJECTS, PLACES, VERBS
from ..inference import Enumeration, Exploration, Mixture, Proposal, Tempered
from ..inference.core.programs import Values
from ..inference.training.gflownet.exploration import Source
from ..inference.training.trainer import Task
from ..language_model import LanguageModel
from .classifier import TokenClassifier, read_labelled
from .continuation import read_prompts
from .experiment import Experiment, Options, Recipe, Start, split
from .programs.constrained import LONGEST, Constrained

CONSTRAINTS = "lexical", "regex", "learned"
WORDS_TEMPLATE = "Words: {w}\n{x}"
EMBEDDED_WORDS = "Note:{w}.\n{x}"
PATTERN = r" \w+ \w+ the old \w+\. \w+ w\w+ it\."  # an old thing, and a verb with w, which fits few things
LABEL = "garden"  # the learned condition: the sentence is like those of stories of this place
TRAINING_WORDS, TEST_PROMPTS = 2048, 8
PENALTY = 12.0  # nats: if a hundredth of the mass satisfies it, the rest keeps e^-12 / 0.01 = 0.0006
RECIPES = {
    "lexical": Recipe(steps=600, quick_steps=200, observations=32, particles=4, learning_rate=3e-3, output_layer=True),
    "regex": Recipe(steps=150, quick_steps=50, learning_rate=3e-3, output_layer=True),
    "learned": Recipe(steps=200, quick_steps=100, output_layer=True),
}


class ContainsWords:
    """The lexical condition: the text contains every word of w as a whole word; log c(z, w) is 0 or -inf.

    z (..., B, L), w (B, L') -> (..., B).
    """

    def __init__(self, lm: LanguageModel):
        self.lm = lm

    def __call__(self, z: Tensor, w: Tensor) -> Tensor:
        asked = [tuple(words.split()) for words in self.lm.decode(w)]
        kinds = list(dict.fromkeys(asked))  # (K)

        def contains(said: str) -> Tensor:
            return torch.tensor([all(_stands_in(word, said) for word in words) for words in kinds])

        has = text.map(contains, z, self.lm)  # (..., B or 1, K)
        which = torch.tensor([kinds.index(words) for words in asked], device=z.device)
        has = has.expand(*has.shape[:-2], len(which), -1).gather(-1, which.expand(*has.shape[:-2], -1)[..., None])
        return torch.zeros(has.shape[:-1], device=z.device).masked_fill(~has[..., 0], -torch.inf)


def _stands_in(word: str, said: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", said) is not None


class Planted(Exploration):
    """Draws the guide's texts and writes the words of the condition over some of their tokens.

    :param where: "anywhere", uniformly, or "end": the last tokens before the stop.
    :raises ValueError: for another ``where``.
    """

    def __init__(self, where: str = "anywhere"):
        if where not in ("anywhere", "end"):
            raise ValueError(f"where: expected 'anywhere' or 'end', got {where!r}")
        self.where = where

    def draw(self, source: Source, num_particles: int) -> Values:
        drawn = source.draw(source.guide, num_particles)
        z, w = drawn["z"], source.args[1]
        size = text.length(w)  # (B)
        room = text.length(z) - 1 - size  # (particle, B); the stop stays
        start = room if self.where == "end" else (torch.rand_like(room, dtype=torch.float) * (room + 1)).long()
        offset = torch.arange(z.shape[-1], device=z.device) - start[..., None]
        inside = (offset >= 0) & (offset < size[:, None]) & (room >= 0)[..., None]
        words = text.pad(w, max(z.shape[-1], w.shape[-1])).expand(*z.shape[:-1], -1)
        return drawn | {"z": torch.where(inside, words.gather(-1, offset.clamp(0, words.shape[-1] - 1)), z)}


def next_sentence(lm: LanguageModel, things: Sequence[str] = OBJECTS, adjectives: Sequence[str] = ADJECTIVES) -> Slots:
    """A constraint: the middles of the embedded stories with one of these objects and one of these adjectives."""
    got, described, objects = ([f" {word}" for word in words] for words in (GETTING, adjectives, things))
    return Slots(lm, [[" He", " She"], got, [" the"], described, objects, ["."]])


def rest_of_story(
    lm: LanguageModel, verbs: Sequence[str] = VERBS, adjectives: Sequence[str] = ADJECTIVES
) -> tuple[Slots, int]:
    """A constraint: middles and endings of the embedded stories with these verbs and adjectives, then eos.

    Also returns their length without eos.
    """
    got, described, things, happened = (
        [f" {word}" for word in words] for words in (GETTING, adjectives, OBJECTS, verbs)
    )
    forms = [
        [[who], got, [" the"], described, things, ["."], [who], happened, [" it"], ["."], ["eos"]]
        for who in (" He", " She")
    ]
    return Slots(lm, *forms), len(forms[0]) - 1


def experiment(
    lm: LanguageModel | None = None,
    data: str | Path | None = None,
    *,
    constraint: str = "lexical",
    words: str | None = None,
    pattern: str | None = None,
    labelled: str | None = None,
    max_tokens: int | None = None,
    **options: Unpack[Options],
) -> Experiment:
    """Texts that satisfy a condition, in the language model's own proportions: words, a pattern or a classifier.

    It runs on the embedded story LM, limited to sentences of the stories so that all texts that satisfy it can be
    counted; or on ``lm`` with the prompts of the file ``data``.

    :param lm: a language model; None: the embedded one.
    :param data: a text file with a prompt in each line; None: the embedded stories.
    :param constraint: "lexical": the next sentence contains an object, in a combination with the beginning that
        training did not have; "regex": the rest of the story matches ``pattern``; "learned": a classifier's probability
        of the next sentence.
    :param words: for "lexical" with ``data``: the words to contain, with commas between alternatives that the prompts
        take in turn, "fire, cold water".
    :param pattern: for "regex" with ``data``: a regular expression of the whole text; needs the extra ``grammar``.
    :param labelled: for "learned" with ``data``: a file to fit the classifier on, see `read_labelled`.
    :param max_tokens: the most tokens of a text before its stop, with ``data``; None: 30.
    :param options: those of every experiment, see `experiment.Options`.
    :returns: an `Experiment`.
    :raises ValueError: for another constraint, and another language model without what it needs.
    """
    if constraint not in CONSTRAINTS:
        raise ValueError(f"constraint: expected one of {', '.join(map(repr, CONSTRAINTS))}, got {constraint!r}")
    needs, recipe = "prompts of its own, a file with one per line", RECIPES[constraint] if data is None else Recipe()
    start = Start.of("constrained", "stories", lm, data, recipe, needs, **options)
    needed = {"lexical": ("words", words), "regex": ("pattern", pattern), "learned": ("labelled", labelled)}
    for of, (name, value) in needed.items():
        if value is not None and (of != constraint or data is None):
            raise ValueError(f"{name}: it is for the constraint {of!r} with prompts of your own, `data`")
        if value is None and of == constraint and data is not None:
            raise ValueError(f"{name}: the constraint {constraint!r} needs it with prompts of your own")
    if max_tokens is not None and data is None:
        raise ValueError("max_tokens: it is for prompts of your own, `data`; the embedded prompts have a fixed length")
    value = needed[constraint][1]
    if data is None or value is None:
        setup = EMBEDDED[constraint](start.lm, start.guide_lm)
    else:
        longest = LONGEST if max_tokens is None else max_tokens
        setup = _of_file(start.lm, start.guide_lm, constraint, value, read_prompts(data), longest)
    if setup.exploration is not None:
        objective = partial(start.recipe.objective, exploration=setup.exploration)  # type: ignore[call-arg]
        start = replace(start, recipe=replace(start.recipe, objective=objective))
    task, encode = setup.task, partial(_encode, start.lm)
    training = task.relaxed(PENALTY) if constraint != "learned" else task.model
    batches = start.recipe.batches(*encode(setup.observations[0]), seed=start.seed)
    return start.experiment(
        task,
        setup.observations,
        lambda told: "    with: ".join(part.strip() for part in told),
        encode=encode,
        batches=[Task(training, task.guide, batches)],
        exact=Enumeration(task.among(setup.satisfying)) if setup.satisfying is not None else None,
        target=f"p(z|x) under the {constraint} condition",
    )


class Setup(NamedTuple):
    """A constrained task: its observations, (x,) or (x, w) each, for training, validation and test."""

    task: Constrained
    observations: Sequence[Sequence[tuple[str, ...]]]
    exploration: Exploration | None = None
    satisfying: Callable[..., Tensor] | None = None  # (x, w) -> all texts that can satisfy it, perhaps more, (K, L)


def _encode(lm: LanguageModel, observations: Sequence[tuple[str, ...]]) -> tuple[Tensor, ...]:
    """The arguments of model and guide."""
    return tuple(lm.encode(list(column)) for column in zip(*observations, strict=True))


def _embedded_lexical(lm: LanguageModel, guide_lm: LanguageModel) -> Setup:
    """A story's next sentence contains an object; no combination of object and beginning occurs twice."""
    random = Random("words")
    observations = [(x, f" {thing}") for (x,) in sum(beginnings(), []) for thing in OBJECTS]
    chosen = random.sample(observations, TRAINING_WORDS + 2 * TEST_PROMPTS)
    task = Constrained(
        lm, guide_lm, condition=ContainsWords(lm), max_tokens=5, stop=".", template=EMBEDDED_WORDS,
        allowed=next_sentence(lm),
    )  # fmt: skip
    exploration = Mixture((Tempered(), 0.5), (Planted("end"), 0.5))

    def satisfying(x: Tensor, w: Tensor) -> Tensor:
        return next_sentence(lm, sorted({words.strip() for words in lm.decode(w)})).texts()

    splits = chosen[2 * TEST_PROMPTS :], chosen[:TEST_PROMPTS], chosen[TEST_PROMPTS : 2 * TEST_PROMPTS]
    return Setup(task, splits, exploration, satisfying)


def _embedded_regex(lm: LanguageModel, guide_lm: LanguageModel) -> Setup:
    """The rest of a story matches a pattern."""
    stories, longest = rest_of_story(lm)
    matches = regex(lm, PATTERN)
    task = Constrained(lm, guide_lm, condition=matches.log_indicator, max_tokens=longest, allowed=stories)
    exploration = Mixture((Tempered(), 0.5), (Proposal(task.masked(matches)), 0.5))
    texts = rest_of_story(lm, [v for v in VERBS if v.startswith("w")], ["old"])[0].texts()
    return Setup(task, beginnings(), exploration, lambda x: texts)


def _embedded_learned(lm: LanguageModel, guide_lm: LanguageModel) -> Setup:
    """A classifier's probability of a story's next sentence; it was fitted to sentences of one place and of others."""
    told = embedded.data("stories", "train")
    likes = TokenClassifier.fitted(lm, [s.z for s in told], [LABEL in s.x for s in told])
    sentences = next_sentence(lm)
    task = Constrained(lm, guide_lm, condition=likes, max_tokens=5, stop=".", allowed=sentences)
    return Setup(task, beginnings(), None, lambda x: sentences.texts())


EMBEDDED = {"lexical": _embedded_lexical, "regex": _embedded_regex, "learned": _embedded_learned}


def beginnings() -> tuple[list[tuple[str]], list[tuple[str]], list[tuple[str]]]:
    """The embedded stories' 64 beginnings, for training, validation and test."""
    told = [(f"{name} went to the {place}.",) for name in NAMES for place in PLACES]
    Random("beginnings").shuffle(told)
    return told[2 * TEST_PROMPTS :], told[:TEST_PROMPTS], told[TEST_PROMPTS : 2 * TEST_PROMPTS]


def _of_file(
    lm: LanguageModel, guide_lm: LanguageModel, constraint: str, value: str, prompts: list[str], max_tokens: int
) -> Setup:
    """A task on the user's prompts; ``value``: the words, the pattern or the labelled file."""
    make = partial(Constrained, lm, guide_lm, max_tokens=max_tokens)
    if constraint == "lexical":
        kinds = [kind.strip() for kind in value.split(",")]
        if not all(kinds):
            raise ValueError(f"words: expected words, with commas between alternatives, got {value!r}")
        observations = [(x, " " + kinds[i % len(kinds)]) for i, x in enumerate(prompts)]
        task = make(condition=ContainsWords(lm), template=WORDS_TEMPLATE)
        exploration = Mixture((Tempered(), 0.5), (Planted(), 0.5))
        return Setup(task, split(observations), exploration)
    if constraint == "regex":
        matches = regex(lm, value)
        task = make(condition=matches.log_indicator)
        exploration = Mixture((Tempered(), 0.5), (Proposal(task.masked(matches)), 0.5))
        return Setup(task, split([(x,) for x in prompts]), exploration)
    return Setup(make(condition=TokenClassifier.fitted(lm, *read_labelled(value))), split([(x,) for x in prompts]))
