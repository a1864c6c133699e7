r"""Uncertainty on the embedded sentences: subjectivity by several adapters, and the parts of their answers' entropy.

The labels of unseen sentences are predicted through a reason, under parameters that a few labels do not determine:

.. math:: p(y \mid x) = \frac1J \sum_j \sum_z p_j(z \mid x) \, p_j(y \mid x, z)

A member j is an adapter with its own first weights, trained on the same labelled sentences by gradient steps on log p(y
| x), summed over all reasons.  By Fisher's identity these are exact E-steps and M-steps.  The entropy of the answer is
the sum of expected entropy, chain information and parameter information, see `inference.Ensemble`.  docs/uncertainty.md
measures what they are worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from .. import embedded
from ..files import save_figure
from ..inference import Ensemble
from ..language_model import LanguageModel
from . import subjectivity
from .experiment import Experiment, Options, Recipe
from .forecasts import auroc, hits, selective_accuracy
from .programs.subjectivity import Subjectivity

STEPS, RATE, BATCH = 40, 3e-3, 10  # of a member's training: docs/subjectivity.md
SENTENCES = 300  # unseen ones whose labels are predicted
PICTURE = "uncertainty.png"
PARTS = {
    "expected_entropy": "expected entropy: chance",
    "chain_information": "chain information",
    "parameter_information": "parameter information",
}


def experiment(
    lm: LanguageModel | None = None,
    data: str | Path | None = None,
    *,
    count: int = 10,
    members: int = 3,
    **options: Unpack[Options],
) -> Experiment:
    """How much of a label's uncertainty is due to chance, to reasons and to parameters.

    It is the experiment `subjectivity` with a guide that reads the sentence alone.  In addition `lmppl compare` shows
    the parts of the entropy of answers by several adapters.

    :param lm: None: other language models are refused.
    :param data: None: other data are refused.
    :param count: how many labelled sentences each adapter is trained on.
    :param members: how many adapters.
    :param options: those of every experiment, see `experiment.Options`.
    :returns: an `Experiment`.
    :raises ValueError: for another language model or data, whose reasons cannot all be summed over, and for fewer than
        two members or no labelled sentence.
    """
    if isinstance(lm, LanguageModel) or data is not None:
        raise ValueError(
            "lm, data: members are trained by a sum over all reasons, and only the embedded language model has few "
            "enough; for others see Ensemble in docs/uncertainty.md"
        )
    if members < 2 or count < 1:
        raise ValueError(f"members, count: expected at least 2 and 1, got {members} and {count}")
    found = subjectivity.experiment(lm, reads="x", count=count, **options)
    task: Any = found.model.__self__  # type: ignore[attr-defined]
    seed = options.get("seed", 0)
    labelled = embedded.data("subjectivity", "train")[:count]

    def shows(out: Path) -> str:
        tasks = [member(task.lm, labelled, seed * members + j, STEPS) for j in range(members)]
        x, y = tasks[0].encode(embedded.data("subjectivity", "test")[:SENTENCES])
        answers = Ensemble.of([task.predict(x) for task in tasks])
        plot(answers, y, out / PICTURE)
        return told(answers, y, count)

    return replace(found, name="uncertainty", shows=shows)


def member(lm: LanguageModel, labelled: list[embedded.Sentence], seed: int, steps: int) -> Subjectivity:
    """The program with an adapter trained on these sentences, in both factors; ``seed`` sets its first weights."""
    recipe = Recipe(observations=BATCH)
    p = recipe.guide_lm(lm, seed)
    task = Subjectivity(p, reads="x", allowed="reasons", max_tokens=2)
    climb(p, task.log_likelihood, recipe.batches(*task.encode(labelled)), steps)
    return task


def climb(
    p: LanguageModel,
    objective: Callable[..., Tensor],
    batches: Callable[[int], tuple[Tensor, ...]],
    steps: int,
    clip: float = 1.0,
) -> None:
    """Maximises an objective (B,) of the batches over p's parameters, with a learning rate that decays to zero."""
    optimizer = torch.optim.AdamW(p.trainable_parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        optimizer.zero_grad()
        (-objective(*batches(step)).sum()).backward()
        torch.nn.utils.clip_grad_norm_(p.trainable_parameters(), clip)
        optimizer.step()
        schedule.step()


def told(answers: Ensemble, y: Tensor, count: int) -> str:
    """How many answers are right, and the parts of their entropy where they are right and where they are wrong."""
    right, split = hits(answers.probabilities, y), answers.split()
    some = 0 < float(right.sum()) < len(right)
    lines = [
        f"Answers of {len(answers.members)} adapters, {count} labels each, to {len(y)} unseen sentences: "
        f"{float(right.mean()):.1%} right, of the surer half {selective_accuracy(split.entropy, 1 - right, 0.5):.1%}.",
        f"{'mean nats where it is':24}{'right':>8}{'wrong':>8}   AUROC of errors",
    ]
    for name, values in split._asdict().items():
        means = [float(values[rows].mean()) if bool(rows.any()) else math.nan for rows in (right > 0.5, right <= 0.5)]
        found = f"{auroc(values, right <= 0.5):.2f}" if some else "–"
        lines.append(f"{name.replace('_', ' '):24}{means[0]:8.3f}{means[1]:8.3f}   {found}")
    return "\n".join(lines)


def plot(answers: Ensemble, y: Tensor, path: Path) -> None:
    """Plots the parts of each sentence's entropy, with a mark for every wrong answer, and the accuracy by coverage."""
    from matplotlib.figure import Figure

    split, wrong = answers.split(), 1 - hits(answers.probabilities, y)
    order = split.entropy.argsort()
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    at = torch.arange(len(y))
    heights = [getattr(split, name)[order].clamp(min=0).tolist() for name in PARTS]
    left.stackplot(at.tolist(), *heights, labels=list(PARTS.values()))
    missed = at[wrong[order] > 0.5].tolist()
    left.plot(missed, [-0.02] * len(missed), "|", color="black", ms=9, label="a wrong answer")
    left.axhline(math.log(2), color="0.6", lw=0.8, ls=":")
    left.set(xlabel="unseen sentences, the surest first", ylabel="entropy of the answer, nats", xlim=(0, len(y)))
    left.legend(frameon=False, loc="upper left", fontsize=9)
    shares = torch.linspace(0.05, 1, 40).tolist()
    scores: dict[str, Any] = {"entropy": split.entropy} | {name: getattr(split, name) for name in PARTS}
    for name, values in scores.items():
        curve = [100 * selective_accuracy(values, wrong, share) for share in shares]
        right.plot([100 * s for s in shares], curve, label=name.replace("_", " "), lw=2.4 if name == "entropy" else 1.3)
    right.set(xlabel="answered, the surest by a score: %", ylabel="right, %")
    right.legend(frameon=False, fontsize=9)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
