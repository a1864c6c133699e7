"""Arithmetic on the embedded sums, or on the paper's files; the programs are in `programs/arithmetic.py`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from .. import embedded
from ..embedded import Question
from ..embedded.arithmetic import MAX_TOKENS
from ..inference import Enumeration, Mixture, OnPolicy, Prior, Replay, SupervisedFineTuning, VarGrad
from ..inference.training.loop.schedules import linear
from ..language_model import LanguageModel
from ..tools import evaluate
from .data_files import read_json
from .experiment import TEST_OBSERVATIONS, Experiment, Options, Recipe, Start, power, tempered
from .programs.arithmetic import Arithmetic, Prediction

PAPER_TEMPERATURE = 0.5  # the final reward temperature of the paper's released setting
PAPER_VOTE = 0.1  # and the temperature of the tokens of its votes
MASS = 0.9  # of the prior that the enumeration explores
HELD_OUT = 50  # of the paper's training questions
WARM_START = 100
RECIPE = Recipe(steps=200, quick_steps=100, replay=Replay)
# On the embedded sums the prior is right often enough to learn from its draws.  A guide that starts from the prior
# keeps more of its knowledge of longer sums than one that was fine-tuned before (docs/arithmetic.md).
EMBEDDED_RECIPE = replace(
    RECIPE,
    objective=partial(VarGrad, exploration=Mixture((OnPolicy(), 1.0), (Prior(), linear(1.0, 0.0, 150)))),
    learning_rate=5e-4,
    output_layer=True,
)
FILES = "train_50.json", "train_questions_1000.json", "test_3_operands.json", "test_4_operands.json"


class Score(NamedTuple):
    """How well questions were answered."""

    vote: float  # share of questions whose most frequent answer is right
    single: float  # share of right answers
    sound: float  # share of right answers whose chain is right, too


def score(questions: Sequence[Question], predictions: Sequence[Sequence[Prediction]]) -> Score:
    """Majority votes (the first of the most frequent answers), single answers, and the chains of right answers."""
    vote, right, sound = [], 0, 0
    for question, given in zip(questions, predictions, strict=True):
        answers = Counter(p.answer for p in given if p.answer is not None)
        vote.append(bool(answers) and answers.most_common(1)[0][0] == question.answer)
        hits = [p for p in given if p.answer == question.answer]
        right += len(hits)
        sound += sum(is_right(question, p.chain) for p in hits)
    total = sum(map(len, predictions))
    return Score(sum(vote) / len(vote), right / total, sound / right if right else float("nan"))


def is_right(question: Question, chain: str) -> bool:
    """Whether a chain takes the operands one by one from the left, with correct results.

    >>> is_right(Question((6, 0, 4), "--"), "6 - 0 = 6, 6 - 4 = 2.")
    True
    """
    value, steps = question.operands[0], chain.strip().removesuffix(".").split(",")
    if len(steps) != len(question.signs):
        return False
    for step, sign, n in zip(steps, question.signs, question.operands[1:], strict=True):
        found = re.fullmatch(r" ?(-?[0-9]{1,9}) ?([-+]) ?([0-9]{1,9}) ?= ?(-?[0-9]{1,9}) ?", step)
        if not found or (int(found[1]), found[2], int(found[3])) != (value, sign, n):
            return False
        result = evaluate(f"{value}{sign}{n}")
        if result != int(found[4]):
            return False
        value = int(found[4])
    return True


class Questions(NamedTuple):
    """The questions of an experiment, for training and for tests."""

    rationales: list[Question]  # with known chains
    train: list[Question]  # with known answers
    held_out: list[Question]
    test: list[Question]


def embedded_questions() -> Questions:
    """Training on 3 and 4 operands, tests on 4."""
    names = "rationales", "train", "validation", "test_4"
    return Questions(*(embedded.data("arithmetic", name) for name in names))


def read_questions(folder: str | Path) -> tuple[Questions, list[Question]]:
    """The questions of the paper's four files, with 4 operands in the test, and the test questions of 3 operands.

    A test question that occurs in a training file is left out, and so is a repetition.  The last 50 training questions
    are for validation.

    :raises ValueError: naming the file that is missing or holds something else.
    """
    rationales, train, three, four = (read_file(Path(folder) / name) for name in FILES)
    known = {*rationales, *train}
    three, four = ([q for q in questions if q not in known] for questions in (three, four))
    return Questions(rationales, train[:-HELD_OUT], train[-HELD_OUT:], four), three


def read_file(path: Path) -> list[Question]:
    """The distinct questions of one of the paper's files, in their order.

    :raises ValueError: naming the file, where it is not such a file, or an answer or a rationale in it is wrong.
    """
    try:
        entries = [(e["str_query"], e["num_sol"], e.get("str_rationale")) for e in read_json(path)]
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"data: {path} is not a file of questions: {error!r}") from error
    found = []
    for query, answer, rationale in entries:
        if not re.fullmatch(r"Question: [0-9]{1,9}( [-+] [0-9]{1,9})+ = \? Answer:", str(query)):
            raise ValueError(f"data: {path} has {query!r}, which is not a sum")
        operands = [int(n) for n in re.findall("[0-9]+", query)]
        question = Question(tuple(operands), "".join(re.findall("[-+]", query)))
        without_results = re.sub("= -?[0-9]+", "=", question.chain).strip(" .")
        if answer != question.answer or rationale not in (None, without_results):
            raise ValueError(f"data: {path} has a wrong rationale or answer of {query!r}: {rationale!r}, {answer!r}")
        found.append(question)
    if not found:
        raise ValueError(f"data: {path} has no questions")
    return list(dict.fromkeys(found))


def teach(
    task: Arithmetic, questions: Sequence[Question], chains: Tensor, steps: int, *, recipe: Recipe, seed: int = 0
):
    """Fine-tunes the guide on these chains (B, L); returns the trainer."""
    x, y = task.encode(questions)
    assert task.guide_lm is not None
    optimizer = torch.optim.AdamW(task.guide_lm.trainable_parameters(), lr=recipe.learning_rate)
    tuning = SupervisedFineTuning(task.model, task.guide, optimizer=optimizer)
    chosen = recipe.passes(len(questions), seed)

    def batches(step: int):
        return x[chosen(step)], y[chosen(step)], {"z": chains[chosen(step)]}

    tuning.fit(batches, steps, seed=seed, progress=False)
    return tuning


def experiment(
    lm: LanguageModel | None = None,
    data: str | Path | None = None,
    *,
    sees_answer: bool = False,
    warm_start: int | None = None,
    **options: Unpack[Options],
) -> Experiment:
    """The chain of thought between a sum and its answer, with a calculator.

    It runs on the embedded arithmetic LM, whose posterior is known, or on ``lm`` with the folder ``data`` of the
    paper's files.  The rationales are in the guide's replay buffer.

    :param lm: a language model; None: the embedded one.
    :param data: a folder of the paper's files; None: the embedded sums.
    :param sees_answer: whether the guide reads the answer; then it cannot predict it.
    :param warm_start: steps of supervised fine-tuning on the rationales, where no ``checkpoint`` is given; None: 100 on
        ``lm``, none on the embedded LM.
    :param options: those of every experiment, see `experiment.Options`.
    :returns: an `Experiment`.
    :raises ValueError: for another language model without ``data``.
    """
    recipe, steps = (EMBEDDED_RECIPE, 0) if lm is None else (RECIPE, WARM_START)
    start = Start.of("arithmetic", "arithmetic", lm, data, recipe, "the folder of the paper's files", **options)
    questions = embedded_questions() if data is None else read_questions(data)[0]
    longest = MAX_TOKENS
    if lm is not None:
        longest = start.longest([q.chain for q in questions.rationales + questions.test]) - 1  # without the stop
    task = Arithmetic(start.lm, start.guide_lm, max_tokens=longest, sees_answer=sees_answer)
    told, steps = task.chains(questions.rationales), steps if warm_start is None else warm_start
    if options.get("checkpoint") is None and steps:
        teach(task, questions.rationales, told, steps, recipe=start.recipe, seed=start.seed)
    temperature = PAPER_TEMPERATURE if start.paper else 1.0
    model = tempered(task.model, temperature)
    held_out, test = questions.held_out[:TEST_OBSERVATIONS], questions.test[:TEST_OBSERVATIONS]
    return start.experiment(
        task,
        (questions.rationales + questions.train, held_out, test),
        lambda q: f"{q.x} [...]{q.y}    (right: {q.chain.strip()})",
        model=model,
        exact=Enumeration(model, mass=MASS) if lm is None else None,
        target=power(temperature),
        demonstrations=(*task.encode(questions.rationales), {"z": told}),
    )
