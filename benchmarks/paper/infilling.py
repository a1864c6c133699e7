"""Infilling: the paper's measures of middle sentences, compared with the exact posterior."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pyro
import torch
from torch import Tensor

from lmppl import LanguageModel, embedded
from lmppl.distributions import Completion
from lmppl.inference import Enumerated, Prompting, SupervisedFineTuning, few_shot
from lmppl.inference.core.programs import Program
from lmppl.inference.judging.quality import density_quality
from lmppl.models import Experiment, Infilling, infilling, measures
from lmppl.models.experiment import TEST_OBSERVATIONS

from .study import Figures, Results, Study, markdown, opening, paired, spread, verdict
from .targets import enumerated, power

DRAWS = 64  # middles a story
SHOTS = 3
STEPS = 500
# Supervised: as many texts per step as the GFlowNet draws; steps and rate by validation likelihood.
TOLD_STEPS, TOLD_RATE, TOLD_BATCH = 500, 1e-3, 128
GUIDE, TEMPERED, TOLD, ASKED, PRIOR, EXACT = (
    "GFlowNet", "GFlowNet, paper's setting", "supervised", "prompting", "language model", "exact posterior",
)  # fmt: skip
CELLS = (PRIOR, ASKED, TOLD, GUIDE, TEMPERED, EXACT)
QUESTION = "Can a trained guide draw the missing middle of a story, given its beginning and its end?"


def truth(stories: int, temperature: float = 1.0) -> Enumerated:
    """The exact target p(z|x, y)^(1/T): the texts of the posterior, with other weights."""
    return power(enumerated("infilling", stories), temperature)


def told(e: Experiment, seed: int) -> Callable[[int], tuple[Any, ...]]:
    """Batches (x, y, {"z": the middle of the story in the corpus})."""
    stories = embedded.data("stories", "train")
    x, y, z = (e.lm.encode([getattr(s, part) for s in stories]) for part in "xyz")

    def batches(step: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(stories), (TOLD_BATCH,), generator=generator)
        return x[rows], y[rows], {"z": z[rows]}

    return batches


def answering(cell: str, e: Experiment, seed: int, short: bool) -> tuple[Program, int]:
    """The program of a method, after training if the method trains, and the tokens that training took."""
    if cell == PRIOR:

        def prior(x: Tensor, y: Tensor) -> Tensor:
            with pyro.plate("stories", len(x)):
                return pyro.sample("z", Completion(e.lm, x, max_tokens=7, stop="."))

        return prior, 0
    if cell == ASKED:
        stories = embedded.data("stories", "train")[SHOTS * seed : SHOTS * (seed + 1)]
        shots = few_shot(infilling.TEMPLATE, [({"x": s.x, "y": s.y}, s.z) for s in stories], "\n")
        return Infilling(e.lm, e.lm, template=shots).guide, 0
    if cell == TOLD:
        tuning = SupervisedFineTuning(e.model, e.guide, optimizer=e.optimizer(TOLD_RATE))
        tuning.fit(told(e, seed), 4 if short else TOLD_STEPS, seed=seed, progress=False)
        return e.guide, tuning.training_tokens
    gflownet = e.gflownet()
    gflownet.fit(e.batches, 4 if short else STEPS, seed=seed, progress=False)
    return e.guide, gflownet.training_tokens


def run(cell: str, seed: int, short: bool) -> Figures:
    """Draw middles of unseen stories by one method and measure them."""
    stories = 4 if short else TEST_OBSERVATIONS
    e = infilling.experiment(seed=seed, setting="paper" if cell == TEMPERED else "posterior")
    args = tuple(a[:stories] for a in e.test)
    targets = {"tv": truth(stories), "tv_paper": truth(stories, infilling.PAPER_TEMPERATURE)}
    found: Figures = {"tokens": 0}
    if cell == EXACT:
        torch.manual_seed(seed)
        z = targets["tv"].resample(DRAWS, "multinomial").samples["z"]
        found |= {"tv": 0.0, "tv_paper": float(_between(targets["tv"], targets["tv_paper"]).mean())}
    else:
        program, found["tokens"] = answering(cell, e, seed, short)
        torch.manual_seed(seed)
        z = Prompting(e.model, program, DRAWS).run(*args).samples["z"]
        for name, exact in targets.items():
            found[name] = float(density_quality(exact, program, args, {}).total_variation.mean())
    return found | measured(e, args, z)


def measured(e: Experiment, args: tuple[Tensor, ...], z: Tensor) -> Figures:
    """The paper's measures of middles z (n, B, E), compared with the middles of the corpus."""
    x, y = args
    candidates = [s for row in e.lm.decode(z) for s in row]
    references = [s.z for s in embedded.data("stories", "test")[: len(x)]] * len(z)
    return {
        "story": float(measures.story_log_likelihood(e.lm, x, z, y).mean()),
        "bleu": measures.bleu(candidates, references),
        "gleu": measures.gleu(candidates, references),
        "bert": resemblance(e.lm, candidates, references),
        "distinct": float(measures.distinct(z).mean()),
    }


def resemblance(lm: LanguageModel, candidates: list[str], references: list[str]) -> float:
    """The mean BERTScore; a draw with two words and no space between them counts as another story's middle."""
    pairs = [pair for pair in zip(candidates, references, strict=True) if spelled(lm, pair[0])]
    return float(measures.bert_score(*map(list, zip(*pairs, strict=True)), *encoder()).sum()) / len(candidates)


def spelled(lm: LanguageModel, string: str) -> bool:
    """Whether a string is one of the vocabulary's."""
    try:
        return lm.encode(string).shape[-1] > 0
    except ValueError:
        return False


@lru_cache(1)
def encoder() -> tuple[measures.Encoder, float]:
    """The story language model's hidden states, and the score of middles of different stories, to rescale by.

    No other encoder of the package knows its vocabulary.
    """
    states = measures.hidden_states(embedded.path("stories"))
    told = [s.z for s in embedded.data("stories", "validation")]
    return states, float(measures.bert_score(told, told[1:] + told[:1], states).mean())


def _between(a: Enumerated, b: Enumerated) -> Tensor:
    return 0.5 * (a.probabilities - b.probabilities).abs().sum(0)


def report(results: Results) -> str:
    text = opening(
        QUESTION,
        "Target: the posterior p(z|x, y) of the middle z, given the beginning x and the end y. "
        f"*{TEMPERED}* aims at this posterior to the power 1 / {infilling.PAPER_TEMPERATURE:g}. Data: "
        f"{TEST_OBSERVATIONS} stories that no method was trained on; each method draws {DRAWS} middles for each story. "
        "The paper's figures (its Table 2) are for another model and other stories, so only the order of the methods "
        "can be compared with it.",
        {
            "TV to the posterior": "total variation between the method's distribution and the posterior, computed "
            "exactly, mean over stories; 0 is best, 1 is worst",
            "TV to its power": f"the same, to the posterior to the power 1 / {infilling.PAPER_TEMPERATURE:g}",
            "BLEU-4, GLEU-4": "overlap of words between the draws and the story's own middle; larger is closer",
            "BERTScore": "similarity to the story's own middle by hidden states of the story language model, scaled so "
            "that 0 is the middle of another story and 1 the same text",
            "log p(x z y)": "log-probability of the whole story under the base model, nats, mean over draws",
            "distinct": "share of different texts among the draws for a story",
            "tokens to train": "tokens that the network read during training",
        },
    )
    text += markdown(
        ("method", "TV to the posterior", "TV to its power", "BLEU-4", "GLEU-4", "BERTScore", "log p(x z y)",
         "distinct", "tokens to train"),
        [
            (cell, spread(runs, "tv"), spread(runs, "tv_paper"), spread(runs, "bleu"), spread(runs, "gleu"),
             spread(runs, "bert"), spread(runs, "story", 2), spread(runs, "distinct", 2),
             f"{runs[0]['tokens']:,}" if runs[0]["tokens"] else "")
            for cell, runs in results.items()
        ],
    )  # fmt: skip
    return text + "\n" + claims(results)


def ahead(results: Results, ours: str, theirs: str, key: str, sign: int = 1) -> tuple[bool, str]:
    """Whether one method's figure is better than another's by more than its 95% interval over seeds."""
    difference, half = paired([sign * r[key] for r in results[ours]], [sign * r[key] for r in results[theirs]])
    return difference > half, f"{sign * difference:+.3f} ± {half:.3f}"


def claims(results: Results) -> str:
    """The paper's claims, each with what was found."""
    text = ""
    for theirs in (ASKED, TOLD):
        for name, key in (("BLEU-4", "bleu"), ("GLEU-4", "gleu"), ("BERTScore", "bert")):
            seen, said = ahead(results, GUIDE, theirs, key)
            top = f"Draws of the exact posterior have {spread(results[EXACT], key)}"
            because = f"The difference is {said} (95% interval over seeds). {top}."
            text += verdict(f"the GFlowNet is ahead of {theirs} in {name}", seen, because)
    seen, said = ahead(results, GUIDE, TOLD, "tv", -1)
    because = f"The difference in TV is {said} (95% interval over seeds)."
    text += verdict("the GFlowNet is closer to the posterior than supervised fine-tuning", seen, because)
    worst = max(r["tv"] for r in results[GUIDE])
    return text + verdict(
        "the GFlowNet samples the posterior of unseen stories (TV at most 0.05)", worst <= 0.05,
        f"TV is {spread(results[GUIDE], 'tv')}, at the worst seed {worst:.3f}.",
    )  # fmt: skip


STUDY = Study("infilling", "Infilling", CELLS, run, report)
