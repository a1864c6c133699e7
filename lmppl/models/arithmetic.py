"""Arithmetic: the chain of thought that leads from a sum to its answer, with a calculator in the language model.

z ~ LM(x) with the calculator's results filled in,    y ~ LM(x z) observed;    wanted: p(z | x, y)

    x  "Question: 6 - 0 - 4 = ? Answer:"    z  " 6 - 0 = 6, 6 - 4 = 2."    y  " The answer is 2."

Hu et al. 2024, "Amortizing intractable inference in large language models", section 4.4.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from .. import embedded
from ..distributions import Completion
from ..embedded import Question
from ..embedded.arithmetic import ANSWER, MAX_TOKENS
from ..inference import Enumeration, GFlowNet, Mixture, OnPolicy, Prior, Replay, SupervisedFineTuning, VarGrad
from ..inference.training.loop.schedules import linear
from ..language_model import LanguageModel
from ..text import length
from ..tools import Calculator, evaluate
from .data_files import read_json
from .experiment import TEST_OBSERVATIONS, Experiment, Recipe, paper_setting, tempered

PAPER_TEMPERATURE = 0.5  # the final reward temperature of the paper's released setting
PAPER_VOTE = 0.1  # and the temperature of the tokens of which its votes are made
VOTES = 10
MASS = 0.9  # of the prior that the enumeration explores
LONGEST_ANSWER = 4  # tokens after "The answer is", on other language models
HELD_OUT = 50  # of the paper's training questions
WARM_START = 100
RECIPE = Recipe(steps=200, quick_steps=100, replay=Replay)
# On the embedded sums the prior is right often enough to learn from its draws, and a guide that starts from it keeps
# more of what it knows of longer sums than one that was fine-tuned before (docs/arithmetic.md).
EMBEDDED_RECIPE = replace(
    RECIPE,
    objective=partial(VarGrad, exploration=Mixture((OnPolicy(), 1.0), (Prior(), linear(1.0, 0.0, 150)))),
    learning_rate=5e-4,
    output_layer=True,
)
FILES = "train_50.json", "train_questions_1000.json", "test_3_operands.json", "test_4_operands.json"


class Arithmetic:
    """The model and guide of sums with a chain of thought, for any language model.

    :param lm: the language model p, frozen.
    :param guide_lm: the guide's, usually ``lm.with_adapter(...)``; None: no guide.
    :param max_tokens: the most tokens of a chain before its stop, the calculator's among them.
    :param stop: its stop.
    :param sees_answer: whether the guide reads y before x. The answer is a function of the question, and prediction has
        none, so that by default it does not.

    `model(x, y)` and `guide(x, y)` are Pyro programs over questions x (B, Lx) and answers y (B, Ly), with one plate.
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
        self.lm, self.guide_lm = lm, guide_lm
        self.max_tokens, self.stop, self.sees_answer = max_tokens, stop, sees_answer
        self.tools = (Calculator(),)

    def model(self, x: Tensor, y: Tensor) -> Tensor:
        """z ~ LM(x); the text after x z begins with y."""
        with pyro.plate("questions", len(x)):
            z = pyro.sample("z", self.chain(self.lm, x))
            pyro.sample("y", Completion(self.lm, self.lm.join(x, z), max_tokens=length(y), stop=None), obs=y)
            return z

    def guide(self, x: Tensor, y: Tensor) -> Tensor:
        """z ~ q(z | x), or q(z | x, y)."""
        if self.guide_lm is None:
            raise ValueError("guide_lm: this Arithmetic was made without a guide")
        with pyro.plate("questions", len(x)):
            return pyro.sample("z", self.chain(self.guide_lm, self.lm.join(y, x) if self.sees_answer else x))

    def chain(self, lm: LanguageModel, x: Tensor, temperature: float = 1.0) -> Completion:
        """The chains that a language model writes after x."""
        return Completion(lm, x, max_tokens=self.max_tokens, stop=self.stop, tools=self.tools, temperature=temperature)

    def encode(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """The arguments (x, y) of model and guide for these questions."""
        return self.lm.encode([q.x for q in questions]), self.lm.encode([q.y for q in questions])

    def chains(self, questions: Sequence[Question]) -> Tensor:
        """The right chain of each question, (B, L)."""
        return self.lm.encode([q.chain for q in questions])

    @torch.no_grad()
    def predict(
        self,
        questions: Sequence[Question],
        lm: LanguageModel | None = None,
        votes: int = VOTES,
        temperature: float = 1.0,
    ) -> list[list[Prediction]]:
        """Chains z_n ~ q(z | x), each with an answer y_n ~ p(y | x z_n), as one would have them without knowing y.

        :param lm: what writes the chains; None: the guide's, or where there is none the model's.
        :param temperature: of every token.
        :returns: ``votes`` predictions of each question.
        """
        if self.sees_answer:
            raise ValueError("sees_answer: a guide that reads the answer cannot predict it")
        x = self.lm.encode([q.x for q in questions])
        z = self.chain(lm or self.guide_lm or self.lm, x, temperature).sample((votes,))  # (vote, B, L)
        told = self.lm.join(x, z, ANSWER)
        last = Completion(self.lm, told, max_tokens=LONGEST_ANSWER, stop=self.stop, temperature=temperature).sample()
        written = zip(self.lm.decode(z), self.lm.decode(last), strict=True)
        by_vote = [[Prediction(c, number_in(a)) for c, a in zip(*row, strict=True)] for row in written]
        return [list(votes) for votes in zip(*by_vote, strict=True)]


class Prediction(NamedTuple):
    """A chain, and the answer that was given after it; None, where it is no number."""

    chain: str
    answer: int | None


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


def number_in(answer: str) -> int | None:
    """The number of an answer with its stop.

    >>> [number_in(s) for s in (" 12.", " -4.", " so.", " 1 2.")]
    [12, -4, None, None]
    """
    found = re.fullmatch(r" ?(-?[0-9]{1,9}) ?\.?", answer)
    return int(found[1]) if found else None


def is_right(question: Question, chain: str) -> bool:
    """Whether a chain takes the operands one by one from the left, with right results.

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
    """What an experiment trains on and is asked."""

    rationales: list[Question]  # whose chains are known
    train: list[Question]  # whose answers are
    held_out: list[Question]
    test: list[Question]


def embedded_questions() -> Questions:
    """Training on 3 and 4 operands, tests with 4."""
    names = "rationales", "train", "validation", "test_4"
    return Questions(*(embedded.data("arithmetic", name) for name in names))


def read_questions(folder: str | Path) -> tuple[Questions, list[Question]]:
    """The paper's four files, with 4 operands in the test, and its test questions of 3 operands.

    A test question that occurs in a training file is left out, and so is a second occurrence.  The last 50 training
    questions are held out.

    :raises ValueError: naming the file that is not there or holds something else.
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
        raise ValueError(f"data: {path} is no file of questions: {error!r}") from error
    found = []
    for query, answer, rationale in entries:
        if not re.fullmatch(r"Question: [0-9]{1,9}( [-+] [0-9]{1,9})+ = \? Answer:", str(query)):
            raise ValueError(f"data: {path} has {query!r}, which is no sum")
        operands = [int(n) for n in re.findall("[0-9]+", query)]
        question = Question(tuple(operands), "".join(re.findall("[-+]", query)))
        without_results = re.sub("= -?[0-9]+", "=", question.chain).strip(" .")
        if answer != question.answer or rationale not in (None, without_results):
            raise ValueError(f"data: {path} answers {query!r} by {rationale!r}, {answer!r}")
        found.append(question)
    if not found:
        raise ValueError(f"data: {path} has no question in it")
    return list(dict.fromkeys(found))


@dataclass
class Taught(Experiment):
    """An experiment whose replay buffer starts with chains that somebody wrote down."""

    rationales: tuple[Tensor, ...] = ()  # x, y, z

    def gflownet(self) -> GFlowNet:
        trainer = super().gflownet()
        if trainer.replay is not None:
            *args, z = self.rationales
            trainer.demonstrate(*args, values={"z": z})
        return trainer


def teach(
    task: Arithmetic, questions: Sequence[Question], chains: Tensor, steps: int, *, recipe: Recipe, seed: int = 0
):
    """Supervised fine-tuning of the guide on these chains (B, L); the trainer."""
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
    recipe: Recipe | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    setting: str = "posterior",
    device: str | None = None,
    sees_answer: bool = False,
    warm_start: int | None = None,
) -> Experiment:
    """The chain of thought between a sum and its answer, with a calculator.

    On the embedded arithmetic LM, where the posterior is known, or on ``lm`` with the folder ``data`` of the paper's
    files.  The guide starts from ``checkpoint``, or from ``warm_start`` steps of supervised fine-tuning on the
    rationales (None: 100 steps on ``lm``, none on the embedded one), which are in its replay buffer, too.

    :raises ValueError: for another language model without ``data``.
    """
    recipe = recipe or (RECIPE if lm is not None else EMBEDDED_RECIPE)
    warm_start = (0 if lm is None else WARM_START) if warm_start is None else warm_start
    temperature = PAPER_TEMPERATURE if paper_setting(setting) else 1.0
    if lm is not None and data is None:
        raise ValueError("data: another language model needs the folder of the paper's files")
    own = lm is None
    lm = lm or LanguageModel.embedded("arithmetic", device=device)
    guide_lm = recipe.guide_lm(lm, seed, checkpoint)
    questions = embedded_questions() if data is None else read_questions(data)[0]
    longest = int(length(lm.encode([q.chain for q in questions.rationales + questions.test])).max()) - 1
    task = Arithmetic(lm, guide_lm, max_tokens=MAX_TOKENS if own else longest, sees_answer=sees_answer)
    chains = task.chains(questions.rationales)
    if checkpoint is None and warm_start:
        teach(task, questions.rationales, chains, warm_start, recipe=recipe, seed=seed)
    held_out, test = questions.held_out[:TEST_OBSERVATIONS], questions.test[:TEST_OBSERVATIONS]
    return Taught(
        name="arithmetic",
        lm=lm,
        guide_lm=guide_lm,
        model=tempered(task.model, temperature),
        guide=task.guide,
        batches=recipe.batches(*task.encode(questions.rationales + questions.train), seed=seed),
        held_out=task.encode(held_out),
        test=task.encode(test),
        describe=lambda i: f"{test[i].x} [...]{test[i].y}    (right: {test[i].chain.strip()})",
        exact=Enumeration(tempered(task.model, temperature), mass=MASS) if own else None,
        recipe=recipe,
        target="the posterior"
        if temperature == 1
        else f"p(z|x, y) to the power 1 / {temperature:g}, the paper's setting",
        rationales=(*task.encode(questions.rationales), chains),
    )
