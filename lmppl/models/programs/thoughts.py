"""Thoughts between a question and its answer: plans with a random number of steps, and trees in which one path counts.

A chain:  z_d ~ LM(s_d),   more_d ~ LM(s_d z_d): "," or ".",   s_{d+1} = s_d z_d more_d,   y ~ LM(s "The answer is"),
          with a factor e^(v(s_{d+1})), its evaluation, for each state that is reached
A tree:   k_d ~ children,   z_d1 .. z_dk ~ LM(s_d),   j_d = i with probability e^(v_i) / sum_i e^(v_i),
          v_i = v(s_d z_di),   s_{d+1} = s_d z_dj,   y likewise, with a factor (1 / k_d) sum_i e^(v_i), the mean
          evaluation of the children, for each level

The program writes what follows from a thought, such as the result of a sum.  Thoughts that do not exist are texts of no
tokens.  The path of a tree is a chain: choice and factor together are e^(v_j) / k, a uniform choice times the
evaluation of the chosen child, and the children are alike, so that

    p(path, y) = p(z_1) .. p(z_D) e^(v(s_2) + .. + v(s_{D+1})) p(y | s_{D+1}),    whatever the number of children.

`TreeOfThoughts.search` builds the tree without the factors, as a search does.  Its result is a draw of the posterior
only after weighting by the factors, the mean evaluations of its own children.
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

TEMPLATE = "{y}{x}"  # what the guide reads: the answer before the text so far
MARKS = ",", "."  # after a step that is not the last one, and after the last one
ASK, LONGEST_ANSWER = " The answer is", 1

After = Callable[[str], str]
Evaluation = Callable[[Tensor], Tensor]


class Thoughts:
    """The parts that the programs of chains and trees share.

    :param lm: the language model p; it is not trained.
    :param guide_lm: the guide's language model, usually ``lm.with_adapter(...)``; None: there is no guide.
    :param steps: D, the most steps, at least 1.
    :param max_tokens: the most tokens of a thought before its stop.
    :param stop: a thought's stop; None: a thought has exactly ``max_tokens`` tokens.
    :param allowed: a constraint on the tokens of a thought without a stop; None: there is none.
    :param after: a function from the string so far (the question first) to what follows from it; None: nothing.
    :param evaluate: the evaluation v, a function from the texts so far (..., B, L) to their log scores (..., B); None:
        0.
    :param marks: the text after a step that is not the last one, and the text after the last one.
    :param ask: the text before the answer.
    :param max_answer: the most tokens of an answer before ``stop_answer``.
    :param stop_answer: the answer's stop.
    :param template: the guide's prompt, with the fields x (the text so far) and y (the answer).

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
            raise ValueError("allowed: a thought with a stop may be empty, which a constraint would forbid: stop=None")
        self.lm, self.guide_lm, self.steps = lm, guide_lm, steps
        self.max_tokens, self.stop, self.allowed = max_tokens, stop, allowed
        self.after, self.evaluate, self.marks = after, evaluate, marks
        self.ask, self.max_answer, self.stop_answer, self.template = ask, max_answer, stop_answer, template

    def thought(self, lm: LanguageModel, told: Tensor, there: Tensor) -> Completion:
        """The distribution of a thought.

        :param lm: a language model.
        :param told: the texts so far, (..., B, L).
        :param there: whether the thought exists, (..., B); where not, it has no tokens.
        :returns: a `Completion`.
        """
        limit = torch.where(there, self.max_tokens, 0)
        return Completion(lm, told, max_tokens=limit, stop=self.stop, allowed=self.allowed)

    def follow(self, told: Tensor) -> Tensor:
        """The texts so far, with what follows from them (``after``).

        :param told: (..., L).
        :returns: (..., L').
        """
        if self.after is None:
            return told
        written: list[str] = []

        def number(told: str) -> int:
            written.append(self.after(told))  # type: ignore[misc]
            return len(written) - 1

        which = text.map(number, told, self.lm)
        return self.lm.join(told, self.lm.encode(written)[which])

    def reads(self, told: Tensor, y: Tensor) -> Tensor:
        """The guide's prompt.

        :param told: the texts so far, (..., B, L).
        :param y: answers, (B, Ly).
        :returns: texts (..., B, L').
        :raises ValueError: where there is no guide.
        """
        if self.guide_lm is None:
            raise ValueError(f"guide_lm: this {type(self).__name__} was made without a guide")
        return self.guide_lm.fill(self.template, x=told, y=y)

    def answer(self, told: Tensor, y: Tensor | None) -> Tensor:
        """y ~ LM(told "The answer is"), observed or latent.

        :param told: the texts so far, (..., B, L).
        :param y: answers, (B, Ly); None: they are drawn.
        :returns: the answers y.
        """
        asked = self.lm.join(told, self.ask)
        return pyro.sample("y", Completion(self.lm, asked, max_tokens=self.max_answer, stop=self.stop_answer), obs=y)


class ChainOfThoughts(Thoughts):
    r"""Chains of 1 to D thoughts between a question x and its answer y; the model decides how many.

    .. math:: p(z, y \mid x) = \prod_d p(z_d \mid s_d) \, p(more_d \mid s_d z_d) \, e^{v(s_{d+1})} \; p(y \mid s)

    s_d is the text before thought d, v the evaluation.

    :param lm: the language model p; it is not trained.
    :param guide_lm: the guide's language model, usually ``lm.with_adapter(...)``; None: there is no guide.
    :param steps: D, the most steps, at least 1.
    :param max_tokens: the most tokens of a thought before its stop.
    :param stop: a thought's stop; None: a thought has exactly ``max_tokens`` tokens.
    :param allowed: a constraint on the tokens of a thought without a stop; None: there is none.
    :param after: a function from the string so far (the question first) to what follows from it; None: nothing.
    :param evaluate: the evaluation v, a function from the texts so far (..., B, L) to their log scores (..., B); None:
        0.
    :param marks: the text after a step that is not the last one, and the text after the last one; each is one token.
    :param ask: the text before the answer.
    :param max_answer: the most tokens of an answer before ``stop_answer``.
    :param stop_answer: the answer's stop.
    :param template: the guide's prompt, with the fields x (the text so far) and y (the answer).

    `model(x, y)` and `guide(x, y)` are Pyro programs over questions x (B, Lx) and answers y (B, Ly), with one plate.
    Without y the answer is a latent site of the model.  The sites are "thought d" and "more d"; after the end of a plan
    they are empty.

    :raises ValueError: for fewer steps than one, and a constraint on thoughts that have a stop.

    Source: Wei et al. 2022, "Chain-of-thought prompting elicits reasoning in large language models"; docs/thoughts.md.

    Example::

        lm = LanguageModel.embedded("arithmetic")
        digit = Slots(lm, [[" 1", " 2", " 3"]])
        task = ChainOfThoughts(lm, steps=2, max_tokens=1, allowed=digit)
        x, y = lm.encode(["Question: 2 + 3 = ? Answer:"]), lm.encode([" 5."])
        posterior = Importance(task.model, num_particles=64).run(x, y)
    """

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Thoughts and marks of the language model, a factor for each state, and the answer.

        :param x: questions, (B, Lx).
        :param y: answers, (B, Ly); None: they are drawn.
        :returns: the answers y.
        """
        with pyro.plate("questions", len(x)):
            told = self.plan(self.lm, x, lambda told: told, evaluated=True)
            return self.answer(told, y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        """Thoughts and marks of a language model that reads the answer.

        :param x: questions, (B, Lx).
        :param y: answers, (B, Ly).
        """
        self.reads(x, y)
        assert self.guide_lm is not None
        with pyro.plate("questions", len(x)):
            self.plan(self.guide_lm, x, lambda told: self.reads(told, y), evaluated=False)

    def plan(self, lm: LanguageModel, x: Tensor, prompt: Callable[[Tensor], Tensor], *, evaluated: bool) -> Tensor:
        """Samples the sites of a plan.

        :param lm: the language model that writes.
        :param x: questions, (B, Lx).
        :param prompt: a function from the texts so far (..., B, L) to what the language model reads.
        :param evaluated: whether to add the factors of the evaluation.
        :returns: the texts at the end of the plan, (..., B, L).
        """
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
        """Samples whether a step follows, by the language model's next token.

        :param lm: the language model that writes.
        :param d: the number of the step, from 1.
        :param prompt: what the language model reads, (..., B, L).
        :param more: whether the plan goes on before this step, (..., B).
        :returns: whether a step follows, (..., B), and the mark that tells so, (..., B, 1).
        """
        on, end = (self.lm.token_id(mark) for mark in self.marks)
        if d == self.steps:
            return torch.zeros_like(more), torch.where(more, end, text.PAD)[..., None]
        limit = more.long()
        mark = pyro.sample(f"more {d}", Completion(lm, prompt, max_tokens=limit, stop=None, allowed=[on, end]))
        mark = text.pad(mark, 1)
        return mark[..., 0] == on, mark


class TreeOfThoughts(Thoughts):
    r"""Trees of D levels between a question x and its answer y: at each level the path takes one of the thoughts.

    .. math:: p(path, y \mid x) = \prod_d p(z_d \mid s_d) \, e^{v(s_{d+1})} \; p(y \mid s_{D+1})

    whatever the number of children; s_d is the text before thought d of the path, v the evaluation.

    :param lm: the language model p; it is not trained.
    :param guide_lm: the guide's language model, usually ``lm.with_adapter(...)``; None: there is no guide.
    :param children: the probabilities of 1, 2, .. children, which sum to 1.
    :param options: those of `Thoughts`: ``steps``, ``max_tokens``, ``stop``, ``allowed``, ``after``, ``evaluate``,
        ``marks``, ``ask``, ``max_answer``, ``stop_answer``, ``template``.

    `model(x, y)`, `search(x, y)` and `guide(x, y)` are Pyro programs over questions x (B, Lx) and answers y (B, Ly),
    with one plate.  Without y the answer is a latent site of the model and of the search.  The sites are "children d"
    (0 for one child), "thought d.i", and "expand d", the child that the path takes.  With one child at most, there are
    no sites "children d" and "expand d".

    :raises ValueError: for ``children`` that are not probabilities, and as `ChainOfThoughts`.

    Source: Yao et al. 2023, "Tree of thoughts"; docs/thoughts.md.

    Example::

        lm = LanguageModel.embedded("arithmetic")
        digit = Slots(lm, [[" 1", " 2", " 3"]])
        task = TreeOfThoughts(lm, children=[0.5, 0.5], steps=2, max_tokens=1, allowed=digit)
        x, y = lm.encode(["Question: 2 + 3 = ? Answer:"]), lm.encode([" 5."])
        posterior = Importance(task.model, num_particles=64).run(x, y)
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
        """Children of the language model, the path through them by evaluation, their mean evaluations, and the answer.

        :param x: questions, (B, Lx).
        :param y: answers, (B, Ly); None: they are drawn.
        :returns: the answers y.
        """
        with pyro.plate("questions", len(x)):
            return self.answer(self.path(x), y)

    def search(self, x: Tensor, y: Tensor | None = None) -> None:
        """The same tree without the factors.  Without y it draws an answer; a given y it does not use.

        :param x: questions, (B, Lx).
        :param y: answers, (B, Ly); None: they are drawn.
        """
        with pyro.plate("questions", len(x)):
            told = self.path(x, weighted=False)
            if y is None:
                self.answer(told, None)

    def path(self, x: Tensor, *, weighted: bool = True) -> Tensor:
        """Samples the tree without its answer.

        :param x: questions, (B, Lx).
        :param weighted: whether to add the factors of the evaluation.
        :returns: the texts at the end of the path, (..., B, L).
        """
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
        """Chooses the child that the path takes uniformly; a language model that reads the answer writes that child.

        :param x: questions, (B, Lx).
        :param y: answers, (B, Ly).
        """
        self.reads(x, y)
        with pyro.plate("questions", len(x)):
            told = self.follow(x)
            for d in range(1, self.steps + 1):
                there = self.count(d, x)
                chosen = self.chosen(d, self.even(there))
                told = pick(self.thoughts(d, told, there, self.guide_lm, self.reads(told, y), chosen), chosen)

    def count(self, d: int, x: Tensor) -> list[Tensor]:
        """Samples the number of children.

        :param d: the level, from 1.
        :param x: questions, (B, Lx).
        :returns: whether there is a first child, a second, ..: (..., B) each.
        """
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
        """Samples the children of a level.

        :param d: the level, from 1.
        :param told: the texts so far, (..., B, L).
        :param there: which children exist, (..., B) each.
        :param lm: the language model that writes; None: the model's.
        :param read: what the language model reads before the chosen child; None: ``told``, as before the others.
        :param chosen: the number of the chosen child, (..., B); None: there is none.
        :returns: the texts with each child, (..., B, L).
        """
        states = []
        for i, here in enumerate(there):
            prompt = told if read is None or chosen is None else where(chosen == i, read, told)
            z = pyro.sample(f"thought {d}.{i + 1}", self.thought(lm or self.lm, prompt, here))
            states.append(self.state(d, told, z, here))
        return states

    def state(self, d: int, told: Tensor, z: Tensor, there: Tensor) -> Tensor:
        """The texts with a thought and what follows from it.

        :param d: the level, from 1.
        :param told: the texts so far, (..., B, L).
        :param z: the thought, (..., B, L').
        :param there: whether the thought exists, (..., B).
        :returns: (..., B, L'').
        """
        told = self.follow(self.lm.join(told, said(z, there)))
        return self.follow(self.lm.join(told, self.marks[d == self.steps]))

    def even(self, there: list[Tensor]) -> Tensor:
        """The logits of a uniform choice among the children that exist.

        :param there: which children exist, (..., B) each.
        :returns: (..., B, K).
        """
        present = torch.stack(there, -1)
        return torch.zeros(present.shape, device=present.device).masked_fill(~present, -torch.inf)

    def chosen(self, d: int, logits: Tensor) -> Tensor:
        """Samples the child that the path takes.

        :param d: the level, from 1.
        :param logits: (..., B, K).
        :returns: (..., B).
        """
        if self.most == 1:
            return torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
        return pyro.sample(f"expand {d}", Categorical(logits=logits))

    @torch.no_grad()
    def around(self, x: Tensor, thoughts: Sequence[Tensor]) -> dict[str, Tensor]:
        """Draws a tree that contains this path: the number of children, the place of the path's, and the others.

        :param x: questions, (B, Lx).
        :param thoughts: the path's thought of each step, (..., B, L).
        :returns: the values of all sites: a draw of the tree's posterior, if the path is a draw of the chain's.
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
    """Thoughts (..., B, L) where they exist, no tokens elsewhere."""
    return torch.where(there[..., None], z, text.PAD)


def where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Texts ``one`` where ``chosen`` (..., B), else those of ``other``."""
    width = max(one.shape[-1], other.shape[-1])
    return torch.where(chosen[..., None], text.pad(one, width), text.pad(other, width))


def pick(states: list[Tensor], chosen: Tensor) -> Tensor:
    """The text (..., B, L) whose number is ``chosen`` (..., B)."""
    told = states[0]
    for i, state in enumerate(states[1:], 1):
        told = where(chosen == i, state, told)
    return told
