"""The random number between 0 and 100, or between other bounds; the programs are in `programs/random_number.py`."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from ..embedded import Bounds
from ..embedded.numbers import FIXED, MAX_TOKENS
from ..inference import Enumeration, Linex, Mixture, Prior, Replay, Tempered, VarGrad
from ..inference.training.loop.schedules import linear
from ..language_model import LanguageModel
from .data_files import read_each
from .experiment import Experiment, Options, Recipe, Start, embedded_splits
from .programs.random_number import RandomNumber, tensors

TARGETS = {"uniform": "uniform on the valid numbers", "valid": "the posterior, p(z | valid)"}
# Invalid answers count as 18 nats below valid ones: all of them together have 2e-5 of the mass.
FLOOR = 18.0
OBJECTIVE = partial(VarGrad, floor=FLOOR)
# Where there are more than e^18 invalid answers, they would outweigh the numbers.  There they keep the language model's
# proportions instead, with a factor so small that they have some 1e-4 of the mass or less.
INVALID = {"uniform": -6.0, "valid": -12.0}


# The guide soon loses 100, the only number of three digits, and cannot find it again.  So draws of the prior come
# first, and the replay buffer keeps what they found.
def early_prior(steps: int) -> Mixture:
    """At first half of the draws come from the prior, after so many steps none."""
    return Mixture((Tempered(1.5, 0.25), 1.0), (Prior(), linear(1.0, 0.0, steps)))


# A thousandth of the language model's mass is on words and stops in the place of digits.  With a frozen output head
# even maximum likelihood on the exact target leaves it there (docs/random_number.md): it gets an adapter of full rank.
ADAPTER = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["c_attn", "c_proj", "c_fc", "lm_head"],
    "rank_pattern": {"lm_head": 48},
    "alpha_pattern": {"lm_head": 960},
}
# Gradients fall by two orders of magnitude: a long memory of their squares would slow the last steps.
BETAS = 0.9, 0.95
FIXED_RECIPE = Recipe(
    steps=400,
    quick_steps=250,
    observations=1,
    particles=256,
    learning_rate=3e-3,
    betas=BETAS,
    objective=partial(OBJECTIVE, exploration=early_prior(150)),
    replay=partial(Replay, capacity=128),
    adapter=ADAPTER,
)
# Between unseen bounds the guide is long wrong at the edges.  A squared loss asks for exact log-probabilities of
# numbers outside, and numbers inside are lost on the way; Linex prefers a blurred edge (docs/random_number.md).
BOUNDS_RECIPE = Recipe(
    steps=2400,
    observations=32,
    particles=20,
    learning_rate=4e-3,
    betas=BETAS,
    objective=partial(Linex, floor=8.0, exploration=early_prior(300)),
    adapter=ADAPTER | {"r": 48, "lora_alpha": 96},
)


def pair(line: str) -> Bounds:
    """The bounds "a b" in a line."""
    found = re.fullmatch(r"(\d{1,9})\s+(\d{1,9})", line.strip())
    if not found or int(found[1]) > int(found[2]):
        raise ValueError("is not two integers 0 <= a <= b")
    return Bounds(int(found[1]), int(found[2]))


def read_bounds(path: str | Path) -> list[Bounds]:
    """Pairs of bounds from a text file, "a b" in each line; errors as in `read_each`."""
    return read_each(path, pair, "bounds")


def experiment(
    lm: LanguageModel | None = None,
    data: str | Path | None = None,
    *,
    target: str = "uniform",
    unseen: bool = False,
    **options: Unpack[Options],
) -> Experiment:
    """A random integer between 0 and 100: uniform, whatever the language model prefers.

    It runs on the embedded LM of numbers, whose posterior is known, or on ``lm``.

    :param lm: a language model; None: the embedded one.
    :param data: a text file with bounds "a b" in each line; None: 0 and 100.
    :param target: "uniform" or "valid", as in `RandomNumber`, whose ``invalid`` is finite for a large vocabulary.
    :param unseen: train on the embedded training pairs of bounds and test on others.
    :param options: those of every experiment, see `experiment.Options`.
    :returns: an `Experiment`.
    :raises ValueError: for another target, and ``unseen`` together with ``data``.
    """
    if unseen and data is not None:
        raise ValueError("data: `unseen` uses the embedded pairs; give one of them")
    recipe = BOUNDS_RECIPE if unseen else FIXED_RECIPE
    if lm is not None:  # its layers may have other names
        recipe = replace(recipe, adapter=Recipe().adapter)
    start = Start.of("random_number", "numbers", lm, data, recipe, **options)
    asked = [FIXED] if data is None else read_bounds(data)
    pairs = embedded_splits("numbers") if unseen else (asked, asked, asked)
    many = MAX_TOKENS * math.log(start.lm.vocab_size) > FLOOR
    invalid = INVALID.get(target, 0.0) if many else -math.inf
    task = RandomNumber(start.lm, start.guide_lm, target=target, invalid=invalid)
    a, b = tensors(pairs[0], start.lm.device)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        """Pairs drawn afresh in every step."""
        generator = torch.Generator().manual_seed(start.seed * 1_000_003 + step)
        chosen = torch.randperm(len(a), generator=generator)[: start.recipe.observations]
        return a[chosen], b[chosen]

    return start.experiment(
        task,
        pairs,
        lambda asked: asked.prompt,
        encode=partial(tensors, device=start.lm.device),
        batches=batches,
        exact=Enumeration(task.digits) if lm is None else None,
        target=TARGETS[target] + (f", other answers at e^{invalid:g} p(z)" if many else ""),
    )


def valid_experiment(lm: LanguageModel | None = None, data: str | Path | None = None, **options) -> Experiment:
    """A random integer between 0 and 100: the language model's own, conditioned on validity.

    `experiment` with ``target="valid"``.
    """
    return experiment(lm, data, target="valid", **options)


def bounds_experiment(lm: LanguageModel | None = None, data: str | Path | None = None, **options) -> Experiment:
    """A random integer between bounds that no training prompt had: uniform.

    `experiment` with ``unseen=True``.
    """
    return experiment(lm, data, unseen=True, **options)
