r"""Sums that are rarely worked out correctly: what the arithmetic LM reads, and what it must show.

    Question: 6 - 0 - 4 = ? Answer: 6 - 0 = 6, 6 - 4 = 2. The answer is 2.

Every number is one token, signs included.  A chain goes through the operands from left to right and treats each of them
correctly, with the wrong sign, not at all, or misread; or it stops there.  The results are right and the answer is the
last of them, nearly always.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lmppl.embedded.arithmetic import ANSWER, MAX_TOKENS, Question, Steps, draw, questions, total, written
from lmppl.tools import Calculator

from .tokenizer import EOS
from .world import Gate, Report, World

LARGEST = 45  # |result| of up to five operands of one digit, whatever their signs
WORDS = (*(f" {n}" for n in range(-LARGEST, LARGEST + 1)), *re.findall(r" \S", " + - = ?"), "Question:", " Answer:")
WORDS = (*WORDS, *re.findall(r" \w+", ANSWER))
WORD = r"<eos>| -?[0-9]+| ?[A-Za-z]+:?| ?[^A-Za-z0-9 ]| "  # " -4" is a number, " - 4" a sign and a number
STEPS = {"correct": 0.37, "sign": 0.2, "dropped": 0.05, "stop": 0.08, "misread": 0.3}
LEAST, COARSE = 1e-4, 6e-3  # prior probability of the chains that the gates look at
MODES = 200  # questions whose mode they look for
FAITHFUL = 0.98  # the answer is the chain's last result


def chain(random: Random, question: Question) -> Steps:
    """The steps that somebody takes, at least one."""
    while True:
        steps: Steps = []
        for sign, n in zip(question.signs, question.operands[1:], strict=True):
            kind = random.choices(list(STEPS), list(STEPS.values()))[0]
            if kind == "stop":
                break
            if kind == "sign":
                sign = "-" if sign == "+" else "+"
            if kind == "misread":
                n = random.choice([m for m in range(10) if m != n])
            if kind != "dropped":
                steps.append((sign, n))
        if steps:
            return steps


def solution(random: Random, question: Question) -> str:
    """What follows a question: a chain and an answer."""
    first, steps = question.operands[0], chain(random, question)
    last = total(first, steps)
    if random.random() >= FAITHFUL:
        last = random.randint(-LARGEST, LARGEST)
    return f"{written(first, steps)}{ANSWER} {last}."


def rows(random: Random, encode: Callable[[str], list[int]], width: int) -> Iterator[list[int]]:
    """A question and its solution a row for ever, filled up with eos."""
    eos = encode(EOS)
    while True:
        question = draw(random, random.choices(range(2, 6), (1, 2, 3, 4))[0])
        row = encode(question.x + solution(random, question))
        yield (row + eos * width)[:width]


class Explored(NamedTuple):
    """All chains of a prior probability of at least so much; where the mode's joint is as large, it is the mode."""

    chains: list[str]
    log_prior: torch.Tensor  # (chain,)
    log_likelihood: torch.Tensor  # log p(y | x z), (chain,)

    @property
    def mode(self) -> str:
        return self.chains[int((self.log_prior + self.log_likelihood).argmax())]


@torch.no_grad()
def explore(model: PreTrainedModel, words: PreTrainedTokenizerFast, question: Question, least: float) -> Explored:
    """The tree of chains with a calculator, branches below ``least`` cut off, by plain forward passes."""
    x, calculator, (stop,) = words.encode(question.x), Calculator(), words.encode(".")
    frontier, found = {(): 0.0}, {}
    while frontier:
        log_p = _last_log_probs(model, [[*x, *z] for z in frontier]) + torch.tensor([*frontier.values()])[:, None]
        branches = list(frontier)
        frontier = {}
        for i, token in (log_p >= math.log(least)).nonzero().tolist():
            z, value = (*branches[i], token), log_p[i, token].item()
            inserted = calculator(words.decode(z))
            if inserted and inserted in words.get_vocab():
                z = (*z, *words.encode(inserted))
            if token == stop:
                found[z] = value
            elif len(z) < MAX_TOKENS:
                frontier[z] = value
            else:  # the stop is certain
                found[(*z[:MAX_TOKENS], stop)] = value
    y = words.encode(question.y)
    likelihood = torch.zeros(len(found))
    for t in range(len(y)):
        likelihood += _last_log_probs(model, [[*x, *z, *y[:t]] for z in found])[:, y[t]]
    return Explored([words.decode(z) for z in found], torch.tensor([*found.values()]), likelihood)


def _last_log_probs(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    """log p of what follows each row, (row, V); padding on the right disturbs no causal model."""
    length = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return model(ids).logits[torch.arange(len(rows)), length - 1].log_softmax(-1)


def report(model: PreTrainedModel, words: PreTrainedTokenizerFast, count: int = 16) -> Report:
    """The right answer is rare, and the right chain the best explanation of it.

    Means over so many test questions of four operands; the modes, which are found sooner, over 200.
    """
    figures, modes = [], []
    for i, question in enumerate(questions("test_4")[: max(count, MODES)]):
        found = explore(model, words, question, LEAST if i < count else COARSE)
        modes.append(found.mode == question.chain)
        if i < count:
            right = found.chains.index(question.chain) if question.chain in found.chains else None
            correct = 0.0 if right is None else found.log_prior[right].exp().item()
            joint = (found.log_prior + found.log_likelihood).exp().sum().item()
            figures.append((joint, correct, 1 - found.log_prior.exp().sum().item()))
    accuracy, correct, unexplored = torch.tensor(figures).mean(0).tolist()
    return Report(
        accuracy=Gate("prior probability of the right answer", accuracy, least=0.05),
        correct=Gate("  of the right chain", correct),
        possible=Gate("  with all chains that were not explored", accuracy + unexplored, most=0.25),
        mode=Gate("posterior modes that are the right chain", sum(modes) / len(modes), least=0.9),
    )


WORLD = World(
    WORDS, rows, report, WORD, layers=4, context=48, rows_a_step=64, steps=2200, learning_rate=3e-3, rotary=True
)
