r"""Thoughts between a question and its answer: plans whose number of steps is random, and trees whose path counts.

A chain:  z_d ~ LM(s_d),   more_d ~ LM(s_d z_d): "," or ".",   s_{d+1} = s_d z_d more_d,   y ~ LM(s "The answer is"),
          with a factor e^(v(s_{d+1})), its evaluation, for each state that is reached
A tree:   k_d ~ children,   z_d1 .. z_dk ~ LM(s_d),   j_d = i with probability e^(v_i) / sum_i e^(v_i),
          v_i = v(s_d z_di),   s_{d+1} = s_d z_dj,   y likewise,
          with a factor (1 / k_d) sum_i e^(v_i), the mean evaluation of the children, for each level

What follows from a thought, as the result of a sum, is written by the program; thoughts that are not there are texts
of no tokens.  The path of a tree is a chain: choice and factor together are e^(v_j) / k, an even choice and the
evaluation of the child that is taken, and children are alike, so that

    p(path, y) = p(z_1) .. p(z_D) e^(v(s_2) + .. + v(s_{D+1})) p(y | s_{D+1}),    whatever the number of children.

`TreeOfThoughts.search` is the tree as one builds it, without the factors.  What it finds is a draw of the posterior
only after it is weighted by them: by the mean evaluations of its own children.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Categorical
from torch import Tensor

from ... import text
from ...constraints import Constraint
from ...distributions import Completion
from ...language_model import LanguageModel

TEMPLATE = "{y}{x}"  # what the guide reads: the answer before what has been told
MARKS = ",", "."  # after a step that is not the last one, and after the last one
ASK, LONGEST_ANSWER = " The answer is", 1

After = Callable[[str], str]
Evaluation = Callable[[Tensor], Tensor]


class Thoughts:
    """What both programs are made of.

    :param lm: the language model p, frozen.
    :param guide_lm: the guide's, usually ``lm.with_adapter(...)``; None: no guide.
    :param steps: D, the most steps.
    :param max_tokens: of a thought before its stop.
    :param stop: its stop; None: a thought is exactly ``max_tokens`` tokens.
    :param allowed: a constraint on the tokens of a thought that has no stop.
    :param after: what follows from the string told so far, the question first; None: nothing.
    :param evaluate: what has been told (..., B, L) -> its log score (..., B); None: 0.
    :param marks: what is written after a step that is not the last one, and after the last one.
    :param ask: what is written before the answer.
    :param max_answer: the most tokens of an answer before ``stop_answer``.
    :param template: the guide's prompt, with the fields x (what has been told) and y (the answer).

    :raises ValueError: for fewer steps than one, and a constraint on thoughts that have a stop.
    """

    def __init__(
        self,
        lm: LanguageModel,
        guide_lm: LanguageModel | None = None,
        *,
        steps: int = 2,
        max_tokens: int = 2,
        stop: str | None = None,
        allowed: Constraint | None = None,
        after: After | None = None,
        evaluate: Evaluation | None = None,
        marks: tuple[str, str] = MARKS,
        ask: str = ASK,
        max_answer: int = LONGEST_ANSWER,
        stop_answer: str = ".",
        template: str = TEMPLATE,
    ):
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        if allowed is not None and stop is not None:
            raise ValueError("allowed: a thought with a stop may be empty, which a constraint would forbid; stop=None")
        self.lm, self.guide_lm, self.steps = lm, guide_lm, steps
        self.max_tokens, self.stop, self.allowed = max_tokens, stop, allowed
        self.after, self.evaluate, self.marks = after, evaluate, marks
        self.ask, self.max_answer, self.stop_answer, self.template = ask, max_answer, stop_answer, template

    def thought(self, lm: LanguageModel, told: Tensor, there: Tensor) -> Completion:
        """The thoughts that a language model has after ``told`` (..., B, L); where not ``there`` (..., B), no token."""
        limit = torch.where(there, self.max_tokens, 0)
        return Completion(lm, told, max_tokens=limit, stop=self.stop, allowed=self.allowed)

    def follow(self, told: Tensor) -> Tensor:
        """What has been told, with what follows from it: (..., L) -> (..., L')."""
        if self.after is None:
            return told
        written: list[str] = []

        def number(told: str) -> int:
            written.append(self.after(told))  # type: ignore[misc]
            return len(written) - 1

        which = text.map(number, told, self.lm)
        return self.lm.join(told, self.lm.encode(written)[which])

    def reads(self, told: Tensor, y: Tensor) -> Tensor:
        """The guide's prompt."""
        if self.guide_lm is None:
            raise ValueError(f"guide_lm: this {type(self).__name__} was made without a guide")
        return self.guide_lm.fill(self.template, x=told, y=y)

    def answer(self, told: Tensor, y: Tensor | None) -> Tensor:
        """y ~ LM(told "The answer is"), observed or queried."""
        asked = self.lm.join(told, self.ask)
        return pyro.sample("y", Completion(self.lm, asked, max_tokens=self.max_answer, stop=self.stop_answer), obs=y)


class ChainOfThoughts(Thoughts):
    """Plans of 1 to D steps: after each the language model says whether another follows.

    Parameters as of `Thoughts`, with marks of one token each.

    `model(x, y)` and `guide(x, y)` are Pyro programs over questions x (B, Lx) and answers y (B, Ly), with one plate;
    without y the answer is a latent site of the model.  Their sites are "thought d" and "more d"; of a plan that has
    ended they are empty.
    """

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Thoughts and marks of the language model, a factor for each state, the answer."""
        with pyro.plate("questions", len(x)):
            told = self.plan(self.lm, x, lambda told: told, evaluated=True)
            return self.answer(told, y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        """Thoughts and marks of a language model that reads the answer."""
        self.reads(x, y)
        assert self.guide_lm is not None
        with pyro.plate("questions", len(x)):
            self.plan(self.guide_lm, x, lambda told: self.reads(told, y), evaluated=False)

    def plan(self, lm: LanguageModel, x: Tensor, prompt: Callable[[Tensor], Tensor], *, evaluated: bool) -> Tensor:
        """What has been told when the plan has ended, (..., B, L)."""
        told, more = self.follow(x), torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        for d in range(1, self.steps + 1):
            z = pyro.sample(f"thought {d}", self.thought(lm, prompt(told), more))
            read = self.follow(self.lm.join(told, said(z, more)))
            on, mark = self.goes_on(lm, d, prompt(read), more)
            read = self.follow(self.lm.join(read, mark))
            told = where(more, read, told)
            if evaluated and self.evaluate is not None:
                pyro.factor(f"evaluation {d}", torch.where(more, self.evaluate(told), 0.0))
            more = on
        return told

    def goes_on(self, lm: LanguageModel, d: int, prompt: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        """Whether a step follows (..., B), as the language model has it, and the mark that says so (..., B, 1)."""
        on, end = (self.lm.token_id(mark) for mark in self.marks)
        if d == self.steps:
            return torch.zeros_like(more), torch.where(more, end, text.PAD)[..., None]
        limit = more.long()
        mark = pyro.sample(f"more {d}", Completion(lm, prompt, max_tokens=limit, stop=None, allowed=[on, end]))
        mark = text.pad(mark, 1)
        return mark[..., 0] == on, mark


class TreeOfThoughts(Thoughts):
    r"""Trees of D levels: children of the path so far, one of which the path goes on with.

    :param children: the probabilities of 1, 2, .. children.

    Other parameters as of `Thoughts`.

    `model(x, y)`, `search(x, y)` and `guide(x, y)` are Pyro programs over questions x (B, Lx) and answers y (B, Ly),
    with one plate; without y the answer is a latent site of the model and of the search.  Their sites are "children d"
    (0 for one child), "thought d.i", and "expand d", the child that the path goes on with; with one child at most there
    is nothing to choose, and neither the first nor the last.

    :raises ValueError: for ``children`` that are no probabilities.
    """

    def __init__(
        self,
        lm: LanguageModel,
        guide_lm: LanguageModel | None = None,
        *,
        children: Sequence[float] = (0.5, 0.5),
        **options: Any,
    ):
        super().__init__(lm, guide_lm, **options)
        share = torch.as_tensor(children, dtype=torch.get_default_dtype(), device=lm.device)
        if share.dim() != 1 or not len(share) or bool((share < 0).any()) or abs(float(share.sum()) - 1) > 1e-5:
            raise ValueError(f"children: expected the probabilities of 1, 2, .. children, got {children}")
        self.most, self.log_children = len(share), share.log()

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Children of the language model, the path through them by evaluation, their mean evaluation, the answer."""
        with pyro.plate("questions", len(x)):
            return self.answer(self.path(x), y)

    def search(self, x: Tensor, y: Tensor | None = None) -> None:
        """The same without the factors.  Given no answer, it asks for one; of a given one it knows nothing."""
        with pyro.plate("questions", len(x)):
            told = self.path(x, weighted=False)
            if y is None:
                self.answer(told, None)

    def path(self, x: Tensor, *, weighted: bool = True) -> Tensor:
        """The tree without its answer; what is told on its path, (..., B, L)."""
        told = self.follow(x)
        for d in range(1, self.steps + 1):
            there = self.count(d, x)
            states = self.thoughts(d, told, there)
            logits = self.even(there)
            if self.evaluate is not None:
                logits = logits + torch.stack(torch.broadcast_tensors(*map(self.evaluate, states)), -1)
                if weighted:
                    count = torch.stack(there).sum(0)
                    pyro.factor(f"evaluation {d}", logits.logsumexp(-1) - count.to(logits.dtype).log())
            told = pick(states, self.chosen(d, logits))
        return told

    def guide(self, x: Tensor, y: Tensor) -> None:
        """Which child the path will go on with, evenly; that one by a language model that reads the answer."""
        self.reads(x, y)
        with pyro.plate("questions", len(x)):
            told = self.follow(x)
            for d in range(1, self.steps + 1):
                there = self.count(d, x)
                chosen = self.chosen(d, self.even(there))
                told = pick(self.thoughts(d, told, there, self.guide_lm, self.reads(told, y), chosen), chosen)

    def count(self, d: int, x: Tensor) -> list[Tensor]:
        """Whether there is a first child, a second, ..: (..., B) each."""
        k = torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device)
        if self.most > 1:
            k = pyro.sample(f"children {d}", Categorical(logits=self.log_children))
        return [i <= k for i in range(self.most)]

    def thoughts(
        self,
        d: int,
        told: Tensor,
        there: list[Tensor],
        lm: LanguageModel | None = None,
        read: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> list[Tensor]:
        """The children of what has been told; what is told with each, (..., B, L). The ``chosen`` one is read about."""
        states = []
        for i, here in enumerate(there):
            prompt = told if read is None or chosen is None else where(chosen == i, read, told)
            z = pyro.sample(f"thought {d}.{i + 1}", self.thought(lm or self.lm, prompt, here))
            states.append(self.state(d, told, z, here))
        return states

    def state(self, d: int, told: Tensor, z: Tensor, there: Tensor) -> Tensor:
        """What is told with a thought of level d and what follows from it."""
        told = self.follow(self.lm.join(told, said(z, there)))
        return self.follow(self.lm.join(told, self.marks[d == self.steps]))

    def even(self, there: list[Tensor]) -> Tensor:
        """The logits of an even choice among the children that are there, (..., B, K)."""
        present = torch.stack(there, -1)
        return torch.zeros(present.shape, device=present.device).masked_fill(~present, -torch.inf)

    def chosen(self, d: int, logits: Tensor) -> Tensor:
        """The child that the path goes on with, (..., B)."""
        if self.most == 1:
            return torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
        return pyro.sample(f"expand {d}", Categorical(logits=logits))

    @torch.no_grad()
    def around(self, x: Tensor, thoughts: Sequence[Tensor]) -> dict[str, Tensor]:
        """A tree that has this path: how many children, where the path's is among them, and others, all drawn.

        :param thoughts: of each step the path's thought, (..., B, L).
        :returns: the values of all sites: a draw of the tree's posterior, where the path is one of the chain's.
        """
        values, told = dict[str, Tensor](), self.follow(x)
        for d, own in enumerate(thoughts, 1):
            with poutine.trace() as run, pyro.plate("questions", len(x)):
                there = self.count(d, x)
                chosen = self.chosen(d, self.even(there))
            values |= {name: node["value"] for name, node in run.trace.nodes.items() if name != "questions"}
            for i, here in enumerate(there):
                z = self.thought(self.lm, told, here).sample()
                values[f"thought {d}.{i + 1}"] = where(chosen == i, own, z)
            told = self.state(d, told, own, torch.ones_like(chosen, dtype=torch.bool))
        return values


def said(z: Tensor, there: Tensor) -> Tensor:
    """Thoughts (..., B, L) where they are there, no token elsewhere."""
    return torch.where(there[..., None], z, text.PAD)


def where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Texts ``one`` where ``chosen`` (..., B), else the ``other``'s."""
    width = max(one.shape[-1], other.shape[-1])
    return torch.where(chosen[..., None], text.pad(one, width), text.pad(other, width))


def pick(states: list[Tensor], chosen: Tensor) -> Tensor:
    """Of texts (..., B, L) each the one whose number is ``chosen`` (..., B)."""
    told = states[0]
    for i, state in enumerate(states[1:], 1):
        told = where(chosen == i, state, told)
    return told
