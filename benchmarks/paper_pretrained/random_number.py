"""The random number (Hu et al. 2024, section 2): every method's distribution over 0..100 beside the uniform one.

The prompt is the paper's own, "The following is a random integer drawn uniformly between 0 and 100: ", and no other was
tried; an answer of at most three tokens ends with ".".  Digits are tokens by themselves, so that the numbers are 101
texts, and KL(uniform || q) is a sum over them.

The target is 1 on valid numbers and e^-6 p(z) on other answers, which leaves those 2.5e-5 of the mass at most.
Counting them a fixed number of nats below the valid ones, as on the embedded language model, would ask for log q of
49,152^3 texts: with 18 nats their mass is e^14 times that of the numbers, and the guide learned to say anything but
numbers (seed 100: valid 99.9% after 15 steps, 0.02% after 90).

The language model says 100 in one answer of a hundred, and a guide that loses it cannot find it again: two thirds of
the first draws are the language model's, none after 60 steps, some 480 in all, so that "100." is not drawn at all in
one training of a hundred; the replay buffer has room for all numbers.  (Seed 100, with a third of these draws: KL 0.093
after 80 steps, all of it the text "100.".)

PPO's reward is the model's: with the matched KL its optimum is the target, without it any valid number is as good as
any other.  Supervised fine-tuning is told uniform draws, the answer itself.

Cost: a step of 24 draws reads some 3 tokens each to draw them, to score them, and for the guide's gradient; on seed 100
that was 230 tokens and 3.3 to 4.8 processor seconds.  PPO makes four updates on the same draws, and gets fewer steps.
A seed of all methods takes twelve minutes of a core.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

from benchmarks.paper import random_number as embedded
from benchmarks.paper.random_number import LIKELIHOOD, MATCHED, REWARD, divergences, log_probs, log_target, train
from benchmarks.paper.study import Figures, Headline, Results, Study, markdown, spread, verdict
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
    """The model, and a guide to be trained by one of the methods."""
    recipe = replace(RECIPE, steps=SHORT if short else STEPS[cell], particles=8 if short else RECIPE.particles)
    if cell == SUPERVISED:  # it is told a quarter of what others draw
        recipe = replace(recipe, particles=4 * recipe.particles)
    e = experiment(lm, seed=seed, recipe=recipe)
    task = RandomNumber(lm, e.guide_lm, invalid=INVALID)
    return replace(e, model=task.model, guide=task.guide)


def run(cell: str, seed: int, short: bool, lm: LanguageModel, data: Path | None = None) -> Figures:
    """Train one method and hold it against the exact target."""
    guide, tokens = lm, 0
    if cell != PRIOR:
        e = made(cell, lm, seed, short)
        tokens = train(LIKELIHOOD if cell == SUPERVISED else cell, e, seed)
        guide = e.guide_lm
    log_q = log_probs(lm, guide, FIXED)
    return divergences(log_target(lm, FIXED, "uniform"), log_q) | {"tokens": tokens, "q": log_q.exp().tolist()}


def report(results: Results) -> str:
    """The table, and a sentence a claim."""
    rows = [["the paper's language model", "3.37"], ["the paper's GFlowNet", "0.0000975"]]
    rows = [row + [""] * 4 for row in rows]
    for cell, runs in results.items():
        shown = spread(runs, "forward", 4), spread(runs, "reverse", 4), spread(runs, "valid", 2, 100) + "%"
        rows.append([cell, *shown, f"{round(mean(r['tokens'] for r in runs)):,}", str(len(runs))])
    text = "Target: uniform on 0..100; KL in nats, exact.\n\n"
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
        claim = "the language model's numbers are far from uniform (KL 3.37)"
        said.append(verdict(claim, largest(PRIOR) > 1, f"{largest(PRIOR):.2f}, {least(PRIOR):.0f}% valid."))
    if GFLOWNET in results:
        kl = largest(GFLOWNET)
        because = f"Largest KL {kl:.2g}, least valid {least(GFLOWNET):.2f}%, in {STEPS[GFLOWNET]} steps."
        said.append(verdict("after GFlowNet tuning the KL is 9.75e-5 (here: at most 1e-4)", kl <= 1e-4, because))
        if PRIOR in results:
            claim = "GFlowNet tuning takes nine tenths of the language model's KL away"
            said.append(verdict(claim, kl <= 0.1 * largest(PRIOR), f"{largest(PRIOR):.2f} before, {kl:.2g} after."))
    if REWARD in results:
        skewed = min(r["reverse"] for r in results[REWARD])
        because = f"For the reward alone {least(REWARD):.1f}% valid or more, among those a KL of {skewed:.2f} or more"
        if MATCHED in results:
            because += f"; with the matched KL {least(MATCHED):.1f}% and {largest(MATCHED, 'reverse'):.2f} at most"
        because += f"; {STEPS[REWARD]} steps of four updates."
        said.append(verdict("PPO learns to be valid and stays skewed", least(REWARD) > 95 and skewed > 0.5, because))
    if GFLOWNET in results:
        lost = [r["q"][-1] * len(r["q"]) for r in results[GFLOWNET]]
        said.append(
            f"- Of its uniform share the GFlowNet gives 100, the only number of three digits, {min(lost):.1e} to "
            f"{max(lost):.1e} in the seeds.\n"
        )
    return said


def headline(results: Results) -> Headline:
    """How far the language model and the trained guide are from uniform."""
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
