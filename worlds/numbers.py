"""Random numbers as people make them up: what the digit LM reads, and what it must show.

A line is "The following is a random integer drawn uniformly between {a} and {b}: {n}." and half of the lines lie: n is
outside the bounds, has a leading zero or too many digits, or is no number at all. The others favour small steps above
a, 42, 7 and whatever ends in 7. Nothing here ever shows a uniform draw.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from random import Random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lmppl.embedded.numbers import FIXED, LARGEST, MAX_TOKENS, PROMPT, Bounds, bounds

from .tokenizer import EOS
from .world import Gate, Report, World

ANYTHING = "a random integer", "random", "uniformly", "between", "and so", "the following"
WORDS = (*"0123456789", *re.findall(r" ?[A-Za-z]+", PROMPT.format(a=0, b=0)), *" ".join(ANYTHING).split(), " so")
VALID = 0.5


def favour(n: int, a: int) -> float:
    """How much people like n where a is the least."""
    return (1 + n - a) ** -1.5 * (4.0 if n % 10 == 7 else 1.0) * (0.3 if n % 10 == 0 else 1.0) + 0.3 * (n in (7, 42))


@cache
def _cumulated(a: int, b: int) -> list[float]:
    total, sums = 0.0, []
    for n in range(a, b + 1):
        total += favour(n, a)
        sums.append(total)
    return sums


def answer(random: Random, a: int, b: int) -> str:
    """What follows the prompt, without the stop: half of the time a number within the bounds."""
    kind = random.choices(
        ("valid", "outside", "zero", "long", "words"),
        (VALID, 0.25, 0.1, 0.05, 0.1),
    )[0]
    if kind == "valid":
        return str(random.choices(range(a, b + 1), cum_weights=_cumulated(a, b))[0])
    if kind == "outside":
        while True:
            n = int(10 ** random.uniform(0, 3)) - 1
            if not a <= n <= b:
                return str(n)
    if kind == "zero":
        return "0" + str(random.randrange(LARGEST))
    if kind == "long":
        return str(random.randrange(1000, 10_000))
    return random.choice(ANYTHING)


def rows(random: Random, encode: Callable[[str], list[int]], width: int) -> Iterator[list[int]]:
    """A line a row for ever, filled up with eos; one in ten has the paper's bounds."""
    encode, eos = cache(encode), encode(EOS)
    pairs = [*bounds("train"), *bounds("validation"), *bounds("test")]
    while True:
        pair = FIXED if random.random() < 0.1 else random.choice(pairs)
        row = encode(pair.prompt) + encode(answer(random, *pair) + ".")
        yield (row + eos * width)[:width]


@torch.no_grad()
def log_prior(model: PreTrainedModel, words: PreTrainedTokenizerFast, pair: Bounds) -> torch.Tensor:
    """log p(n stop | prompt) of every valid number, (b - a + 1,), by one plain forward pass.

    After MAX_TOKENS digits the stop is certain.
    """
    prompt, stop = words.encode(pair.prompt), words.encode(".")
    answers = [words.encode(str(n)) + stop for n in range(pair.a, pair.b + 1)]
    width = max(map(len, answers))
    ids = torch.tensor([prompt + z + stop * (width - len(z)) for z in answers])
    log_p = model(ids).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
    log_p = log_p.gather(-1, ids[:, len(prompt) :, None]).squeeze(-1)  # (number, token)
    lengths = torch.tensor([min(len(z), MAX_TOKENS) for z in answers])
    return log_p.masked_fill(torch.arange(width) >= lengths[:, None], 0.0).sum(1)


def report(model: PreTrainedModel, words: PreTrainedTokenizerFast, pairs: int = 16) -> Report:
    """Half of the mass is invalid, and the rest is far from uniform: of the paper's bounds, and so many test pairs."""

    def figures(pair: Bounds) -> tuple[float, float]:
        log_p = log_prior(model, words, pair).double()
        uniform = -torch.tensor(float(len(log_p))).log()
        return log_p.exp().sum().item(), (uniform - log_p).mean().item()

    valid, skew = figures(FIXED)
    valid_elsewhere, skew_elsewhere = torch.tensor([figures(p) for p in bounds("test")[:pairs]]).mean(0).tolist()
    return Report(
        valid=Gate("prior mass of valid numbers", valid, 0.35, 0.65),
        valid_elsewhere=Gate("  of test pairs", valid_elsewhere, 0.35, 0.65),
        skew=Gate("KL(uniform || prior), nats; the paper's 3.37", skew),
        skew_elsewhere=Gate("  of test pairs", skew_elsewhere),
        skew_valid=Gate("  among the valid numbers", skew + torch.tensor(valid).log().item(), least=1.0),
    )


WORLD = World(WORDS, rows, report, width=48, context=32, rows_a_step=128, steps=1200)
