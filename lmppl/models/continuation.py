"""Continuation: the next sentence, from a language model whose whole *sequence* is tempered.

q(z | x)  proportional to  p(z | x)^(1/T)

Hu et al. 2024, "Amortizing intractable inference in large language models", section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .. import embedded
from ..distributions import Completion
from ..inference import Enumeration
from ..language_model import LanguageModel
from ..text import length
from .data_files import read_lines
from .experiment import Experiment, Recipe, paper_setting, split

TEMPERATURES = (0.8, 0.85, 0.9, 0.95)
PLAIN, CONDITIONED = "{x}", "Temperature {T}. {x}"  # guides' prompts
LONGEST = 30  # tokens of a continuation on other language models
EMBEDDED_LONGEST = 7
EMBEDDED_CONDITIONED = "{T}\n{x}"
EMBEDDED_PROMPT = "Story: {x}\nStory:"  # what follows is the same story's next sentence, or another story's first
TEST_PROMPTS, HELD_OUT_PROMPTS = 8, 8


class Continuation:
    r"""The model and guide of tempered continuation, for any language model.

    .. math:: \tilde p(z \mid x) = p(z \mid x)^{1/T}

    A token temperature divides every token's logits and renormalises token by token; here the whole sequence is
    tempered and the sum over texts is one, so that a likely beginning that leads to unlikely texts is avoided.

    :param lm: the language model p, frozen.
    :param guide_lm: the guide's, usually ``lm.with_adapter(...)``; None: no guide.
    :param max_tokens: the most tokens of a continuation before its stop.
    :param stop: its stop, a sentence end.
    :param template: the guide's prompt, with the field x and, for one guide of several temperatures, the field T.
    :param write: the words for a temperature.

    `model(x, T)` and `guide(x, T)` are Pyro programs over prompts x (B, L) and temperatures T (B,), with one plate.
    """

    def __init__(
        self,
        lm: LanguageModel,
        guide_lm: LanguageModel | None = None,
        *,
        max_tokens: int = EMBEDDED_LONGEST,
        stop: str = ".",
        template: str = PLAIN,
        write: Callable[[float], str] = "{:g}".format,
    ):
        self.lm, self.guide_lm = lm, guide_lm
        self.max_tokens, self.stop, self.template, self.write = max_tokens, stop, template, write

    def model(self, x: Tensor, T: Tensor) -> Tensor:
        """z ~ LM(x), its log-probability times 1 / T."""
        with pyro.plate("prompts", len(x)), poutine.scale(scale=1 / T):
            return pyro.sample("z", Completion(self.lm, x, max_tokens=self.max_tokens, stop=self.stop))

    def guide(self, x: Tensor, T: Tensor) -> Tensor:
        """z ~ q(z | x), or q(z | x, T) where the template has T."""
        if self.guide_lm is None:
            raise ValueError("guide_lm: this Continuation was made without a guide")
        with pyro.plate("prompts", len(x)):
            prompt = self.guide_prompt(x, T)
            return pyro.sample("z", Completion(self.guide_lm, prompt, max_tokens=self.max_tokens, stop=self.stop))

    def guide_prompt(self, x: Tensor, T: Tensor) -> Tensor:
        """What the guide reads, (B, L)."""
        fields = {"x": x}
        if "{T}" in self.template:
            fields["T"] = self.lm.encode([self.write(round(t, 6)) for t in T.tolist()])
        return self.lm.fill(self.template, **fields)

    def encode(self, prompts: Sequence[str], temperature: float | Sequence[float]) -> tuple[Tensor, Tensor]:
        """The arguments (x, T) of model and guide; several temperatures take turns.

        :raises ValueError: naming ``temperature``, where one is not positive.
        """
        several = temperatures(temperature)
        turns = [several[i % len(several)] for i in range(len(prompts))]
        return self.lm.encode(list(prompts)), torch.tensor(turns, device=self.lm.device)


def temperatures(given: float | Sequence[float]) -> tuple[float, ...]:
    """One or several temperatures, checked."""
    several = (float(given),) if isinstance(given, int | float) else tuple(float(t) for t in given)
    if not several or not all(0 < t < float("inf") for t in several):
        raise ValueError(f"temperature: expected positive numbers, got {given}")
    return several


def symbols(T: float) -> str:
    """A temperature in hundredths, in the embedded language model's words: it has no digits, so symbols stand in."""
    return f"{round(100 * T):03d}".translate(str.maketrans("0123456789", "|-#*();,?!"))


def embedded_prompts() -> tuple[list[str], list[str], list[str]]:
    """The embedded stories' 64 beginnings for training, validation and test, no beginning in two of them."""
    told = sorted({story.x for name in ("train", "validation", "test") for story in embedded.data("stories", name)})
    Random("beginnings").shuffle(told)
    prompts = [EMBEDDED_PROMPT.format(x=x) for x in told]
    held_out, test = prompts[:HELD_OUT_PROMPTS], prompts[HELD_OUT_PROMPTS : HELD_OUT_PROMPTS + TEST_PROMPTS]
    return prompts[HELD_OUT_PROMPTS + TEST_PROMPTS :], held_out, test


def read_prompts(path: str | Path) -> list[str]:
    """The distinct lines of a text file, a prompt a line, in their order; empty lines are passed over.

    :raises ValueError: naming the file, where it has no prompt.
    """
    prompts = list(dict.fromkeys(line.strip() for _, line in read_lines(path)))
    if not prompts:
        raise ValueError(f"data: {path} has no prompt in it")
    return prompts


def experiment(
    lm: LanguageModel | None = None,
    data: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    setting: str = "posterior",
    device: str | None = None,
    temperature: float | Sequence[float] = TEMPERATURES[0],
    max_tokens: int | None = None,
) -> Experiment:
    """The next sentence after a prompt, from the language model with its sequences tempered.

    On the embedded story LM, where the target is known, or on ``lm`` with the prompts of the file ``data``;
    ``checkpoint`` is a trained adapter to start from.  Several temperatures: one guide for all of them, which reads its
    temperature in its prompt.

    :raises ValueError: for another language model without ``data``, or prompts too long for its context.
    """
    paper_setting(setting)  # the posterior, too
    recipe, several = recipe or Recipe(), temperatures(temperature)
    if lm is not None and data is None:
        raise ValueError("data: another language model needs prompts of its own, a file with a prompt a line")
    known = data is None  # the target can be enumerated
    lm = lm or LanguageModel.embedded("stories", device=device)
    guide_lm = recipe.guide_lm(lm, seed, checkpoint)
    train, held_out, test = embedded_prompts() if data is None else split(read_prompts(data))
    template: str = PLAIN
    write: Callable[[float], str] = "{:g}".format
    if len(several) > 1:
        template, write = (EMBEDDED_CONDITIONED, symbols) if known else (CONDITIONED, write)
        if len({write(t) for t in several}) < len(several):
            raise ValueError(f"temperature: {several} are not all written differently in the guide's prompt")
    task = Continuation(
        lm, guide_lm, max_tokens=max_tokens or (EMBEDDED_LONGEST if known else LONGEST), template=template, write=write
    )
    x, _ = task.encode(train, several)
    for prompts in (train, held_out, test):
        _refuse_long(task, prompts, several)
    chosen = recipe.passes(len(train), seed)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        rows = chosen(step)
        turn = (torch.arange(len(rows), device=x.device) + step) % len(several)  # every prompt meets every temperature
        return x[rows], torch.tensor(several, device=x.device)[turn]

    def describe(i: int) -> str:
        told = f"    (T = {several[i % len(several)]:g})" if len(several) > 1 else ""
        return test[i].replace("\n", " / ") + " [...]" + told

    return Experiment(
        name="continuation",
        lm=lm,
        guide_lm=guide_lm,
        model=task.model,
        guide=task.guide,
        batches=batches,
        held_out=task.encode(held_out, several),
        test=task.encode(test, several),
        describe=describe,
        exact=Enumeration(task.model, mass=0.998) if known else None,
        recipe=recipe,
        target=f"p(z|x)^(1/T), T = {', '.join(f'{t:g}' for t in several)}",
    )


def _refuse_long(task: Continuation, prompts: Sequence[str], several: Sequence[float]) -> None:
    """Raise ValueError naming the first prompt that with its continuation exceeds the context."""
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
