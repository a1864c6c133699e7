"""Continuation of the embedded stories, or of the user's prompts; the programs are in `programs/continuation.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Unpack

import torch
from torch import Tensor

from .. import embedded
from ..inference import Enumeration
from ..language_model import LanguageModel
from ..text import length
from .data_files import read_each
from .experiment import Experiment, Options, Recipe, Start, split
from .programs.continuation import EMBEDDED_LONGEST, PLAIN, Continuation, temperatures

TEMPERATURES = (0.8, 0.85, 0.9, 0.95)
CONDITIONED, EMBEDDED_CONDITIONED = "Temperature {T}. {x}", "{T}\n{x}"  # prompts of a guide of several temperatures
LONGEST = 30  # tokens of a continuation on other language models
EMBEDDED_PROMPT = "Story: {x}\nStory:"  # the same story's next sentence follows, or another story's first
TEST_PROMPTS, HELD_OUT_PROMPTS = 8, 8


def symbols(T: float) -> str:
    """A temperature in hundredths, in symbols: the embedded language model has no digits."""
    return f"{round(100 * T):03d}".translate(str.maketrans("0123456789", "|-#*();,?!"))


def embedded_prompts() -> tuple[list[str], list[str], list[str]]:
    """The embedded stories' 64 beginnings for training, validation and test; no beginning is in two of them."""
    told = sorted({story.x for name in ("train", "validation", "test") for story in embedded.data("stories", name)})
    Random("beginnings").shuffle(told)
    prompts = [EMBEDDED_PROMPT.format(x=x) for x in told]
    held_out, test = prompts[:HELD_OUT_PROMPTS], prompts[HELD_OUT_PROMPTS : HELD_OUT_PROMPTS + TEST_PROMPTS]
    return prompts[HELD_OUT_PROMPTS + TEST_PROMPTS :], held_out, test


def read_prompts(path: str | Path) -> list[str]:
    """The distinct lines of a text file, a prompt in each line, in their order; errors as in `read_each`."""
    return list(dict.fromkeys(read_each(path, str.strip, "prompt")))


def experiment(
    lm: LanguageModel | None = None,
    data: str | Path | None = None,
    *,
    temperature: float | Sequence[float] = TEMPERATURES[0],
    max_tokens: int | None = None,
    **options: Unpack[Options],
) -> Experiment:
    """The next sentence after a prompt, from the language model with its sequences tempered.

    It runs on the embedded story LM, whose target is known, or on ``lm`` with the prompts of the file ``data``.

    :param lm: a language model; None: the embedded one.
    :param data: a text file with a prompt in each line; None: the embedded stories.
    :param temperature: T, or several: one guide for all of them, which reads T in its prompt.
    :param max_tokens: the most tokens of a sentence before its stop; None: 7 on the embedded stories, 30 with ``data``.
    :param options: those of every experiment, see `experiment.Options`.
    :returns: an `Experiment`.
    :raises ValueError: for another language model without ``data``, and prompts that are too long for its context.
    """
    several, known = temperatures(temperature), data is None  # known: the target can be enumerated
    needs = "prompts of its own, a file with one prompt per line"
    start = Start.of("continuation", "stories", lm, data, Recipe(), needs, **options)
    prompts = embedded_prompts() if data is None else split(read_prompts(data))
    template, write = wording(several, known)
    longest = (EMBEDDED_LONGEST if known else LONGEST) if max_tokens is None else max_tokens
    task = Continuation(start.lm, start.guide_lm, max_tokens=longest, template=template, write=write)
    for part in prompts:
        _refuse_long(task, part, several)
    x, _ = task.encode(prompts[0], several)
    chosen = start.recipe.passes(len(x), start.seed)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        rows = chosen(step)
        turn = (torch.arange(len(rows), device=x.device) + step) % len(several)  # every prompt meets every temperature
        return x[rows], torch.tensor(several, device=x.device)[turn]

    tested = dict(zip(prompts[2], cycle(several), strict=False))

    def describe(prompt: str) -> str:
        at = f"    (T = {tested[prompt]:g})" if len(several) > 1 else ""
        return prompt.replace("\n", " / ") + " [...]" + at

    return start.experiment(
        task,
        prompts,
        describe,
        encode=lambda part: task.encode(part, several),
        batches=batches,
        exact=Enumeration(task.model, mass=0.998) if known else None,
        target=f"p(z|x)^(1/T), T = {', '.join(f'{t:g}' for t in several)}",
    )


def wording(several: Sequence[float], known: bool) -> tuple[str, Callable[[float], str]]:
    """The guide's prompt, and the function that writes a temperature into it.

    :raises ValueError: naming ``temperature``, where two of several are written in the same way.
    """
    if len(several) == 1:
        return PLAIN, "{:g}".format
    template, write = (EMBEDDED_CONDITIONED, symbols) if known else (CONDITIONED, "{:g}".format)
    if len({write(t) for t in several}) < len(several):
        raise ValueError(f"temperature: two of {several} look the same in the guide's prompt")
    return template, write


def _refuse_long(task: Continuation, prompts: Sequence[str], several: Sequence[float]) -> None:
    """Raises ValueError naming the first prompt that with its continuation exceeds the context."""
    lm, T = task.lm, torch.tensor(several[:1], device=task.lm.device)
    if lm.max_length is None:
        return
    x = lm.encode(list(prompts))
    fixed = int(length(task.guide_prompt(lm.encode([""]), T)).max()) if task.template != PLAIN else 0
    needed = length(x) + fixed + task.max_tokens + 1  # a bos
    if bool((needed > lm.max_length).any()):
        i = int((needed > lm.max_length).int().argmax())
        raise ValueError(
            f"data: the prompt {prompts[i][:40]!r}... needs {int(needed[i])} tokens with its continuation, but this "
            f"model's context holds {lm.max_length}"
        )
