r"""Arithmetic with a calculator (Hu et al. 2024, section 4.4, Table 4): SFT, PPO and a GFlowNet from one start.

After four rationales the language model writes next to no right chain: the first gate, measured again as "prompting".
So p is the language model after supervised fine-tuning on the 50 rationales, chains and answers, one pass over them at
2 a step.  The target of the GFlowNet and of PPO with the matched KL is p's posterior p(z|x, y) of the chain z of a
question x with the answer y; the guides q(z|x) start as copies of p.  They get the paper's questions with answers, and
every fourth step rationales: a replay buffer has something for a step only if it has for each of its questions.  All
answers are p's own, p(y|x z), and all have the same calculator.

A seed has its own test questions, none of which is in training: 374 of the paper's of 3 operands are left, 443 of 4.
The paper's of 5 are not in its files: here operands and signs are uniform, as in the files, from a fixed seed.

What certifies a guide: the mass that it gives a question's right chain, which is exact, beside the posterior's; the gap
between log Z and the ELBO, and ESS/N.  Log Z is the right chain's joint and an importance estimate of all others, from
the guide's own draws: of a guide that misses much of the posterior's mass it is too small, and then so is the gap.

Chosen with seed 100 on held-out training questions, fresh ones of 5 operands, by the mean mass of the right chain of 3
(10 questions), 4 (24) and 5 (24):

    the language model                                           0.00  0.00  0.00
    SFT, 20 steps at 1e-3                                        0.94  0.71  0.05
         25 steps, a pass over the rationales                    0.78  0.28  0.00  taken as the start
         40 steps                                                1.00  0.96  0.29
         100 steps                                               1.00  1.00  0.53
         50 steps at 3e-4                                        1.00  0.84  0.07
    then the GFlowNet, 60 steps at 1e-4, rationales by chance    0.98  0.92  0.31  its rate taken
         at 3e-4, on-policy, rationales every fourth step        0.98  0.71  0.19  its rationales taken
    or PPO for the reward alone, 20 steps at 3e-4                0.95  0.74  0.22  taken, and 40 steps

(The lines of SFT but the one taken have 12 questions of 3 operands.  After four rationales the language model has 0.03
on six of these.)  After 100 steps there is no room on 3 and 4 operands: nearly every draw is right, and nine of ten
steps of the GFlowNet and two of two of PPO had no gradient at all.  The start has 42 and 8 percent by vote on 12
questions of 4 and 5, the paper's SFT 20 and 13; "SFT, four passes" stands beside what is made of it.  PPO gets as many
training tokens as the GFlowNet: 40 steps.  Its rate is the one of the embedded studies, and no other was tried; nor was
the GFlowNet at 1e-4 with rationales every fourth step, or PPO with the matched KL.

Cost, by these: a step of SFT took 1 processor second, of the GFlowNet 6, of PPO 9; a question asked of a method 3 to 4,
of prompting 12.  So a seed is some 42 minutes of a core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from benchmarks.paper.arithmetic import PAPER
from benchmarks.paper.study import Figures, Headline, Results, Study, markdown, paired, verdict
from benchmarks.paper.targets import ppo
from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.embedded import Question
from lmppl.embedded.arithmetic import draw
from lmppl.inference import Importance, Replay, SupervisedFineTuning, few_shot
from lmppl.models import PRETRAINED, Arithmetic, Experiment, Recipe
from lmppl.models.arithmetic import FILES, experiment, read_questions, score
from lmppl.text import equal, length

PROMPTING, SFT, LONGER = "prompting", "SFT", "SFT, four passes"
REWARD, MATCHED, GFLOWNET = "PPO, reward only", "PPO, matched KL", "GFlowNet"
CELLS = (PROMPTING, SFT, LONGER, REWARD, MATCHED, GFLOWNET)
IN_PAPER = {PROMPTING: "prompting", SFT: "sft", REWARD: "ppo", GFLOWNET: "gflownet"}  # keys of `PAPER`
OPERANDS = (3, 4, 5)
QUESTIONS = {3: 8, 4: 24, 5: 24}  # a seed's, the same for all methods
PROMPTED = 8  # of these, the first, after rationales
SHOTS, VOTES = 4, 10
RECIPE = replace(PRETRAINED, replay=Replay)
EVERY = 4  # one step of so many is on rationales
SFT_STEPS, LONGER_STEPS, SFT_RATE = 25, 100, 1e-3  # a pass over the rationales is 25
GUIDE_STEPS, GUIDE_RATE = 60, 1e-4
PPO_STEPS, PPO_RATE = 40, 3e-4
SHORT = 2  # steps, for tests


class Asked(NamedTuple):
    """What a method learns from and what it is asked, of so many operands."""

    rationales: list[Question]
    train: list[Question]  # whose answers are known
    test: dict[int, list[Question]]


def questions(data: Path, seed: int, short: bool = False) -> Asked:
    """The paper's training questions, and a seed's own test questions."""
    four, three = read_questions(data / "arithmetic")
    test = {}
    for operands, found in zip(OPERANDS, (three, four.test, of_five_operands()), strict=True):
        count = 2 if short else QUESTIONS[operands]
        test[operands] = (found * 2)[seed * count % len(found) :][:count]
    return Asked(four.rationales, four.train, test)


def of_five_operands() -> list[Question]:
    """500 questions, the same ones at every call."""
    random = Random("five operands")
    return list(dict.fromkeys(draw(random, 5) for _ in range(500)))


class Shown(Arithmetic):
    """Arithmetic whose questions come after others with their chains and answers."""

    def __init__(self, lm: LanguageModel, shown: Sequence[Question], **options: Any):
        super().__init__(lm, lm, **options)
        self.template = few_shot("{x}", [({"x": q.x}, q.chain + q.y) for q in shown], "\n")

    def encode(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        x, y = super().encode(questions)
        return self.lm.fill(self.template, x=x), y


def longest(lm: LanguageModel) -> int:
    """The most tokens of a right chain of five operands, without its stop."""
    return int(length(lm.encode([q.chain for q in of_five_operands()])).max()) - 1


def fine_tuned(
    lm: LanguageModel, asked: Asked, seed: int, tokens: int, steps: int, rate: float = SFT_RATE
) -> tuple[LanguageModel, int]:
    """p: the language model after supervised fine-tuning on the rationales, chains and answers; and tokens read."""
    p = RECIPE.guide_lm(lm, seed)
    task = Arithmetic(p, max_tokens=tokens)
    x, y = task.encode(asked.rationales)
    z = task.chains(asked.rationales)
    rows = RECIPE.passes(len(x), seed)

    def batch(step: int) -> tuple[Any, ...]:
        x_, y_, z_ = (text[rows(step)] for text in (x, y, z))
        return x_, y_, {"z": z_, "y": y_}

    before, both = (poutine.uncondition(Arithmetic(each, max_tokens=tokens).model) for each in (lm, p))
    tuning = SupervisedFineTuning(before, both, optimizer=torch.optim.AdamW(p.trainable_parameters(), lr=rate))
    tuning.fit(batch, steps, seed=seed, progress=False)
    return p, tuning.training_tokens


def start(p: LanguageModel, asked: Asked, data: Path, seed: int, recipe: Recipe, tokens: int) -> Experiment:
    """The posterior of p, a guide that is p's copy, and the questions to train it on."""
    e = experiment(p, data / "arithmetic", seed=seed, recipe=recipe, warm_start=0)
    with torch.no_grad():
        for own, given in zip(e.guide_lm.trainable_parameters(), p.trainable_parameters(), strict=True):
            own.copy_(given)
    task = Arithmetic(p, e.guide_lm, max_tokens=tokens)
    told, others = (recipe.batches(*task.encode(part), seed=seed) for part in (asked.rationales, asked.train))

    def batches(step: int) -> tuple[Tensor, ...]:
        turn, at = divmod(step, EVERY)
        return told(turn) if at == EVERY - 1 else others(step - turn)

    return replace(e, model=task.model, guide=task.guide, batches=batches)


def made(cell: str, lm: LanguageModel, data: Path, asked: Asked, seed: int, short: bool) -> tuple[Arithmetic, int]:
    """The programs of a method, its guide trained, and the tokens of that training."""
    tokens = longest(lm)
    if cell == PROMPTING:
        return Shown(lm, Random(seed).sample(asked.rationales, SHOTS), max_tokens=tokens), 0
    passes = LONGER_STEPS if cell == LONGER else SFT_STEPS
    p, read = fine_tuned(lm, asked, seed, tokens, SHORT if short else passes)
    if cell in (SFT, LONGER):
        return Arithmetic(p, p, max_tokens=tokens), read
    steps, rate = (GUIDE_STEPS, GUIDE_RATE) if cell == GFLOWNET else (PPO_STEPS, PPO_RATE)
    e = start(p, asked, data, seed, replace(RECIPE, learning_rate=rate), tokens)
    trainer = e.gflownet() if cell == GFLOWNET else ppo(e, cell == MATCHED, optimizer=e.optimizer(rate))
    trainer.fit(e.batches, SHORT if short else steps, seed=seed, progress=False)
    return Arithmetic(p, e.guide_lm, max_tokens=tokens), read + trainer.training_tokens


@torch.no_grad()
def measured(task: Arithmetic, asked: Sequence[Question], votes: int) -> Figures:
    """Votes and chains of the guide for these questions, and how far it is from the posterior: lists, by question.

    *right* is the mass that the guide gives the right chain, exactly, and *posterior* what the posterior gives it.  Its
    log_z takes that chain's joint as it is, and the importance estimate from the guide's draws of all others.
    """
    x, y = task.encode(asked)
    found = Importance(task.model, task.guide, num_particles=votes).run(x, y)
    z, log_w = found.samples["z"], found.log_weights + math.log(votes)
    truth = task.chains(asked)
    log_q = task.chain(task.guide_lm, x).log_prob(truth)
    log_p = task.chain(task.lm, x).log_prob(truth)
    log_joint = log_p + Completion(task.lm, task.lm.join(x, truth), max_tokens=length(y), stop=None).log_prob(y)
    said = task.answered(x, z)
    others = log_w.masked_fill(equal(z, truth), -math.inf).logsumexp(0) - math.log(votes)
    log_z = torch.logaddexp(log_joint, others)
    of = [score([q], [given]) for q, given in zip(asked, said, strict=True)]
    return {
        "vote": [s.vote for s in of],
        "single": [s.single for s in of],
        "sound": [s.single and s.single * s.sound for s in of],  # right by a right chain
        "right": log_q.exp().tolist(),
        "posterior": (log_joint - log_z).exp().tolist(),
        "log_z": log_z.tolist(),
        "gap": (log_z - log_w.mean(0)).tolist(),
        "ess": (found.ess / votes).tolist(),
        "chains": [given[0].chain for given in said[:3]],
    }


def run(cell: str, seed: int, short: bool, lm: LanguageModel, data: Path) -> Figures:
    """Votes of one method on unseen questions, and what certifies it."""
    asked = questions(data, seed, short)
    task, tokens = made(cell, lm, data, asked, seed, short)
    torch.manual_seed(seed)
    count = PROMPTED if cell == PROMPTING else None
    of = {str(n): measured(task, test[:count], 2 if short else VOTES) for n, test in asked.test.items()}
    return {"of": of, "tokens": tokens}


# -- the section ------------------------------------------------------------------------------------------------------


def pooled(runs: Sequence[Figures], operands: int, key: str) -> list[float]:
    """A figure of the questions of all seeds."""
    return [value for r in runs for value in r["of"][str(operands)][key]]


def average(runs: Sequence[Figures], key: str, digits: int = 2, scale: float = 1.0) -> str:
    """A figure's mean over questions of 3, 4 and 5 operands."""
    means = (round(scale * mean(pooled(runs, n, key)), digits) + 0.0 for n in OPERANDS)  # no "-0.00"
    return " / ".join(f"{value:.{digits}f}" for value in means)


def wilson(hits: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927), which has a width where all are right, too."""
    z, n, share = 1.96, len(hits), mean(hits)
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def votes(runs: Sequence[Figures], operands: int) -> str:
    """Questions whose vote is right, in percent, with the interval."""
    hits = pooled(runs, operands, "vote")
    low, high = wilson(hits)
    return f"{100 * mean(hits):.1f} ({100 * low:.0f} to {100 * high:.0f})"


def ahead(results: Results, ours: str, theirs: str, operands: int, key: str) -> tuple[float, float]:
    """How far ahead on the same questions, and the half-width of the 95% interval; seeds that both have."""
    runs = [{r["seed"]: r for r in results[cell]} for cell in (ours, theirs)]
    both = [seed for seed in runs[0] if seed in runs[1]]
    a, b = (pooled([of[seed] for seed in both], operands, key) for of in runs)
    return paired([100 * value for value in a], [100 * value for value in b])


def with_one_evidence(of: Results) -> Results:
    """Results in which the methods of one p share log Z: of a seed's question the mean of their estimates of Z.

    Each is unbiased, and by its own a guide that misses much of the posterior would seem nearer to it than it is.
    """
    found = dict(of)
    alike = [cell for cell in (SFT, REWARD, MATCHED, GFLOWNET) if cell in of]
    for cell in alike:
        found[cell] = []
        for own in of[cell]:
            runs = [r for c in alike for r in of[c] if r["seed"] == own["seed"]]
            parts = {n: _moved(part, [r["of"][n] for r in runs]) for n, part in own["of"].items()}
            found[cell].append({**own, "of": parts})
    return found


def _moved(own: Figures, all_of_them: Sequence[Figures]) -> Figures:
    before, each = torch.tensor(own["log_z"]), torch.tensor([r["log_z"] for r in all_of_them])
    more = each.logsumexp(0) - math.log(len(each)) - before
    gap, posterior = torch.tensor(own["gap"]) + more, torch.tensor(own["posterior"]) * (-more).exp()
    return {**own, "log_z": (before + more).tolist(), "gap": gap.tolist(), "posterior": posterior.tolist()}


def report(results: Results) -> str:
    """Votes beside the paper's, what certifies the guides, the gate, and the claims."""
    of = with_one_evidence({cell: results[cell] for cell in CELLS if cell in results})
    asked = ", ".join(f"{count} of {n} operands" for n, count in QUESTIONS.items())
    text = (
        f"Questions a seed, the same for all methods (the first {PROMPTED} of each for prompting): {asked}. Votes of "
        f"{VOTES} answers, right in percent with "
        "Wilson's 95% interval over questions; *paired* is the difference to SFT on the same questions, with the "
        "interval by Student's t; *sound* is the share of right answers whose chain is right.\n\n"
    )
    rows = []
    for cell, runs in of.items():
        paper = " / ".join(f"{share:g}" for share in PAPER[IN_PAPER[cell]]) if cell in IN_PAPER else ""
        against = ["", ""]
        if SFT in of and cell not in (SFT, PROMPTING):
            against = ["{:+.1f} ± {:.1f}".format(*ahead(of, cell, SFT, n, "vote")) for n in (4, 5)]
        singles = sum(sum(pooled(runs, n, "single")) for n in OPERANDS)
        sound = f"{sum(sum(pooled(runs, n, 'sound')) for n in OPERANDS) / singles:.2f}" if singles else ""
        tokens = f"{mean(r['tokens'] for r in runs):,.0f}"
        rows.append([cell, paper, *(votes(runs, n) for n in OPERANDS), *against, sound, tokens, str(len(runs))])
    text += markdown(
        ("method", "paper: 3 / 4 / 5", "vote, 3 operands", "4", "5", "paired, 4", "paired, 5", "sound",
         "training tokens", "seeds"), rows,
    )  # fmt: skip
    text += (
        "\nHow far the draws are from the posterior p(z∣x, y); 3 / 4 / 5 operands, means over questions. Its p is the "
        "untrained model for prompting, the one after four passes for that row, and the one after SFT for all others. "
        "The right chain's mass under the guide is exact. Z is an estimate, of one p the mean over its guides: "
        "where all of them miss much of the posterior it is too small, the right chain's mass under the posterior too "
        "large, and log Z - ELBO too small.\n\n"
    )
    text += markdown(
        ("method", "right chain under the guide", "under the posterior", "log Z - ELBO", "ESS/N"),
        [
            [cell, average(runs, "right", 3), average(runs, "posterior", 3), average(runs, "gap"), average(runs, "ess")]
            for cell, runs in of.items()
        ],
    )
    return text + "\n" + "".join((*gate(of), *claims(of)))


def gate(of: Results) -> list[str]:
    """What the language model does without training."""
    if PROMPTING not in of:
        return []
    masses = average(of[PROMPTING], "right", 2, 100)
    right = [sum(VOTES * s for s in pooled(of[PROMPTING], n, "sound")) for n in OPERANDS]
    drawn = VOTES * sum(len(pooled(of[PROMPTING], n, "sound")) for n in OPERANDS)
    return [
        f"- The first gate: after {SHOTS} rationales the language model gives right chains {masses} percent of the "
        f"mass (3 / 4 / 5 operands), and {sum(right):.0f} of {drawn} draws were right with a right chain. So p and "
        "all other rows start from SFT on the 50 rationales.\n"
    ]


def claims(of: Results) -> list[str]:
    """A verdict on each place in the paper's order, at 4 and 5 operands."""
    said = []
    for ours, theirs in ((GFLOWNET, SFT), (SFT, REWARD), (GFLOWNET, REWARD), (GFLOWNET, LONGER)):
        for n in (4, 5) if ours in of and theirs in of else ():
            gain, half = ahead(of, ours, theirs, n, "vote")
            because = "{:+.1f} ± {:.1f} points by vote, {:+.1f} ± {:.1f} of the right chain's mass.".format(
                gain, half, *ahead(of, ours, theirs, n, "right")
            )
            because += " The contrary is seen." if gain < -half else ""
            claim = f"{ours} is ahead of {theirs} at {n} operands"
            if ours in IN_PAPER and theirs in IN_PAPER:
                claim += " ({:g} and {:g})".format(*(PAPER[IN_PAPER[m]][OPERANDS.index(n)] for m in (ours, theirs)))
            said.append(verdict(claim, gain > half, because))
    return said


def headline(results: Results) -> Headline:
    """Votes by the number of operands, of the seeds that all methods have."""
    methods = [m for m in (SFT, REWARD, GFLOWNET) if m in results]
    if len(methods) < 3:
        return []
    seeds = set.intersection(*({r["seed"] for r in results[m]} for m in methods))
    runs = {m: [r for r in results[m] if r["seed"] in seeds] for m in methods}
    return [
        (
            f"votes right in percent, {n} operands, of {'; '.join(methods)}",
            "; ".join(f"{PAPER[IN_PAPER[m]][OPERANDS.index(n)]:g}" for m in methods),
            "; ".join(votes(runs[m], n) for m in methods),
            len(seeds),
        )
        for n in (4, 5)
        if seeds
    ]


STUDY = Study(
    "arithmetic", "Arithmetic: chains of thought with a calculator", CELLS, run, report, paired=False,
    needs=tuple(f"arithmetic/{name}" for name in FILES), headline=headline,
)  # fmt: skip
