r"""Arithmetic with a calculator (Hu et al. 2024, section 4.4, Table 4): SFT, PPO and a GFlowNet from the same start.

After four rationales the language model writes almost no right chain.  This is the first gate, measured again as
"prompting".  So p is the language model after supervised fine-tuning on the 50 rationales, chains and answers, one
pass over them with 2 per step.  The target of the GFlowNet, and of PPO with the matched KL, is the posterior p(z|x,
y) of the chain z of a question x with the answer y.  The guides q(z|x) start as copies of p.  They learn from the
paper's questions with answers, and every fourth step from rationales: a replay buffer is used in a step only if it
has something for each question of the step.  All answers are drawn from p(y|x z), and all methods have the same
calculator.

Each seed has its own test questions, and none of them is in training: of the paper's, 374 of 3 operands are left and
443 of 4.  The paper's questions of 5 operands are not in its files.  Here their operands and signs are uniform, as in
the files, from a fixed seed.

A guide is judged by its exact mass on the right chain of a question, compared with the posterior's, by the gap
between log Z and the ELBO, and by ESS/N.  Z is the sum of the right chain's joint and an importance estimate of all
other chains from the guide's own draws.  If a guide misses much of the posterior's mass, the estimate is too small,
and so is the gap.

The recipes were chosen with seed 100 on held-out training questions, and new ones of 5 operands, by the mean mass of
the right chain with 3 (10 questions), 4 (24) and 5 operands (24):

    the language model                                           0.00  0.00  0.00
    SFT, 20 steps at 1e-3                                        0.94  0.71  0.05
         25 steps, a pass over the rationales                    0.78  0.28  0.00  taken as the start
         40 steps                                                1.00  0.96  0.29
         100 steps                                               1.00  1.00  0.53
         50 steps at 3e-4                                        1.00  0.84  0.07
    then the GFlowNet, 60 steps at 1e-4, rationales by chance    0.98  0.92  0.31  its rate taken
         at 3e-4, on-policy, rationales every fourth step        0.98  0.71  0.19  its rationales taken
    or PPO for the reward only, 20 steps at 3e-4                 0.95  0.74  0.22  taken, and 40 steps

(The lines of SFT except the one taken have 12 questions of 3 operands.  After four rationales the language model has
0.03 on six of these.)  After 100 steps of SFT there is no room for improvement on 3 and 4 operands: nearly every
draw is right, and nine of ten steps of the GFlowNet and two of two of PPO had no gradient at all.  The start is right
on 42 and 8 percent by vote on 12 questions of 4 and of 5 operands, the paper's SFT on 20 and 13.  "SFT, four passes"
is shown for comparison.  PPO gets as many training tokens as the GFlowNet, 40 steps.  Its rate is that of the embedded
studies; no other was tried.  Not tried either: the GFlowNet at 1e-4 with rationales every fourth step, and PPO with
the matched KL.

Cost, by these runs: a step of SFT took 1 processor second, of the GFlowNet 6, of PPO 9; one question for one method
took 3 to 4, for prompting 12.  So a seed takes about 42 minutes of a core.
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

from benchmarks.paper.arithmetic import PAPER, QUESTION
from benchmarks.paper.study import Figures, Headline, Results, Study, markdown, opening, paired, verdict
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
QUESTIONS = {3: 8, 4: 24, 5: 24}  # test questions per seed, the same for all methods
PROMPTED = 8  # the first of these are used for prompting
SHOTS, VOTES = 4, 10
RECIPE = replace(PRETRAINED, replay=Replay)
EVERY = 4  # every fourth step is on rationales
SFT_STEPS, LONGER_STEPS, SFT_RATE = 25, 100, 1e-3  # a pass over the rationales is 25
GUIDE_STEPS, GUIDE_RATE = 60, 1e-4
PPO_STEPS, PPO_RATE = 40, 3e-4
SHORT = 2  # steps, for tests


class Asked(NamedTuple):
    """The training questions of a method, and its test questions by the number of operands."""

    rationales: list[Question]
    train: list[Question]  # whose answers are known
    test: dict[int, list[Question]]


def questions(data: Path, seed: int, short: bool = False) -> Asked:
    """The paper's training questions, and the test questions of a seed."""
    four, three = read_questions(data / "arithmetic")
    test = {}
    for operands, found in zip(OPERANDS, (three, four.test, of_five_operands()), strict=True):
        count = 2 if short else QUESTIONS[operands]
        test[operands] = (found * 2)[seed * count % len(found) :][:count]
    return Asked(four.rationales, four.train, test)


def of_five_operands() -> list[Question]:
    """500 questions, the same at every call."""
    random = Random("five operands")
    return list(dict.fromkeys(draw(random, 5) for _ in range(500)))


class Shown(Arithmetic):
    """Arithmetic with other questions, their chains and answers before each question."""

    def __init__(self, lm: LanguageModel, shown: Sequence[Question], **options: Any):
        super().__init__(lm, lm, **options)
        self.template = few_shot("{x}", [({"x": q.x}, q.chain + q.y) for q in shown], "\n")

    def encode(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        x, y = super().encode(questions)
        return self.lm.fill(self.template, x=x), y


def longest(lm: LanguageModel) -> int:
    """The largest number of tokens of a right chain of five operands, without its stop."""
    return int(length(lm.encode([q.chain for q in of_five_operands()])).max()) - 1


def fine_tuned(
    lm: LanguageModel, asked: Asked, seed: int, tokens: int, steps: int, rate: float = SFT_RATE
) -> tuple[LanguageModel, int]:
    """p, the language model after supervised fine-tuning on chains and answers of the rationales, and tokens read."""
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
    """The experiment of p's posterior, with a copy of p as guide, and the training questions."""
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
    """The programs of a method, after training, and the tokens that training took."""
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
    """Votes and chains of the guide, and its distance from the posterior, as lists with an entry per question.

    *right* is the guide's exact mass on the right chain, *posterior* is the posterior's.  Z is the exact joint of that
    chain plus an importance estimate of all other chains from the guide's draws.
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
    """Votes of one method on unseen questions, and its distance from the posterior."""
    asked = questions(data, seed, short)
    task, tokens = made(cell, lm, data, asked, seed, short)
    torch.manual_seed(seed)
    count = PROMPTED if cell == PROMPTING else None
    of = {str(n): measured(task, test[:count], 2 if short else VOTES) for n, test in asked.test.items()}
    return {"of": of, "tokens": tokens}


# -- the section ------------------------------------------------------------------------------------------------------


def pooled(runs: Sequence[Figures], operands: int, key: str) -> list[float]:
    """The figures of the questions of all seeds."""
    return [value for r in runs for value in r["of"][str(operands)][key]]


def average(runs: Sequence[Figures], key: str, digits: int = 2, scale: float = 1.0) -> str:
    """The mean of a figure over questions of 3, of 4 and of 5 operands."""
    means = (round(scale * mean(pooled(runs, n, key)), digits) + 0.0 for n in OPERANDS)  # no "-0.00"
    return " / ".join(f"{value:.{digits}f}" for value in means)


def wilson(hits: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927); it has a width even if all are right."""
    z, n, share = 1.96, len(hits), mean(hits)
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def votes(runs: Sequence[Figures], operands: int) -> str:
    """The share of right votes in percent, with its interval."""
    hits = pooled(runs, operands, "vote")
    low, high = wilson(hits)
    return f"{100 * mean(hits):.1f} ({100 * low:.0f} to {100 * high:.0f})"


def ahead(results: Results, ours: str, theirs: str, operands: int, key: str) -> tuple[float, float]:
    """By how much a method is ahead on the same questions of common seeds, and half of the 95% interval."""
    runs = [{r["seed"]: r for r in results[cell]} for cell in (ours, theirs)]
    both = [seed for seed in runs[0] if seed in runs[1]]
    a, b = (pooled([of[seed] for seed in both], operands, key) for of in runs)
    return paired([100 * value for value in a], [100 * value for value in b])


def with_one_evidence(of: Results) -> Results:
    """Results in which the methods with the same p share log Z of a question, from the mean of their estimates of Z.

    Each estimate is unbiased.  By its own estimate, a guide that misses much of the posterior seems too close to it.
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
    """Votes, the paper's and ours; distances from the posterior; the gate; and the claims."""
    of = with_one_evidence({cell: results[cell] for cell in CELLS if cell in results})
    asked = ", ".join(f"{count} of {n} operands" for n, count in QUESTIONS.items())
    text = opening(
        QUESTION,
        "Target: the posterior p(z∣x, y) of the chain z, given the question x and the answer y; guides read only x. "
        f"Data: test questions that are in no training set, for each seed {asked}, the same for all methods; prompting "
        f"has the first {PROMPTED} of each. PPO and the GFlowNet start from SFT on the 50 rationales. A calculator "
        "computes every step.",
        {
            "paper: 3 / 4 / 5": "the paper's right votes in percent, for 3, 4 and 5 operands",
            "vote, 3 operands, 4, 5": f"right answers in percent by majority vote of {VOTES}, with Wilson's 95% "
            "interval over questions",
            "paired, 4 and 5": "difference to SFT on the same questions, in points, with its 95% interval by Student's "
            "t",
            "sound": "share of the right answers whose chain is right too",
            "training tokens": "tokens that the network read during training",
        },
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
        "\nHow far the draws are from the posterior p(z∣x, y), for 3 / 4 / 5 operands, means over questions. p is the "
        "untrained model for prompting, the model after four passes for that row, and the model after SFT for all "
        "other rows. The mass of the right chain under the guide is exact. log Z - ELBO is KL(guide, posterior), 0 at "
        "the posterior. Z is an estimate, for methods with the same p the mean of their estimates. If all guides miss "
        "much of the posterior, Z is too small; then the mass under the posterior is too large and log Z - ELBO too "
        "small.\n\n"
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
    """A sentence on the language model without training."""
    if PROMPTING not in of:
        return []
    masses = average(of[PROMPTING], "right", 2, 100)
    right = [sum(VOTES * s for s in pooled(of[PROMPTING], n, "sound")) for n in OPERANDS]
    drawn = VOTES * sum(len(pooled(of[PROMPTING], n, "sound")) for n in OPERANDS)
    return [
        f"- The first gate: after {SHOTS} rationales in the prompt, right chains have {masses} percent of the language "
        f"model's mass (3 / 4 / 5 operands), and {sum(right):.0f} of {drawn} draws were right with a right chain. "
        "Therefore all other rows start from SFT on the 50 rationales.\n"
    ]


def claims(of: Results) -> list[str]:
    """A verdict on the paper's order of each pair of methods, with 4 and 5 operands."""
    said = []
    for ours, theirs in ((GFLOWNET, SFT), (SFT, REWARD), (GFLOWNET, REWARD), (GFLOWNET, LONGER)):
        for n in (4, 5) if ours in of and theirs in of else ():
            gain, half = ahead(of, ours, theirs, n, "vote")
            because = "{:+.1f} ± {:.1f} points by vote, {:+.1f} ± {:.1f} by the mass of the right chain.".format(
                gain, half, *ahead(of, ours, theirs, n, "right")
            )
            because += " The opposite is seen." if gain < -half else ""
            claim = f"{ours} is ahead of {theirs} at {n} operands"
            if ours in IN_PAPER and theirs in IN_PAPER:
                shares = (PAPER[IN_PAPER[m]][OPERANDS.index(n)] for m in (ours, theirs))
                claim += " (the paper: {:g} and {:g})".format(*shares)
            said.append(verdict(claim, gain > half, because))
    return said


def headline(results: Results) -> Headline:
    """Votes by the number of operands, over the seeds that all methods have."""
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
