"""Transfer: families of tasks on the embedded stories, or the user's tasks.

The programs are in `programs/transfer.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Unpack

from .. import embedded
from ..constraints import Slots
from ..embedded import Story
from ..embedded.stories import ADJECTIVES, GETTING, HE, NAMES, OBJECTS, PLACES, SHE, VERBS, middles, verbs_of
from ..inference import Enumeration, Replay
from ..language_model import LanguageModel
from .data_files import read_each
from .experiment import Experiment, Options, Recipe, Start, split
from .programs.transfer import Description, Transfer

FAMILIES = "infilling", "reverse", "lexical", "tempered", "two endings"
TRAINED = FAMILIES[:4]  # without two endings: training has only one observation at a time
EMBEDDED_PREFIX, EMBEDDED_LONGEST = "Beginning:", 5
EMBEDDED_TEMPLATE = "Ending:{y}{v}\nNote:{w}{T}\nBeginning:{x}"
STEPS = {2 ** (j / 2): j for j in range(-3, 4)}  # temperatures, and their number of steps from 1
TEMPERATURES, UNSEEN_TEMPERATURES = [[T for T, j in STEPS.items() if abs(j) in steps] for steps in ((1, 3), (2,))]
WORDS, NEW_WORDS, NEW_VERBS = 24, 8, 16  # of 96 things and 96 verbs
TRAINING_TASKS, TEST_TASKS = 1024, 8  # of each family
TARGET = "the posterior of the task"
RECIPE = Recipe(
    steps=300,
    quick_steps=100,
    observations=32,
    particles=4,
    learning_rate=3e-3,
    adapter={"r": 64, "lora_alpha": 128, "target_modules": "all-linear"},  # copying a word needs this rank
    output_layer=True,
    replay=lambda: Replay(fraction=0.5, capacity=4),
)


class Told(NamedTuple):
    """A task, and two texts drawn given what it states."""

    task: Description
    z: tuple[str, str]


class Parameters(NamedTuple):
    """What tasks may be about."""

    words: tuple[str, ...]  # of training tasks
    new_words: tuple[str, ...]  # of no training task
    new_verbs: tuple[str, ...]  # of no training task


@cache
def parameters() -> Parameters:
    """The parameters of the embedded tasks, always the same."""
    random = Random("parameters")
    words = random.sample(OBJECTS, WORDS + NEW_WORDS)
    return Parameters((*words[NEW_WORDS:],), (*words[:NEW_WORDS],), (*random.sample(VERBS, NEW_VERBS),))


def told(family: str, story: Story, random: Random, temperatures: Sequence[float]) -> Told:
    """The task of this family for a story, with the story's own text and another one that is equally good."""
    who, (thing, verb) = story.z.split()[0], facts(story)
    (other,) = {*verbs_of(thing)} - {verb}
    names = [name for name in (HE if who == "He" else SHE) if name not in story.x]
    both = story.z, random.choice([z for z in middles(story.x) if z.endswith(f" {thing}.") and z != story.z])
    return {
        "infilling": Told(Description(story.x, y=story.y), both),
        "reverse": Told(
            Description(y=story.z + story.y), (story.x, story.x.replace(story.x.split()[0], random.choice(names)))
        ),
        "lexical": Told(Description(story.x, w=f" {thing}"), both),
        "tempered": Told(Description(story.x, T=random.choice(list(temperatures))), both),
        "two endings": Told(Description(story.x, y=story.y, v=f" {who} {other} it."), both),
    }[family]


def write(T: float) -> str:
    """An embedded temperature as a string: one mark for each step from 1, "!" above and "#" below.

    >>> write(1.0), write(2.0), write(2**-0.5)
    ('', '!!', '#')
    """
    j = min(STEPS.items(), key=lambda step: abs(step[0] - T))[1]
    return ("!" if j > 0 else "#") * abs(j)


def embedded_tasks(family: str, split: str, *, new: bool = False) -> list[Told]:
    """Tasks of a family, always the same: for training, or on stories whose place and verb no training story has.

    :param new: tasks with a verb, a word or a temperature that no training task has.
    """
    own, random, found = parameters(), Random(f"{family} {split} {new}"), []
    stories, temperatures = embedded.data("stories", split), UNSEEN_TEMPERATURES if new else TEMPERATURES
    for story in random.sample(stories, len(stories)):
        thing, verb = facts(story)
        said = {"infilling": {verb}, "reverse": {thing, verb}, "two endings": {*verbs_of(thing)}, "lexical": {thing}}
        about = said.get(family, set())
        if verb not in verbs_of(thing) or (family == "lexical" and thing not in own.words + own.new_words):
            continue
        if family == "tempered" or bool(about & {*own.new_words, *own.new_verbs}) == new:
            found.append(told(family, story, random, temperatures))
    return found[: TRAINING_TASKS if split == "train" else TEST_TASKS]


def facts(story: Story) -> tuple[str, str]:
    """A story's thing and its verb."""
    return story.z.removesuffix(".").split()[-1], story.y.split()[1]


def texts(lm: LanguageModel) -> Slots:
    """A constraint: the texts of all embedded tasks, 64 beginnings and 2,304 middles of stories."""
    who, got, adjectives, things = ([f" {w}" for w in words] for words in (("He", "She"), GETTING, ADJECTIVES, OBJECTS))
    names, places = list(NAMES), [f" {place}" for place in PLACES]
    return Slots(
        lm,
        [names, [" went"], [" to"], [" the"], places, ["."]],
        [who, got, [" the"], adjectives, things, ["."]],
    )


def description(line: str) -> Description:
    """The task in a line of JSON."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    kinds: dict[str, Any] = {"x": str, "y": str, "v": str, "w": str, "T": (int, float)}
    if not isinstance(found, dict) or not all(n in kinds and isinstance(v, kinds[n]) for n, v in found.items()):
        raise ValueError("is not a JSON object with strings x, y, v, w and a number T, each of which may be left out")
    return Description(**found)


def read_tasks(path: str | Path) -> list[Description]:
    """Tasks from a JSONL file, one in each line; errors as in `read_each`."""
    return read_each(path, description, "task")


def described(task: Description) -> str:
    """A task in words."""
    known = [f"{task.x or '[...]'} {'[...]' if task.x else ''}{task.y}".strip()]
    known += [f"or{task.v}"] if task.v else []
    known += [f"with one of:{task.w}"] if task.w else []
    known += [f"at T = {task.T:.2g}"] if task.T != 1 else []
    return "    ".join(known)


def experiment(
    lm: LanguageModel | None = None,
    data: str | Path | None = None,
    *,
    families: str | Sequence[str] = TRAINED,
    strength: float = 8.0,
    max_tokens: int | None = None,
    **options: Unpack[Options],
) -> Experiment:
    """Texts of many tasks by one guide that reads their descriptions; tested on a combination that it never saw.

    It runs on the embedded story LM, whose 2,368 beginnings and middles can be counted: the guide is trained for an
    ending, a continuation, a word or a temperature, and tested for two endings at once.  Or it runs on ``lm`` with the
    tasks of the file ``data``, for training and test alike.

    :param lm: a language model; None: the embedded one.
    :param data: a JSONL file with a task in each line; None: the embedded tasks.
    :param families: the families to train on: names in `FAMILIES`, as a list or with commas between them.
    :param strength: s, nats: how much it counts that a text contains one of the words.
    :param max_tokens: the most tokens of a text before its stop; None: 5 on the embedded stories, 30 with ``data``.
    :param options: those of every experiment, see `experiment.Options`.
    :returns: an `Experiment`.
    :raises ValueError: for another language model without ``data``, for families with ``data``, and unknown ones.
    """
    chosen = [f.strip() for f in families.split(",")] if isinstance(families, str) else list(families)
    if unknown := set(chosen) - set(FAMILIES) or ({"families"} if not chosen else set()):
        raise ValueError(f"families: expected some of {', '.join(FAMILIES)}; got {', '.join(sorted(unknown))}")
    if data is not None and tuple(chosen) != TRAINED:
        raise ValueError("families: they are for the embedded stories, without `data`")
    needs = "tasks of its own, a JSONL file with one per line"
    start = Start.of("transfer", "stories", lm, data, RECIPE if data is None else Recipe(), needs, **options)
    if data is not None:
        task = Transfer(
            start.lm, start.guide_lm, strength=strength, max_tokens=30 if max_tokens is None else max_tokens
        )
        return start.experiment(task, split(read_tasks(data)), described, target=TARGET)
    task = Transfer(
        start.lm,
        start.guide_lm,
        prefix=EMBEDDED_PREFIX,
        strength=strength,
        max_tokens=EMBEDDED_LONGEST if max_tokens is None else max_tokens,
        allowed=texts(start.lm),
        template=EMBEDDED_TEMPLATE,
        write=write,
    )
    train = [t for family in chosen for t in embedded_tasks(family, "train")]
    held_out, test = (
        [t.task for family in which for t in embedded_tasks(family, part)[:n]]
        for which, part, n in ((chosen, "validation", TEST_TASKS // 2), (["two endings"], "test", TEST_TASKS))
    )
    tasks = [t.task for t in train]
    return start.experiment(
        task,
        (tasks, held_out, test),
        described,
        exact=Enumeration(task.model),
        target=TARGET,
        demonstrations=(*task.encode(tasks), {"z": [*zip(*(t.z for t in train), strict=True)]}),
    )
