"""Chains of thought with a calculator: prompting, fine-tuning on 50 rationales, and what 1,000 answers add to it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from lmppl import embedded
from lmppl.distributions import Completion
from lmppl.inference import Enumeration, PolicyGradient, Posterior
from lmppl.inference.compare.quality import density_quality
from lmppl.models import Experiment
from lmppl.models.arithmetic import MASS, PAPER_VOTE, RECIPE, WARM_START, Arithmetic, experiment, is_right, score, teach

from .study import Figures, Results, Study, markdown, paired, spread, verdict

CELLS = {
    "prompting": "CoT prompting (the language model itself)",
    "prompting_cold": "the same, votes at temperature 0.1",
    "sft": "SFT on the 50 rationales",
    "self_training": "SFT, then self-training on the 1,000 answers",
    "ppo": "SFT, then PPO, reward only",
    "ppo_kl": "SFT, then PPO, matched KL",
    "gflownet": "SFT, then GFlowNet",
    "gflownet_paper": "SFT, then GFlowNet; the paper's target and votes",
    "exact": "exact posterior p(z \\| x, y)",
}
PAPER = {
    "prompting": (35.5, 21.0, 10.5),
    "sft": (72.1, 19.6, 12.8),
    "ppo": (30.6, 13.7, 5.6),
    "gflownet": (95.2, 75.4, 40.7),
    "gflownet_paper": (95.2, 75.4, 40.7),
}
QUESTIONS = {3: 200, 4: 1000, 5: 200}  # asked of every method and seed
TRUTH = 8  # test questions of four operands whose posterior is enumerated
COLD = "prompting_cold", "gflownet_paper"  # votes at the paper's temperature
PPO_RATE, PPO_STEPS = 3e-4, 100  # four updates on the same draws: half as many draws as the GFlowNet, at a similar cost
ROUNDS, ROUND_DRAWS, ROUND_STEPS = 3, 4, 100  # of self-training
SHORT = {"steps": 2, "questions": 8, "truth": 1, "particles": 4}
SHORT_MASS = 0.4


def trained(cell: str, seed: int, short: bool) -> Experiment:
    """The experiment with its guide trained by one method."""
    recipe = replace(RECIPE, steps=SHORT["steps"], particles=SHORT["particles"]) if short else RECIPE
    warm_start = 0 if cell.startswith("prompting") else recipe.steps if short else WARM_START
    setting = "paper" if cell == "gflownet_paper" else "posterior"
    e = experiment(seed=seed, recipe=recipe, setting=setting, warm_start=warm_start)
    if cell.startswith("gflownet"):
        e.gflownet().fit(e.batches, recipe.steps, seed=seed, progress=False)
    elif cell.startswith("ppo"):
        matched: dict[str, Any] = (
            {"reward": "likelihood", "kl": 1.0} if cell == "ppo_kl" else {"reward": "joint", "kl": 0.0}
        )
        optimizer = torch.optim.AdamW(e.guide_lm.trainable_parameters(), lr=PPO_RATE)
        ppo = PolicyGradient(
            e.model, e.guide, optimizer=optimizer, algorithm="ppo", num_particles=recipe.particles, **matched
        )
        ppo.fit(e.batches, min(recipe.steps, PPO_STEPS), seed=seed, progress=False)
    elif cell == "self_training":
        self_train(Arithmetic(e.lm, e.guide_lm), short, seed)
    return e


def self_train(task: Arithmetic, short: bool, seed: int) -> None:
    """Rounds of drawing chains for the questions with answers, and fine-tuning on those that led to the answer."""
    rationales, train = (embedded.data("arithmetic", name) for name in ("rationales", "train"))
    train = train[: SHORT["questions"]] if short else train
    found = {(q, q.chain) for q in rationales}
    for i in range(1 if short else ROUNDS):
        for q, given in zip(train, task.predict(train, votes=ROUND_DRAWS), strict=True):
            found |= {(q, p.chain) for p in given if p.answer == q.answer}
        examples = sorted(found)
        chains = task.lm.encode([chain for _, chain in examples])
        steps = SHORT["steps"] if short else ROUND_STEPS
        recipe = replace(RECIPE, observations=RECIPE.observations * RECIPE.particles)
        teach(task, [q for q, _ in examples], chains, steps, recipe=recipe, seed=seed * ROUNDS + i)


def run(cell: str, seed: int, short: bool) -> Figures:
    """Votes and chains on questions of 3, 4 and 5 operands, and the distance to the exact posterior on a few."""
    torch.manual_seed(seed)
    if cell == "exact":
        return truth(short)
    e = trained(cell, seed, short)
    lm = e.lm if cell.startswith("prompting") else e.guide_lm
    task = Arithmetic(e.lm, lm)
    figures: Figures = {}
    for operands, count in QUESTIONS.items():
        asked = embedded.data("arithmetic", f"test_{operands}")[: SHORT["questions"] if short else count]
        temperature = PAPER_VOTE if cell in COLD else 1.0
        figures |= {
            f"{k} {operands}": v
            for k, v in score(asked, task.predict(asked, temperature=temperature))._asdict().items()
        }
    x, y = task.encode(embedded.data("arithmetic", "test_4")[: SHORT["truth"] if short else TRUTH])
    quality = density_quality(_exact(cell == "gflownet_paper", 4, short), task.guide, (x, y), {})
    for name in ("total_variation", "forward_kl"):
        figures[name] = getattr(quality, name).mean().item()
    return figures


@cache
def _exact(paper: bool, operands: int, short: bool) -> Posterior:
    """The enumerated target of the first test questions; once a process."""
    e = experiment(setting="paper" if paper else "posterior", warm_start=0)
    asked = embedded.data("arithmetic", f"test_{operands}")[: SHORT["truth"] if short else TRUTH]
    return Enumeration(e.model, mass=SHORT_MASS if short else MASS).run(*Arithmetic(e.lm).encode(asked))


@torch.no_grad()
def truth(short: bool) -> Figures:
    """What the exact posterior, which knows y, would answer: chains z ~ p(z | x, y), then y ~ p(y | x z)."""
    e = experiment(warm_start=0)
    task = Arithmetic(e.lm)
    figures: Figures = {}
    for operands in (4,) if short else QUESTIONS:
        asked = embedded.data("arithmetic", f"test_{operands}")[: SHORT["truth"] if short else TRUTH]
        x, y = task.encode(asked)
        exact = _exact(False, operands, short)
        z = exact.samples["z"]  # (chain, question, L)
        likelihood = Completion(e.lm, e.lm.join(x, z), max_tokens=y.shape[-1], stop=None).log_prob(y).exp()
        right = exact.probabilities * likelihood  # (chain, question): p(z | x, y) p(y | x z)
        sound = [[is_right(q, c) for q, c in zip(asked, row, strict=True)] for row in e.lm.decode(z)]
        of_sound = (right * torch.tensor(sound)).sum(0)
        figures[f"single {operands}"] = right.sum(0).mean().item()
        figures[f"sound {operands}"] = (of_sound / right.sum(0)).mean().item()
        figures[f"unexplored {operands}"] = exact.unexplored.mean().item()
    return figures


def report(results: Results) -> str:
    """Accuracy by vote beside the paper's, in per cent; chains; distances; and the claims."""
    rows = []
    for cell, name in CELLS.items():
        found = results[cell]
        paper = PAPER.get(cell)
        row = [name, " / ".join(f"{p}" for p in paper) if paper else ""]
        row += ["" if cell == "exact" else spread(found, f"vote {n}", 1, 100) for n in QUESTIONS]
        row += [spread(found, "single 4", 1, 100), spread(found, "sound 4", 1, 100)]
        row += ["0" if cell == "exact" else spread(found, key) for key in ("total_variation", "forward_kl")]
        rows.append(row)
    header = ("method", "paper: 3 / 4 / 5", "vote, 3 operands", "4", "5", "one answer, 4", "right chains", "TV", "KL")
    text = (
        "Target: the posterior p(z | x, y), unless the row says otherwise; guides read x only. Right answers in per "
        f"cent, by majority vote of 10 on {QUESTIONS[4]:,} unseen questions of 4 operands ({QUESTIONS[3]} of 3 and "
        f"{QUESTIONS[5]} of 5, one more than in training), and of single answers; the share of right answers whose "
        f"chain is right, too; and the guide's distance to its enumerated target on {TRUTH} questions of 4 operands. "
        "The exact posterior knows y.\n\n"
    )
    return text + markdown(header, rows) + "\n" + "".join(claims(results))


def claims(results: Results) -> list[str]:
    def ahead(of: str, operands: int) -> tuple[float, float]:
        return paired(*([100 * r[f"vote {operands}"] for r in results[c]] for c in ("gflownet", of)))

    names, said = {"sft": "SFT", "ppo": "PPO for the reward alone", "self_training": "self-training"}, []
    for other, least in (("sft", 10), ("ppo", 10), ("self_training", 0)):
        (d, half), (far, half_far) = ahead(other, 4), ahead(other, 5)
        margin = f" by {least} points" if least else ""
        said.append(
            verdict(
                f"GFlowNet tuning is ahead of {names[other]}{margin} on 4 operands, and ahead on 5",
                d >= least and d - half > 0 and far - half_far > 0,
                f"It is ahead by {d:+.1f} ± {half:.1f} points on 4 operands and by {far:+.1f} ± {half_far:.1f} on 5 "
                "(paired over seeds, 95%).",
            )
        )
    return said


STUDY = Study("arithmetic", "Arithmetic: chains of thought with a calculator", tuple(CELLS), run, report)
