"""Subjectivity (Hu et al. 2024, section 4.3): labels by way of a latent reason, from 10, 20 or 50 examples.

Each seed draws its own examples, the same for every method: six sets of 10, two of 20 and two of 50; a control takes
four of the sets of 10.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from statistics import mean

import peft
import torch
from torch import Tensor

from lmppl import LanguageModel, embedded
from lmppl.embedded import Sentence
from lmppl.embedded.subjectivity import IDLE
from lmppl.inference import GFlowNet, Prediction, VariationalEM
from lmppl.models import Recipe
from lmppl.models.programs.subjectivity import Subjectivity, allowed_words
from lmppl.models.uncertainty import RATE, climb

from .study import Figures, Results, Study, markdown, paired, spread, verdict

DRAWS = {"10": 6, "20": 2, "50": 2, "control": 4}  # sets of examples a seed
BATCH = 10  # labels a step
PARTICLES = 16
SAMPLES = 32  # reasons a prediction averages over
TEST_SENTENCES = 300
ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
# Chosen on validation sentences and on examples that no seed of the study draws: docs/subjectivity.md.
LEARNING_RATE = RATE  # of all methods
SUPERVISED_STEPS, GUIDE_STEPS, E_STEPS = 100, 80, 2
ROUNDS = {10: 40, 20: 80, 50: 70}  # of EM
FEW_SHOT_TOKENS = 110  # of a context of 128
# Hu et al. 2024, Table 3: test accuracy in percent with 10, 20 and 50 examples.
PAPER = {
    "few-shot": ("61.3", "61.8", "65.8"),
    "supervised": ("64.3", "69.1", "89.7"),
    "GFlowNet": ("71.4", "81.1", "87.7"),
    "GFlowNet + EM": ("75.2", "78.7", "89.9"),
}


def examples(seed: int, count: int, draw: int) -> list[Sentence]:
    """The draw's labelled sentences."""
    return Random(f"{seed} {count} {draw}").sample(embedded.data("subjectivity", "train"), count)


class Setup:
    """One draw: the language model, the examples and the sentences to predict."""

    def __init__(
        self, seed: int, count: int, draw: int, *, short: bool = False, idle: bool = False, test: str = "test"
    ):
        torch.manual_seed(seed * 1009 + draw)
        self.lm = LanguageModel.embedded("subjectivity")  # fresh, so that adapters do not pile up
        self.allowed = allowed_words(self.lm, IDLE) if idle else "reasons"
        self.count, self.short, self.seed = count, short, seed * 100 + draw
        self.sentences = examples(seed, count, draw)
        self.x, self.y = self.task().encode(self.sentences)
        self.batches = Recipe(observations=BATCH).batches(self.x, self.y)
        unseen = embedded.data("subjectivity", test)[: 32 if short else TEST_SENTENCES]
        self.x_test, self.y_test = self.task().encode(unseen)

    def task(self, guide: LanguageModel | None = None, p: LanguageModel | None = None) -> Subjectivity:
        """Both factors, p(z | x) and p(y | x, z), are p's."""
        return Subjectivity(p or self.lm, guide, reads="x", max_tokens=2, allowed=self.allowed)

    def adapter(self) -> LanguageModel:
        return self.lm.with_adapter(peft.LoraConfig(**ADAPTER))

    def adam(self, lm: LanguageModel) -> torch.optim.Optimizer:
        return torch.optim.AdamW(lm.trainable_parameters(), lr=LEARNING_RATE)

    def steps(self, steps: int) -> int:
        return 2 if self.short else steps

    def climb(self, p: LanguageModel, steps: int, objective: Callable[[Tensor, Tensor], Tensor], clip: float) -> None:
        """Raise an objective (B,) of the batches over p's parameters, the learning rate decaying to zero."""
        climb(p, objective, self.batches, steps, clip)

    # -- measures ------------------------------------------------------------------------------------------------------

    def accuracy(self, probabilities: Tensor) -> float:
        """Of (C, B)."""
        return (probabilities.argmax(0) == self.y_test).float().mean().item()

    def judged(self, task: Subjectivity, sampler: str) -> Figures:
        """Accuracy by averaging over reasons and by vote."""
        found: Prediction = task.predict(self.x_test, sampler, SAMPLES)
        return {"average": self.accuracy(found.probabilities), "vote": self.accuracy(found.vote)}

    @torch.no_grad()
    def fit_of(self, task: Subjectivity, guide: bool) -> Figures:
        """Nats a label, exactly: log p(y | x), the guide's ELBO and the gap between them."""
        log_joint = task.log_joint(self.x, self.y).double()  # (156, B)
        likelihood = log_joint.logsumexp(0).mean().item()
        if not guide:
            return {"likelihood": likelihood}
        log_q = task.proposal(self.x).log_prob(task.prior(self.x).enumerate_support()).double()
        elbo = (log_q.exp() * (log_joint - log_q)).sum(0).mean().item()
        return {"likelihood": likelihood, "elbo": elbo, "gap": likelihood - elbo}


# -- methods -----------------------------------------------------------------------------------------------------------


def supervised(s: Setup) -> Figures:
    """An adapter trained on log p(y | x), no reason."""
    p = s.adapter()
    task = s.task(p=p)

    def log_p(x: Tensor, y: Tensor) -> Tensor:
        return task.log_direct(x).gather(-1, y[:, None])[:, 0]

    s.climb(p, s.steps(SUPERVISED_STEPS), log_p, math.inf)
    with torch.no_grad():
        accuracy = s.accuracy(task.log_direct(s.x_test).T)
        return {"average": accuracy, "vote": accuracy, "likelihood": log_p(s.x, s.y).mean().item()}


def gflownet(s: Setup, p: LanguageModel) -> tuple[Subjectivity, GFlowNet]:
    """A guide q(z | x) of the posteriors p(z | x, y) of the examples, p as it is."""
    q = s.adapter()
    task = s.task(q, p)
    trainer = GFlowNet(task.model, task.guide, optimizer=s.adam(q), num_particles=PARTICLES)
    trainer.fit(s.batches, s.steps(GUIDE_STEPS), progress=False, seed=s.seed)
    return task, trainer


def gflownet_em(s: Setup, task: Subjectivity, trainer: GFlowNet) -> list[Figures]:
    """Rounds of EM after it; each round's log, nats a label of its batch."""
    em = VariationalEM(
        task.model, task.guide, trainer, s.adam(task.lm), e_steps=E_STEPS, num_particles=PARTICLES, clip=1.0
    )
    found = em.fit(s.batches, s.steps(ROUNDS[s.count]), progress=False, seed=s.seed)
    keys = {"log_evidence": "likelihood", "elbo": "elbo", "gap": "gap"}
    return [{name: m[key] / BATCH for key, name in keys.items()} for m in found]


def exact_em(s: Setup) -> Subjectivity:
    """Gradient steps on log p(y | x), summed over all reasons: by Fisher's identity exact E-steps and M-steps."""
    p = s.adapter()
    task = s.task(p=p)
    s.climb(p, s.steps(ROUNDS[s.count]), task.log_likelihood, 1.0)
    return task


@torch.no_grad()
def prompting(s: Setup) -> Figures:
    """The language model as it is: plainly, with the examples that have room in its context, and by way of reasons."""
    task = s.task()
    shown = task.examples(s.sentences, FEW_SHOT_TOKENS)
    by_reasons = s.judged(task, "prior")
    return {
        "zero-shot": {"average": s.accuracy(task.log_direct(s.x_test).T)},
        "few-shot": {"average": s.accuracy(task.log_direct(s.x_test, shown).T), "shown": shown.count("\n")},
        "reasons": by_reasons,
    }


# -- the study ---------------------------------------------------------------------------------------------------------


def of_draw(seed: int, count: int, draw: int, *, short: bool = False, idle: bool = False) -> Figures:
    """Every method on one set of examples."""
    s = Setup(seed, count, draw, short=short, idle=idle)
    found = {} if idle else prompting(s)
    found["supervised"] = supervised(s)
    task, trainer = gflownet(s, s.adapter())
    found["GFlowNet"] = s.judged(task, "guide") | s.fit_of(task, guide=True)
    rounds = gflownet_em(s, task, trainer)
    prior = {f"prior {key}": value for key, value in s.judged(task, "prior").items()}
    found["GFlowNet + EM"] = s.judged(task, "guide") | prior | s.fit_of(task, guide=True) | {"rounds": rounds}
    exact = exact_em(s)
    found["exact EM"] = s.judged(exact, "prior") | s.fit_of(exact, guide=False)
    return found


def run(cell: str, seed: int, short: bool = False) -> Figures:
    """A list with an entry a draw, by method."""
    idle, count = cell == "control", 10 if cell == "control" else int(cell)
    draws = [of_draw(seed, count, d, short=short, idle=idle) for d in range(1 if short else DRAWS[cell])]
    return {method: [draw[method] for draw in draws] for method in draws[0]}


CELLS = tuple(DRAWS)
METHODS = {
    "zero-shot": "zero-shot, no reason",
    "few-shot": "few-shot, no reason",
    "reasons": "zero-shot by way of reasons",
    "supervised": "supervised",
    "GFlowNet": "GFlowNet",
    "GFlowNet + EM": "GFlowNet + EM",
    "exact EM": "exact EM (the optimum)",
}


def pooled(results: Results, cell: str, method: str) -> list[Figures]:
    """Every draw of every seed."""
    return [draw for seed in results[cell] for draw in seed[method]] if method in results[cell][0] else []


def difference(results: Results, cell: str, method: str, other: str = "supervised") -> tuple[float, float, str]:
    """Points of accuracy ahead, paired by draw, with the half-width of its 95% interval."""
    ours, theirs = ([100 * d["average"] for d in pooled(results, cell, m)] for m in (method, other))
    gain, half = paired(ours, theirs)
    return gain, half, f"{gain:+.1f} ± {half:.1f} points over {len(ours)} paired draws"


def rounds_of(draws: list[Figures]) -> str:
    """A table of some rounds, means over draws."""
    count = len(draws[0]["rounds"])
    shown = sorted({0, count // 6, count // 3, 2 * count // 3, count - 1})
    return markdown(
        ["round", *(str(r + 1) for r in shown)],
        [
            [key, *(f"{mean(d['rounds'][r][key] for d in draws):.3f}" for r in shown)]
            for key in ("likelihood", "elbo", "gap")
        ],
    )


def report(results: Results) -> str:
    """Accuracy by method and number of labels, the fit, and the claims."""
    rows = []
    for method, title in METHODS.items():
        row = [title]
        for i, cell in enumerate(CELLS):
            draws = pooled(results, cell, method)
            paper = PAPER[method][i] if method in PAPER and i < 3 else ""
            figure = spread(draws, "average", 1, 100) if draws else "-"
            row.append(f"{paper or '-'} / {figure}" if cell != "control" else figure)
        rows.append(row)
    table = markdown(["method", *(f"{c} labels: paper / ours" for c in CELLS[:3]), "control, 10 labels"], rows)
    votes = markdown(
        ["method, 10 labels", "by average", "by vote", "log p(y∣x), nats a label", "ELBO", "gap"],
        [
            [
                m,
                *(
                    spread(pooled(results, "10", m), k, d, f) if k in pooled(results, "10", m)[0] else "-"
                    for k, d, f in COLUMNS
                ),
            ]
            for m in ("supervised", "GFlowNet", "GFlowNet + EM", "exact EM")
        ],
    )
    em = pooled(results, "10", "GFlowNet + EM")
    by_prior = spread(em, "prior average", 1, 100)
    text = (
        "Test accuracy in percent on unseen sentences, standard deviation over draws of the examples in brackets. "
        "GFlowNet rows predict by reasons of the guide q(z|x), which never sees y of a test sentence, and exact EM by "
        f"those of p(z|x); every prediction averages over {SAMPLES} reasons. EM moves p(z|x) and p(y|x, z). In the "
        "control the reasons are words that say nothing.\n\n"
        f"{table}\n{votes}\nGFlowNet + EM predicts {by_prior} with reasons of p(z|x) instead. "
        f"The context has room for {mean(d['shown'] for d in pooled(results, '10', 'few-shot')):.0f} examples, at 20 "
        "and 50 labels too.\n\n"
    )
    at10, at50, control = (difference(results, c, "GFlowNet + EM") for c in ("10", "50", "control"))
    exact10, exact50, exact_control = (difference(results, c, "exact EM") for c in ("10", "50", "control"))
    against = difference(results, "10", "GFlowNet + EM", "GFlowNet")
    lag = [
        max(b["likelihood"] - a["likelihood"] for a, b in zip(*(pooled(results, c, m) for m in ENDS), strict=True))
        for c in CELLS[:3]
    ]
    text += (
        "GFlowNet + EM by round, 10 labels, nats a label; the likelihood is a bound by 16 particles:\n\n"
        + rounds_of(em)
        + "\n"
    )
    text += verdict(
        "GFlowNet + EM is ahead of supervised fine-tuning at 10 labels (hypothesis: by 5 points)",
        at10[0] - at10[1] > 0,
        f"{at10[2]}{'' if at10[0] >= 5 else ', less than 5'}; exact EM {exact10[2]}.",
    )
    text += verdict(
        "they are level at 50 labels", abs(at50[0]) <= max(at50[1], 2.0), f"{at50[2]}; exact EM {exact50[2]}."
    )
    text += verdict("EM adds to the GFlowNet alone at 10 labels", against[0] - against[1] > 0, f"{against[2]}.")
    text += verdict(
        "without information in the reason the advantage vanishes",
        control[0] - control[1] <= 0 and exact_control[0] - exact_control[1] <= 0,
        f"Control: {control[2]}; exact EM {exact_control[2]}.",
    )
    text += verdict(
        "GFlowNet + EM ends within 0.05 nats a label of exact EM",
        max(lag) <= 0.05,
        "Largest shortfall of log p(y|x) over draws: "
        + ", ".join(f"{x:+.3f} at {c}" for x, c in zip(lag, CELLS[:3], strict=True))
        + " labels.",
    )
    return text


ENDS = "GFlowNet + EM", "exact EM"
COLUMNS = (("average", 1, 100), ("vote", 1, 100), ("likelihood", 3, 1), ("elbo", 3, 1), ("gap", 3, 1))
STUDY = Study("subjectivity", "Subjectivity", CELLS, run, report)
