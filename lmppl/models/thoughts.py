"""Thoughts: sums evaluated by a fallible judge, or the user's questions; the programs are in `programs/thoughts.py`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from .. import text
from ..constraints import Slots
from ..distributions import Completion
from ..embedded import Question
from ..inference import Enumeration
from ..language_model import LanguageModel
from .data_files import read_each
from .experiment import Experiment, Options, Recipe, Start, split
from .programs.thoughts import ChainOfThoughts, Thoughts, TreeOfThoughts

SMALL = (1, 2, 3)  # digits of the small questions and thoughts
EVERY = tuple(range(10))
RELIABLE = 0.85  # the judge's probability of being right
PLAN, TREE = 3, 2  # most steps of a plan, of a tree's path; a small question has two
TEST = 16
STEP = r"(-?[0-9]+) ([-+]) ([0-9]+)"
RECIPE = Recipe(steps=200, quick_steps=100, learning_rate=3e-3, output_layer=True)
# On other language models: a thought in each line, "-" before another one, "=" before the answer.
EXAMPLE = """Q: Ann has 3 pens and gets 2 more. Then she loses 1. How many has she?
- 3 + 2 = 5
- 5 - 1 = 4
= The answer is 4.
Q: {q}
-"""
LINES = "-", "="
ASKED = "\nIs the last step right? Answer yes or no:"
LONGEST_THOUGHT, LONGEST_ANSWER = 16, 4


class Asked(NamedTuple):
    """The text before the thoughts, which ends with a question, and the answer."""

    x: str
    answer: str


def result(told: str) -> str:
    """What a calculator writes after the words of a sum; "" where nothing follows.

    >>> [result("Question: 3 - 1 = ? Answer:" + s) for s in ("", " 3 - 1", " 3 - 1 = 2,", " 3 - 1 = 2.")]
    [' 3', ' = 2', ' 2', '']
    """
    if told.endswith("Answer:"):  # the first operand
        return " " + re.findall("[0-9]+", told)[0]
    if told.endswith(","):  # the value so far
        return " " + re.findall("-?[0-9]+", told)[-1]
    step = re.search(rf"{STEP}$", told)
    return f" = {int(step[1]) + int(step[2] + step[3])}" if step else ""


def is_right(told: str) -> bool:
    """Whether the last step of a sum takes the next operand, and the sum ends exactly when there is no other.

    >>> [is_right("Question: 3 - 1 + 2 = ? Answer: 3 - 1 = 2" + s) for s in (", 2", ".", ", 2 + 2 = 4.")]
    [True, False, True]
    """
    question, _, chain = told.partition("=")
    asked, taken = (re.findall(r"([-+]) ([0-9]+)", part) for part in (question, chain))
    over = chain.rstrip().endswith(".")
    return taken[-1:] == asked[len(taken) - 1 : len(taken)] and over == (len(taken) == len(asked))


class Judge:
    """A judge of sums who is right with probability ``reliable``, and whose verdict on a string is always the same.

    v is 0 for steps that are found right and log((1 - reliable) / reliable) for others.  The verdicts are Python's own
    random numbers, one for each string.
    """

    def __init__(self, lm: LanguageModel, reliable: float = RELIABLE):
        if not 0.5 <= reliable < 1:
            raise ValueError(f"reliable: expected a probability from 0.5 to below 1, got {reliable}")
        self.lm, self.reliable = lm, reliable

    def verdict(self, told: str) -> bool:
        """Whether the text so far is found right."""
        return is_right(told) == (Random(told).random() < self.reliable)

    def __call__(self, told: Tensor) -> Tensor:
        doubt = math.log((1 - self.reliable) / self.reliable)
        return text.map(lambda s: 0.0 if self.verdict(s) else doubt, told, self.lm)


class SaysYes:
    """The language model's own evaluation: log p of " yes" among " yes" and " no", after "Is the last step right?"."""

    def __init__(self, lm: LanguageModel, asked: str = ASKED):
        self.lm, self.asked = lm, lm.encode(asked)
        self.yes, self.no = (lm.token_id(word) for word in (" yes", " no"))

    @torch.no_grad()
    def __call__(self, told: Tensor) -> Tensor:
        prompt = self.lm.join(told, self.asked)
        said = Completion(self.lm, prompt, max_tokens=1, stop=None, allowed=[self.yes, self.no])
        return said.log_prob(torch.tensor([self.yes], device=told.device))


def small_questions() -> tuple[list[Question], list[Question], list[Question]]:
    """All sums of three digits from 1 to 3: 76 for training, 16 for validation, 16 for test, always the same."""
    found = [Question(n, "".join(s)) for n in product(SMALL, repeat=3) for s in product("+-", repeat=2)]
    Random("thoughts").shuffle(found)
    return found[2 * TEST :], found[:TEST], found[TEST : 2 * TEST]


def small_answers() -> tuple[list[Asked], list[Asked], list[Asked]]:
    """These questions with given answers, always the same; the task is to find how the answers were reached.

    For training, every answer that two steps can give.  For validation and test, one for each question: the right one
    or, equally often, another one that two steps can give.
    """
    train, *others = small_questions()
    random, most = Random("answers"), 2 * SMALL[-1]

    def reached(q: Question) -> list[int]:
        return [q.operands[0] + n for n in range(-most, most + 1)]

    def given(q: Question) -> int:
        other = random.choice([n for n in reached(q) if n != q.answer])
        return q.answer if random.random() < 0.5 else other

    held_out, test = ([Asked(q.x, str(given(q))) for q in questions] for questions in others)
    return [Asked(q.x, str(n)) for q in train for n in reached(q)], held_out, test


def sums(
    lm: LanguageModel, guide_lm: LanguageModel | None = None, *, digits: Sequence[int] = SMALL, **options: Any
) -> dict[str, Any]:
    """The arguments of both programs for the embedded sums: a thought is a sign and a digit."""
    allowed = Slots(lm, [[" +", " -"], [f" {n}" for n in digits]])
    return {"lm": lm, "guide_lm": guide_lm, "allowed": allowed, "after": result, "evaluate": Judge(lm)} | options


def encode(lm: LanguageModel, asked: Sequence[Asked]) -> tuple[Tensor, Tensor]:
    """The arguments (x, y) of the programs."""
    return lm.encode([q.x for q in asked]), lm.encode([f" {q.answer}." for q in asked])


def lines(lm: LanguageModel, guide_lm: LanguageModel | None = None, **options: Any) -> dict[str, Any]:
    """The arguments of both programs for other language models: a thought is a line, evaluated by the model."""
    given = {"lm": lm, "guide_lm": guide_lm, "max_tokens": LONGEST_THOUGHT, "stop": "\n", "marks": LINES}
    return given | {"evaluate": SaysYes(lm), "max_answer": LONGEST_ANSWER} | options


def answered(line: str) -> Asked:
    """The question of a line, with an example before it, and the answer."""
    question, tab, answer = line.partition("\t")
    if not tab or not question.strip() or not answer.strip():
        raise ValueError("is not a question, a tab and an answer")
    return Asked(EXAMPLE.format(q=question.strip()), answer.strip())


def read_questions(path: str | Path) -> list[Asked]:
    """Questions and answers from a text file, with a tab between; errors as in `read_each`."""
    return read_each(path, answered, "questions")


def experiment(
    lm: LanguageModel | None = None, data: str | Path | None = None, *, children: int = 1, **options: Unpack[Options]
) -> Experiment:
    """The thoughts between a question and its answer: a plan of some steps, or a tree of which one path counts.

    It runs on the embedded arithmetic LM, whose posterior is known, or on ``lm`` with the questions of the file
    ``data``; ``lm`` then evaluates its own thoughts.

    :param lm: a language model; None: the embedded one.
    :param data: a text file with a question, a tab and its answer in each line; None: the embedded sums.
    :param children: 1: plans; more: trees with up to so many children.
    :param options: those of every experiment, see `experiment.Options`.
    :returns: an `Experiment`.
    :raises ValueError: for another language model without ``data``, and fewer children than one.
    """
    if children < 1:
        raise ValueError(f"children: expected 1 or more, got {children}")
    needs = "questions of its own, a file with a question, a tab and its answer per line"
    start = Start.of("thoughts", "arithmetic", lm, data, RECIPE if data is None else Recipe(), needs, **options)
    splits: tuple[list[Any], list[Any], list[Any]]
    if data is None:
        splits, given = small_answers(), sums(start.lm, start.guide_lm)
    else:
        splits, given = split(read_questions(data)), lines(start.lm, start.guide_lm)
    task: Thoughts
    if children == 1:
        task = ChainOfThoughts(**given, steps=PLAN)
    else:
        task = TreeOfThoughts(**given, steps=TREE, children=[1 / children] * children)
    return start.experiment(
        task,
        splits,
        lambda q: f"{q.x} [...] {q.answer}",
        encode=partial(encode, start.lm),
        site="thought 1" if children == 1 else "thought 1.1",
        exact=Enumeration(task.model) if data is None and children <= 2 else None,
    )
