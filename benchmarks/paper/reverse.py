"""Reverse: the beginning of a story, given how it goes on, compared with the exact posterior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from lmppl import embedded
from lmppl.distributions import Completion
from lmppl.inference import Prompting, SupervisedFineTuning, dreams
from lmppl.inference.core.programs import Program
from lmppl.inference.judging.quality import density_quality, draw_quality
from lmppl.models import Experiment, measures, reverse
from lmppl.models.experiment import TEST_OBSERVATIONS
from lmppl.models.programs.reverse import PREFIX

from .study import Figures, Results, Study, markdown, opening, paired, spread, verdict
from .targets import enumerated

DRAWS = 64  # beginnings a story
TOLD_STEPS, TOLD_RATE, TOLD_BATCH = 250, 1e-3, 128
GUIDE, DREAMT, TOLD, PRIOR, EXACT = "GFlowNet", "sleep", "supervised", "language model", "exact posterior"
CELLS = (PRIOR, TOLD, DREAMT, GUIDE, EXACT)
WANTED = 0.05  # total variation on unseen stories


def told(e: Experiment, seed: int, size: int) -> Callable[[int], tuple[Any, ...]]:
    """Batches (y, {"x": the beginning of the story in the corpus})."""
    stories = embedded.data("stories", "train")
    # After "Beginning:" the language model writes a space or not, about evenly.
    x = e.lm.encode([[space + s.x for s in stories] for space in ("", " ")])  # (2, stories, tokens)
    y = e.lm.encode([s.z + s.y for s in stories])

    def batches(step: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(stories), (size,), generator=generator)
        return y[rows], {"x": x[torch.randint(2, (size,), generator=generator), rows]}

    return batches


def answering(cell: str, e: Experiment, seed: int, short: bool) -> tuple[Program, int]:
    """The program of a method, after training if the method trains, and the tokens that training took."""
    if cell == PRIOR:

        def prior(y: Tensor) -> Tensor:
            with pyro.plate("stories", len(y)):
                return pyro.sample("x", Completion(e.lm, e.lm.encode(PREFIX), max_tokens=5, stop="."))

        return prior, 0
    if cell == GUIDE:
        gflownet = e.gflownet()
        gflownet.fit(e.batches, 4 if short else e.recipe.steps, seed=seed, progress=False)
        return e.guide, gflownet.training_tokens
    pairs = told(e, seed, TOLD_BATCH)
    dream = dreams(e.model)
    # For "sleep" the endings of the corpus give only the lengths of the endings that the model draws.
    examples = (lambda y, values: dream(y)) if cell == DREAMT else None
    tuning = SupervisedFineTuning(e.model, e.guide, optimizer=e.optimizer(TOLD_RATE), examples=examples)
    tuning.fit(pairs, 4 if short else TOLD_STEPS, seed=seed, progress=False)
    return e.guide, tuning.training_tokens


def run(cell: str, seed: int, short: bool) -> Figures:
    """Beginnings of unseen stories by one method: distances of its distribution and its draws to the posterior."""
    stories = 4 if short else TEST_OBSERVATIONS
    e = reverse.experiment(seed=seed)
    args = tuple(a[:stories] for a in e.test)
    exact = enumerated("reverse", stories)
    found: Figures = {"tokens": 0, "unexplored": float(exact.unexplored.max())}
    if cell == EXACT:
        torch.manual_seed(seed)
        drawn = exact.resample(DRAWS, "multinomial")
        found |= {"tv": 0.0, "forward_kl": 0.0}
    else:
        program, found["tokens"] = answering(cell, e, seed, short)
        torch.manual_seed(seed)
        drawn = Prompting(e.model, program, DRAWS).run(*args)
        quality = density_quality(exact, program, args, {})
        found |= {"tv": float(quality.total_variation.mean()), "forward_kl": float(quality.forward_kl.mean())}
    x = drawn.samples["x"]
    story = measures.story_log_likelihood(e.lm, e.lm.encode(PREFIX), x, args[0])
    return found | {"draws_tv": float(draw_quality(exact, drawn).mean()), "story": float(story.mean())}


def report(results: Results) -> str:
    text = opening(
        "Can a trained guide draw the beginning of a story, given how the story goes on?",
        f"Target: the posterior p(x|y) of the beginning x, given the rest y. Data: {TEST_OBSERVATIONS} stories that no "
        f"method was trained on; each method draws {DRAWS} beginnings for each story. The method *{TOLD}* is "
        f"fine-tuned on stories of the corpus, *{DREAMT}* on stories that the language model writes itself. The paper "
        "has no such experiment.",
        {
            "TV": "total variation between the method's distribution and the posterior, computed exactly, mean over "
            "stories",
            "KL(p,q)": "Kullback-Leibler divergence between the posterior p and the method's distribution q, nats",
            "TV of the draws": f"total variation between the frequencies of the {DRAWS} draws and the posterior; the "
            f"row *{EXACT}* shows how far perfect draws are from it",
            "log p(x y)": "log-probability of the whole story under the base model, nats, mean over draws",
            "tokens to train": "tokens that the network read during training",
        },
    )
    text += markdown(
        ("method", "TV", "KL(p,q)", "TV of the draws", "log p(x y)", "tokens to train"),
        [
            (cell, spread(runs, "tv"), spread(runs, "forward_kl"), spread(runs, "draws_tv"), spread(runs, "story", 2),
             f"{runs[0]['tokens']:,}" if runs[0]["tokens"] else "")
            for cell, runs in results.items()
        ],
    )  # fmt: skip
    worst = max(r["tv"] for r in results[GUIDE])
    text += "\n" + verdict(
        f"the GFlowNet samples the posterior of unseen stories (TV at most {WANTED:g})", worst <= WANTED,
        f"TV is {spread(results[GUIDE], 'tv')}, at the worst seed {worst:.3f}. The enumeration of the posterior left "
        f"out {results[EXACT][0]['unexplored']:.3f} of the prior's mass.",
    )  # fmt: skip
    difference, half = paired([r["tv"] for r in results[TOLD]], [r["tv"] for r in results[GUIDE]])
    return text + verdict(
        "the GFlowNet is closer to the posterior than supervised fine-tuning",
        difference > half,
        f"Its TV is lower by {difference:.3f} ± {half:.3f} (95% interval over seeds).",
    )


STUDY = Study("reverse", "Reverse: the beginning, given how it goes on", CELLS, run, report)
