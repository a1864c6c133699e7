"""The random number (Hu et al. 2024, section 2): each method's distribution over 0..100 compared with the uniform one.

The prompt is the paper's own, "The following is a random integer drawn uniformly between 0 and 100: "; no other was
tried.  An answer has at most three tokens and ends with ".".  Every digit is one token, so the numbers are 101 texts,
and KL(uniform || q) is a sum over them.

The target is 1 on valid numbers and e^-6 p(z) on other answers, which have at most 2.5e-5 of its mass.  On the
embedded language model, invalid answers count a fixed number of nats below the valid ones.  Here this would fix log q
of 49,152^3 texts: with 18 nats their mass is e^14 times that of the numbers, and the guide learned to write everything
except numbers (seed 100: 99.9% valid after 15 steps, 0.02% after 90).

The language model answers 100 in one of a hundred answers, and a guide that loses this answer cannot find it again.  So
two thirds of the first draws are the language model's, and none after 60 steps, about 480 in all: then "100." is never
drawn in one training of a hundred.  The replay buffer has room for all numbers.  (With a third of these draws, on seed
100: KL 0.093 after 80 steps, all of it from the text "100.".)

PPO's reward is the model's.  With the matched KL its optimum is the target; without it all valid numbers are equally
good.  Supervised fine-tuning learns from uniform draws, which are the answer itself.

Cost: a step of 24 draws reads about 3 tokens per draw to draw it, to score it, and for the guide's gradient.  On seed
100 this was 230 tokens and 3.3 to 4.8 processor seconds.  PPO makes four updates on the same draws, and gets fewer
steps.  A seed of all methods takes twelve minutes of a core.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

from benchmarks.paper import random_number as embedded
from benchmarks.paper.random_number import LIKELIHOOD, MATCHED, REWARD, divergences, log_probs, log_target, train
from benchmarks.paper.study import Figures, Headline, Results, Study, markdown, opening, spread, verdict
from lmppl import LanguageModel
from lmppl.embedded.numbers import FIXED
from lmppl.inference import Mixture, Prior, Replay, Tempered, VarGrad
from lmppl.inference.training.loop.schedules import linear
from lmppl.models import PRETRAINED, Experiment, RandomNumber
from lmppl.models.random_number import experiment

PRIOR, GFLOWNET, SUPERVISED = embedded.PRIOR, embedded.GFLOWNET, "supervised on uniform draws"
CELLS = (PRIOR, GFLOWNET, MATCHED, REWARD, SUPERVISED)
INVALID = -6.0
EXPLORATION = Mixture((Tempered(1.5, 0.25), 1.0), (Prior(), linear(2.0, 0.0, 60)))
RECIPE = replace(
    PRETRAINED,
    observations=1,
    particles=24,
    objective=partial(VarGrad, exploration=EXPLORATION),
    replay=partial(Replay, capacity=128),
)
STEPS = {GFLOWNET: 75, MATCHED: 25, REWARD: 25, SUPERVISED: 75}
SHORT = 2  # steps, for tests


def made(cell: str, lm: LanguageModel, seed: int, short: bool) -> Experiment:
    """The model, and a guide that one of the methods will train."""
    recipe = replace(RECIPE, steps=SHORT if short else STEPS[cell], particles=8 if short else RECIPE.particles)
    if cell == SUPERVISED:  # it learns from a quarter of the draws of the others
        recipe = replace(recipe, particles=4 * recipe.particles)
    e = experiment(lm, seed=seed, recipe=recipe)
    task = RandomNumber(lm, e.guide_lm, invalid=INVALID)
    return replace(e, model=task.model, guide=task.guide)


def run(cell: str, seed: int, short: bool, lm: LanguageModel, data: Path | None = None) -> Figures:
    """Train one method and compare it with the exact target."""
    guide, tokens = lm, 0
    if cell != PRIOR:
        e = made(cell, lm, seed, short)
        tokens = train(LIKELIHOOD if cell == SUPERVISED else cell, e, seed)
        guide = e.guide_lm
    log_q = log_probs(lm, guide, FIXED)
    return divergences(log_target(lm, FIXED, "uniform"), log_q) | {"tokens": tokens, "q": log_q.exp().tolist()}


def report(results: Results) -> str:
    """The table and the claims."""
    rows = [["the paper's language model", "3.37"], ["the paper's GFlowNet", "0.0000975"]]
    rows = [row + [""] * 4 for row in rows]
    for cell, runs in results.items():
        shown = spread(runs, "forward", 4), spread(runs, "reverse", 4), spread(runs, "valid", 2, 100) + "%"
        rows.append([cell, *shown, f"{round(mean(r['tokens'] for r in runs)):,}", str(len(runs))])
    setting = f"Target: uniform on 0..100. {embedded.SETTING}"
    text = opening(embedded.QUESTION, setting, embedded.COLUMNS)
    text += markdown(("method", "KL(target‖q)", "KL(q(·\\|valid)‖target)", "valid", "training tokens", "seeds"), rows)
    text += "\n" + "".join(claims(results))
    return text


def claims(results: Results) -> list[str]:
    """A verdict on each claim whose cells have run."""

    def largest(cell: str, key: str = "forward") -> float:
        return max(r[key] for r in results[cell])

    def least(cell: str) -> float:
        return 100 * min(r["valid"] for r in results[cell])

    said = []
    if PRIOR in results:
        claim = "the language model's numbers are far from uniform (the paper: KL 3.37)"
        because = f"The KL is {largest(PRIOR):.2f}, and {least(PRIOR):.0f}% is valid."
        said.append(verdict(claim, largest(PRIOR) > 1, because))
    if GFLOWNET in results:
        kl = largest(GFLOWNET)
        because = (
            f"After {STEPS[GFLOWNET]} steps the largest KL of a seed is {kl:.2g}, the smallest valid mass "
            f"{least(GFLOWNET):.2f}%."
        )
        claim = "after GFlowNet tuning the KL is at most 1e-4 (the paper: 9.75e-5)"
        said.append(verdict(claim, kl <= 1e-4, because))
        if PRIOR in results:
            claim = "GFlowNet tuning reduces the language model's KL to at most a tenth"
            because = f"The KL is {largest(PRIOR):.2f} before and {kl:.2g} after."
            said.append(verdict(claim, kl <= 0.1 * largest(PRIOR), because))
    if REWARD in results:
        skewed = min(r["reverse"] for r in results[REWARD])
        because = (
            f"After {STEPS[REWARD]} steps of four updates at least {least(REWARD):.1f}% is valid, and the KL of the "
            f"valid answers is at least {skewed:.2f}."
        )
        if MATCHED in results:
            because += (
                f" With the matched KL penalty at least {least(MATCHED):.1f}% is valid, and this KL is at most "
                f"{largest(MATCHED, 'reverse'):.2f}."
            )
        claim = "PPO for the reward only learns to be valid and stays far from uniform"
        said.append(verdict(claim, least(REWARD) > 95 and skewed > 0.5, because))
    if GFLOWNET in results:
        lost = [r["q"][-1] * len(r["q"]) for r in results[GFLOWNET]]
        said.append(
            "- Under the GFlowNet the probability of 100, the only number of three digits, is "
            f"{min(lost):.1e} to {max(lost):.1e} times its uniform share, by seed.\n"
        )
    return said


def headline(results: Results) -> Headline:
    """The distance of the language model and of the trained guide from the uniform distribution."""
    if PRIOR not in results or GFLOWNET not in results:
        return []
    here = ", ".join(spread(results[cell], "forward", 3) for cell in (PRIOR, GFLOWNET))
    return [
        (
            f"KL(uniform‖q) of the {PRIOR}, {GFLOWNET}",
            "3.37, 0.0000975",
            here,
            min(len(results[PRIOR]), len(results[GFLOWNET])),
        )
    ]


STUDY = Study("random_number", "The random number", CELLS, run, report, embedded.plot, paired=False, headline=headline)
