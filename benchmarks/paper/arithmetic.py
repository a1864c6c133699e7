"""Chains of thought with a calculator: prompting, fine-tuning on 50 rationales, and training on 1,000 answers."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from statistics import mean

import torch

from lmppl import embedded
from lmppl.distributions import Completion
from lmppl.embedded import Question
from lmppl.inference import Enumerated, Enumeration
from lmppl.inference.judging.quality import density_quality
from lmppl.models import Experiment
from lmppl.models.arithmetic import (
    EMBEDDED_RECIPE,
    PAPER_TEMPERATURE,
    PAPER_VOTE,
    RECIPE,
    WARM_START,
    Arithmetic,
    experiment,
    is_right,
    score,
    teach,
)

from .study import Figures, Results, Study, markdown, opening, paired, spread, verdict
from .targets import power, ppo

CELLS = {
    "prompting": "CoT prompting (the language model itself)",
    "prompting_cold": "the same, votes at temperature 0.1",
    "sft": "SFT on the 50 rationales",
    "self_training": "SFT, then self-training on the 1,000 answers",
    "ppo": "SFT, then PPO, reward only",
    "ppo_kl": "SFT, then PPO, matched KL",
    "gflownet": "GFlowNet, the rationales in its replay buffer",
    "gflownet_paper": "GFlowNet, the same; the paper's target and votes",
    "exact": "exact posterior p(z \\| x, y)",
}
PAPER = {
    "prompting": (35.5, 21.0, 10.5),
    "sft": (72.1, 19.6, 12.8),
    "ppo": (30.6, 13.7, 5.6),
    "gflownet": (95.2, 75.4, 40.7),
    "gflownet_paper": (95.2, 75.4, 40.7),
}
KINDS = {  # of chains that end at the answer
    "right": "right chains",
    "zeros": "chains that are wrong about zeros only (a zero left out, added, or with the other sign)",
    "luck": "chains whose errors cancel",
}
TAUGHT = replace(RECIPE, output_layer=True)  # SFT and what starts from it: the GFlowNet's adapter, the rate of SFT
QUESTIONS = {3: 200, 4: 1000, 5: 200}  # test questions by the number of operands, for every method and seed
TRUTH, MASS = 8, 0.96  # test questions of four operands whose posterior is enumerated; the prior mass enumerated
COLD = "prompting_cold", "gflownet_paper"  # vote at the paper's temperature
PPO_STEPS = 100  # with four updates on the same draws: half the draws of the GFlowNet, at a similar cost
ROUNDS, ROUND_DRAWS, ROUND_STEPS = 3, 4, 100  # of self-training
SHORT = {"steps": 2, "questions": 8, "truth": 1, "particles": 4}
SHORT_MASS = 0.4
QUESTION = (
    "Does GFlowNet tuning teach chains of thought better than fine-tuning and PPO, when few chains and many answers "
    "are known?"
)


def trained(cell: str, seed: int, short: bool) -> Experiment:
    """The experiment, with its guide trained by one method."""
    recipe = EMBEDDED_RECIPE if cell.startswith("gflownet") else TAUGHT
    recipe = replace(recipe, steps=SHORT["steps"], particles=SHORT["particles"]) if short else recipe
    warm_start = 0 if cell.startswith(("prompting", "gflownet")) else recipe.steps if short else WARM_START
    setting = "paper" if cell == "gflownet_paper" else "posterior"
    e = experiment(seed=seed, recipe=recipe, setting=setting, warm_start=warm_start)
    if cell.startswith("gflownet"):
        e.gflownet().fit(e.batches, recipe.steps, seed=seed, progress=False)
    elif cell.startswith("ppo"):
        ppo(e, cell == "ppo_kl").fit(e.batches, min(recipe.steps, PPO_STEPS), seed=seed, progress=False)
    elif cell == "self_training":
        self_train(Arithmetic(e.lm, e.guide_lm), short, seed)
    return e


def self_train(task: Arithmetic, short: bool, seed: int) -> None:
    """Draw chains for the questions with answers, fine-tune on those that end at the answer, and repeat."""
    rationales, train = (embedded.data("arithmetic", name) for name in ("rationales", "train"))
    train = train[: SHORT["questions"]] if short else train
    found = {(q, q.chain) for q in rationales}
    for i in range(1 if short else ROUNDS):
        for q, given in zip(train, task.predict(train, votes=ROUND_DRAWS), strict=True):
            found |= {(q, p.chain) for p in given if p.answer == q.answer}
        examples = sorted(found)
        chains = task.lm.encode([chain for _, chain in examples])
        steps = SHORT["steps"] if short else ROUND_STEPS
        recipe = replace(TAUGHT, observations=TAUGHT.observations * TAUGHT.particles)
        teach(task, [q for q, _ in examples], chains, steps, recipe=recipe, seed=seed * ROUNDS + i)


def run(cell: str, seed: int, short: bool) -> Figures:
    """Votes and chains on questions of 3, 4 and 5 operands; the distance to the exact posterior on a few of them."""
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
    exact = _exact(short)
    if cell == "gflownet_paper":
        exact = power(exact, PAPER_TEMPERATURE)
    asked = _asked(short)
    x, y = task.encode(asked)
    quality = density_quality(exact, task.guide, (x, y), {})
    for name in ("total_variation", "forward_kl"):
        figures[name] = getattr(quality, name).mean().item()
    with torch.no_grad():
        q = task.chain(lm, x).log_prob(exact.samples["z"]).exp()
    return figures | shares(exact, q.masked_fill(exact.log_weights == -torch.inf, 0.0), asked)


def _asked(short: bool) -> list[Question]:
    return embedded.data("arithmetic", "test_4")[: SHORT["truth"] if short else TRUTH]


@cache
def _exact(short: bool) -> Enumerated:
    """The enumerated posterior of the first test questions; computed once per process."""
    e = experiment(warm_start=0)
    return Enumeration(e.model, mass=SHORT_MASS if short else MASS).run(*Arithmetic(e.lm).encode(_asked(short)))


@torch.no_grad()
def truth(short: bool) -> Figures:
    """Figures of the exact posterior, which knows y: chains z ~ p(z | x, y), then an answer y ~ p(y | x z)."""
    e, exact, asked = experiment(warm_start=0), _exact(short), _asked(short)
    x, y = Arithmetic(e.lm).encode(asked)
    z = exact.samples["z"]  # (chain, question, L)
    likelihood = Completion(e.lm, e.lm.join(x, z), max_tokens=y.shape[-1], stop=None).log_prob(y).exp()
    answers = exact.probabilities * likelihood  # (chain, question): p(z | x, y) p(y | x z)
    figures = {"single 4": answers.sum(0).mean().item(), "unexplored": exact.unexplored.mean().item()}
    figures["sound 4"] = shares(exact, answers / answers.sum(0), asked)["right"]
    return figures | shares(exact, exact.probabilities, asked)


def shares(exact: Enumerated, mass: torch.Tensor, asked: list[Question]) -> Figures:
    """The share of each kind of chain in a mass (chain, question) on enumerated chains, mean over questions."""
    rows = exact.sites.decoders["z"](exact.samples["z"])
    kinds = [[kind(q, chain) for q, chain in zip(asked, row, strict=True)] for row in rows]
    return {
        name: (mass * torch.tensor([[k == name for k in row] for row in kinds])).sum(0).mean().item() for name in KINDS
    }


def kind(question: Question, chain: str) -> str | None:
    """The kind of a chain, one of `KINDS`, or None if it does not end at the answer."""
    if is_right(question, chain):
        return "right"
    if not re.search(rf"= {question.answer}\.$", chain):
        return None
    steps = [(s, int(n)) for s, n in re.findall(r" ([-+]) ([1-9]) =", chain)]
    needed = zip(question.signs, question.operands[1:], strict=True)
    return "zeros" if steps == [(s, n) for s, n in needed if n] else "luck"


def report(results: Results) -> str:
    """Accuracy by vote, the paper's and ours; kinds of chains; distances to the posterior; and the claims."""
    rows = []
    for cell, name in CELLS.items():
        found = results[cell]
        paper = PAPER.get(cell)
        row = [name, " / ".join(f"{p}" for p in paper) if paper else ""]
        row += ["" if cell == "exact" else spread(found, f"vote {n}", 1, 100) for n in QUESTIONS]
        row += [spread(found, "single 4", 1, 100), spread(found, "sound 4", 1, 100)]
        row += ["0" if cell == "exact" else spread(found, key) for key in ("total_variation", "forward_kl")]
        rows.append([*row, " / ".join(f"{mean(r[k] for r in found):.3f}" for k in KINDS)])
    header = ("method", "paper: 3 / 4 / 5", "vote, 3 operands", "4", "5", "one answer, 4", "right chains", "TV", "KL")
    text = opening(
        QUESTION,
        "Target: the posterior p(z | x, y) of the chain z, given the question x and the answer y; a row with *the "
        "paper's target* aims at the paper's. Guides read x only; the exact posterior knows y. Data: 50 questions with "
        f"chains (rationales), 1,000 with answers only, and unseen test questions: {QUESTIONS[3]} of 3 operands, "
        f"{QUESTIONS[4]:,} of 4, and {QUESTIONS[5]} of 5, which is one more than in training. A calculator computes "
        f"every step. The posterior is enumerated on {TRUTH} questions of 4 operands, for the last three columns.",
        {
            "paper: 3 / 4 / 5": "the paper's right votes in percent, for 3, 4 and 5 operands",
            "vote, 3 operands, 4, 5": "right answers in percent by majority vote of 10 chains",
            "one answer, 4": "right answers in percent of single chains, 4 operands",
            "right chains": "share in percent of these right answers whose chain is right too",
            "TV, KL": "total variation between target and guide, and KL(target, guide), nats",
            "right / zeros / cancel": f"the guide's mass on {', '.join(KINDS.values())}; all of these end at the "
            "answer",
        },
    )
    return text + markdown((*header, "right / zeros / cancel"), rows) + "\n" + "".join(claims(results))


def claims(results: Results) -> list[str]:
    def ahead(of: str, operands: int) -> tuple[float, float]:
        return paired(*([100 * r[f"vote {operands}"] for r in results[c]] for c in ("gflownet", of)))

    def average(cell: str, key: str) -> float:
        return mean(r[key] for r in results[cell])

    names, said = {"sft": "SFT", "ppo": "PPO for the reward only", "self_training": "self-training"}, []
    for other, least in (("sft", 10), ("ppo", 10), ("self_training", 0)):
        for operands, margin in ((4, least), (5, 0)):
            d, half = ahead(other, operands)
            because = f"The difference is {d:+.1f} ± {half:.1f} points (95% interval, paired over seeds)."
            there = 100 * average(other, f"vote {operands}")
            if there > 100 - margin:
                because += f" There is little room: {names[other]} is right on {there:.1f}%."
            by = f" by {margin} points" if margin else ""
            said.append(
                verdict(
                    f"GFlowNet tuning is ahead of {names[other]}{by} on {operands} operands",
                    d >= margin and d - half > 0,
                    because,
                )
            )
    p, q = ([average(cell, key) for key in KINDS] for cell in ("exact", "gflownet"))
    distance = average("gflownet", "total_variation")
    said.append(
        verdict(
            "GFlowNet tuning samples from the posterior",
            distance <= 0.05,
            f"Its TV is {distance:.2f}. Right chains have {p[0]:.2f} of the posterior's mass and {q[0]:.2f} of the "
            f"guide's, chains that are wrong about zeros only {p[1]:.2f} and {q[1]:.2f}, chains whose errors cancel "
            f"{p[2]:.2f} and {q[2]:.2f}. To know which errors cancel, a guide that reads only x would have to compute "
            "the sum itself, and this language model leaves that to the calculator.",
        )
    )
    return said


STUDY = Study("arithmetic", "Arithmetic: chains of thought with a calculator", tuple(CELLS), run, report)
