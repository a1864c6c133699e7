"""A random number: what a language model says is neither valid nor uniform, and the posterior is.

z ~ LM("... a random integer drawn uniformly between {a} and {b}: "),    1[a <= z <= b] observed

    target "valid":    p(z | a <= z <= b), the language model conditioned on validity
    target "uniform":  1[a <= z <= b] / (b - a + 1): a factor 1 / p(z) takes the language model's opinion back
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyro
import torch
from torch import Tensor

from .. import text
from ..distributions import Completion
from ..embedded import Bounds
from ..embedded.numbers import FIXED, MAX_TOKENS
from ..inference import Enumeration, Linex, Mixture, Prior, Replay, Tempered, VarGrad
from ..inference.training.loop.schedules import linear
from ..language_model import LanguageModel
from .data_files import read_lines
from .experiment import Experiment, Recipe, embedded_splits, paper_setting

TARGETS = "uniform", "valid"
# Invalid answers count as 18 nats below valid ones: enough for 2e-5 of the mass on all of them together.
OBJECTIVE = partial(VarGrad, floor=18.0)


# The guide soon drops 100, the only number of three digits, and cannot find it again: the prior's draws come first, and
# the replay buffer keeps what they found.
def early_prior(steps: int) -> Mixture:
    """Half of the draws from the prior at first, none after so many steps."""
    return Mixture((Tempered(1.5, 0.25), 1.0), (Prior(), linear(1.0, 0.0, steps)))


# A thousandth of the language model's mass is words and stops where a digit belongs.  With the output head frozen even
# maximum likelihood on the exact target leaves it there (docs/random_number.md): the head is adapted too, at full rank.
ADAPTER = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["c_attn", "c_proj", "c_fc", "lm_head"],
    "rank_pattern": {"lm_head": 48},
    "alpha_pattern": {"lm_head": 960},
}
# Gradients fall by two orders of magnitude: a second moment that remembers the first ones would slow the last steps.
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
# Between unseen bounds the guide errs at the edges for long.  A squared loss asks there for exact log-probabilities of
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


class RandomNumber:
    """The model and guide of a random number, for any language model.

    :param lm: the language model p, frozen.
    :param guide_lm: the guide's, usually ``lm.with_adapter(...)``; None: no guide.
    :param target: "uniform" or "valid".
    :param max_tokens: the most tokens of an answer before its stop.

    `model(a, b)` and `guide(a, b)` are Pyro programs over bounds a, b (B,), with one plate of prompts.

    :raises ValueError: for a target that is neither.
    """

    def __init__(
        self,
        lm: LanguageModel,
        guide_lm: LanguageModel | None = None,
        *,
        target: str = "uniform",
        max_tokens: int = MAX_TOKENS,
    ):
        if target not in TARGETS:
            raise ValueError(f"target: expected one of {', '.join(map(repr, TARGETS))}, got {target!r}")
        self.lm, self.guide_lm, self.target, self.max_tokens = lm, guide_lm, target, max_tokens

    def model(self, a: Tensor, b: Tensor) -> Tensor:
        """z ~ LM(prompt); z is valid; perhaps its probability is cancelled."""
        prior = self.completion(self.lm, a, b)
        with pyro.plate("prompts", len(a)):
            z = pyro.sample("z", prior)
            pyro.factor("valid", torch.where(self.valid(z, a, b), 0.0, -torch.inf))
            if self.target == "uniform":
                pyro.factor("no opinion", -_finite(prior.log_prob(z)))
            return z

    def guide(self, a: Tensor, b: Tensor) -> Tensor:
        """z ~ q(z | a, b), a language model that reads the same prompt."""
        if self.guide_lm is None:
            raise ValueError("guide_lm: this RandomNumber was made without a guide")
        with pyro.plate("prompts", len(a)):
            return pyro.sample("z", self.completion(self.guide_lm, a, b))

    def digits(self, a: Tensor, b: Tensor) -> Tensor:
        """The model's joint of answers made of digits, all that can be valid: few enough to enumerate.

        z ~ LM(prompt) among digits and the stop, p_d(z); the factor p(z) / p_d(z) makes up for what was left out.
        """
        among = [self.lm.token_id(digit) for digit in "0123456789."]
        prior, spelled = self.completion(self.lm, a, b), self.completion(self.lm, a, b, allowed=among)
        with pyro.plate("prompts", len(a)):
            z = pyro.sample("z", spelled)
            pyro.factor("valid", torch.where(self.valid(z, a, b), 0.0, -torch.inf))
            joint = prior.log_prob(z) if self.target == "valid" else 0.0
            pyro.factor("any answer", joint - _finite(spelled.log_prob(z)))
            return z

    def valid(self, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Whether an answer (..., B, L) is a number within the bounds, without leading zeros: (..., B)."""
        number = text.map(number_in, z, self.lm)
        return (a <= number) & (number <= b)

    def completion(self, lm: LanguageModel, a: Tensor, b: Tensor, allowed: Sequence[int] | None = None) -> Completion:
        """What a language model answers, with tokens ``allowed`` only."""
        prompts = lm.encode([Bounds(*pair).prompt for pair in zip(a.tolist(), b.tolist(), strict=True)])
        # Decoding drops an eos, so "4<eos>2." would read as 42: an answer may end with eos, and is then none.
        return Completion(lm, prompts, max_tokens=self.max_tokens, stop=(".", "eos"), allowed=allowed)


def number_in(answer: str) -> int:
    """The number of an answer with its stop; -1 where it is none.

    >>> [number_in(s) for s in ("42.", "042.", "a number.", ".")]
    [42, -1, -1, -1]
    """
    found = re.fullmatch(r"(0|[1-9]\d{0,8})\.", answer)
    return int(found[1]) if found else -1


def _finite(log_prob: Tensor) -> Tensor:
    """What a sampler never draws has no density to cancel: -inf counts as 0, and the site itself says -inf."""
    return log_prob.masked_fill(log_prob == -torch.inf, 0.0)


def tensors(pairs: Sequence[Bounds], device: str | torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The arguments (a, b) of model and guide, each (B,)."""
    a, b = torch.tensor(pairs, device=device).T
    return a.contiguous(), b.contiguous()


def read_bounds(path: str | Path) -> list[Bounds]:
    """Pairs of bounds from a text file, "a b" a line; empty lines are passed over.

    :raises ValueError: naming the file and line, where a line is not two integers 0 <= a <= b.
    """
    pairs = []
    for number, line in read_lines(path):
        found = re.fullmatch(r"(\d{1,9})\s+(\d{1,9})", line.strip())
        if not found or int(found[1]) > int(found[2]):
            raise ValueError(f"data: {path}, line {number} is not two integers 0 <= a <= b")
        pairs.append(Bounds(int(found[1]), int(found[2])))
    if not pairs:
        raise ValueError(f"data: {path} has no bounds in it")
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
    target: str = "uniform",
    unseen: bool = False,
) -> Experiment:
    """A random integer between 0 and 100: uniform, whatever the language model prefers.

    ``data``, a file with bounds "a b" a line, takes the place of 0 and 100; with ``unseen`` the guide is trained on the
    embedded training pairs and tested on others.  ``target`` as in `RandomNumber`.

    :raises ValueError: for a target that is neither, and ``unseen`` together with ``data``.
    """
    if unseen and data is not None:
        raise ValueError("data: `unseen` has pairs of its own")
    paper_setting(setting)  # the posterior, too
    train = held_out = test = [FIXED] if data is None else read_bounds(data)
    if unseen:
        train, held_out, test = embedded_splits("numbers")
    own = lm is None
    if recipe is None:
        recipe = BOUNDS_RECIPE if unseen else FIXED_RECIPE
        recipe = recipe if own else replace(recipe, adapter=Recipe().adapter)  # another network's layers, other names
    lm = lm or LanguageModel.embedded("numbers", device=device)
    guide_lm = recipe.guide_lm(lm, seed, checkpoint)
    task = RandomNumber(lm, guide_lm, target=target)
    a, b = tensors(train, lm.device)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        """Pairs drawn anew every step."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randperm(len(train), generator=generator)[: recipe.observations]
        return a[chosen], b[chosen]

    return Experiment(
        name="random_number",
        lm=lm,
        guide_lm=guide_lm,
        model=task.model,
        guide=task.guide,
        batches=batches,
        held_out=tensors(held_out, lm.device),
        test=tensors(test, lm.device),
        describe=lambda i: test[i].prompt,
        exact=Enumeration(task.digits) if own else None,
        recipe=recipe,
        target={"uniform": "uniform on the valid numbers", "valid": "the posterior, p(z | valid)"}[target],
    )


def valid_experiment(lm: LanguageModel | None = None, data: str | Path | None = None, **options) -> Experiment:
    """A random integer between 0 and 100: the language model's own, conditioned on validity."""
    return experiment(lm, data, target="valid", **options)


def bounds_experiment(lm: LanguageModel | None = None, data: str | Path | None = None, **options) -> Experiment:
    """A random integer between bounds that no training prompt had: uniform."""
    return experiment(lm, data, unseen=True, **options)
