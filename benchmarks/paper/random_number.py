"""The random number (Hu et al. 2024, section 2): every method's distribution over 0..100, compared with the target.

All trained guides have the same adapter, the same number of steps, and the same number of draws per step.  PPO's reward
is the model's.  With the matched KL its optimum is the target.  Without it all valid numbers are equally good, and
nothing keeps the distribution wide.  Supervised fine-tuning learns from valid numbers that the language model drew.
Importance sampling has no density: its weighted draws are measured instead.  On unseen bounds, the row of maximum
likelihood shows what the same guide learns from exact uniform draws for the training pairs, in as many steps with a
quarter of the draws.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from lmppl import LanguageModel
from lmppl.embedded import Bounds
from lmppl.embedded.numbers import FIXED
from lmppl.files import replacing
from lmppl.inference import Importance, SupervisedFineTuning, Trainer
from lmppl.models import Experiment, RandomNumber
from lmppl.models.programs.random_number import number_in, tensors
from lmppl.models.random_number import BOUNDS_RECIPE, FIXED_RECIPE, experiment

from .study import Figures, Results, Study, markdown, mean_of, opening, spread, verdict
from .targets import ppo

GFLOWNET, VALID, BOUNDS = "GFlowNet", "GFlowNet, valid", "GFlowNet, unseen bounds"
LIKELIHOOD = "maximum likelihood, unseen bounds"
MATCHED, REWARD, SUPERVISED = "PPO, matched KL", "PPO, reward only", "supervised"
WEIGHTED, PRIOR = "importance sampling", "language model"
CELLS = (GFLOWNET, MATCHED, REWARD, SUPERVISED, WEIGHTED, PRIOR, VALID, BOUNDS, LIKELIHOOD)
DRAWS = 4096  # of importance sampling
SHORT: dict[str, Any] = {"steps": 15, "particles": 64}  # for tests


def run(cell: str, seed: int, short: bool) -> Figures:
    """Train one method and compare it with the exact target."""
    unseen, target = cell in (BOUNDS, LIKELIHOOD), "valid" if cell == VALID else "uniform"
    recipe = BOUNDS_RECIPE if unseen else FIXED_RECIPE
    recipe = replace(recipe, observations=min(4, recipe.observations), **SHORT) if short else recipe
    e = experiment(seed=seed, target=target, recipe=recipe, unseen=unseen)
    pairs = [Bounds(*pair) for pair in zip(*(bound.tolist() for bound in e.test), strict=True)]
    if cell == WEIGHTED:
        drawn = Importance(e.model, num_particles=DRAWS).run(*e.test)
        weights = {number_in(answer): p for answer, p in drawn.table("z", 0)}
        log_q = [torch.tensor([weights.get(n, 0.0) for n in range(FIXED.a, FIXED.b + 1)], dtype=torch.float64).log()]
        tokens = 0
    else:
        tokens = 0 if cell == PRIOR else train(cell, e, seed)
        log_q = [log_probs(e.lm, e.lm if cell == PRIOR else e.guide_lm, pair) for pair in pairs]
    log_p = [log_target(e.lm, pair, target) for pair in pairs]
    figures = [divergences(p, q) for p, q in zip(log_p, log_q, strict=True)]
    found: Figures = {key: mean_of([f[key] for f in figures]) for key in figures[0]}
    found |= {
        "tokens": tokens,
        "largest": max((f["forward"] for f in figures), key=lambda x: math.inf if x is None else x),
    }
    return found if unseen else found | {"q": log_q[0].exp().tolist()}


def train(cell: str, e: Experiment, seed: int) -> int:
    """Train the guide by the method, and return how many tokens that took."""
    method: Trainer
    batches: Any = e.batches
    if cell in (MATCHED, REWARD):
        method = ppo(e, cell == MATCHED, floor=18.0)
    elif cell in (SUPERVISED, LIKELIHOOD):
        method = SupervisedFineTuning(e.model, e.guide, optimizer=e.optimizer())
        told = valid_draws(e, DRAWS) if cell == SUPERVISED else None

        def batches(step: int) -> tuple[Any, ...]:
            draws = e.recipe.particles // (4 if told is None else 1)
            a, b = (bound.cpu().repeat_interleave(draws) for bound in e.batches(step))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            if told is not None:
                return a, b, {"z": told[torch.randint(len(told), a.shape, generator=generator)]}
            n = a + (torch.rand(a.shape, generator=generator) * (b - a + 1)).long()
            return a, b, {"z": e.lm.encode([f"{m}." for m in n.tolist()])}
    else:
        method = e.gflownet()
    method.fit(batches, e.recipe.steps, seed=seed, progress=False)
    return method.training_tokens


@torch.no_grad()
def valid_draws(e: Experiment, count: int) -> Tensor:
    """Valid answers of the language model, (n, L)."""
    drawn = Importance(e.model, num_particles=count).run(*e.test)
    return drawn.samples["z"][drawn.log_weights[:, 0] > -torch.inf, 0]


@torch.no_grad()
def log_probs(base: LanguageModel, lm: LanguageModel, pair: Bounds) -> Tensor:
    """The log-probability that a language model gives to every valid number, (b - a + 1,)."""
    numbers = base.encode([f"{n}." for n in range(pair.a, pair.b + 1)])[:, None]
    return RandomNumber(base).completion(lm, *tensors([pair])).log_prob(numbers)[:, 0].double()


def log_target(lm: LanguageModel, pair: Bounds, target: str) -> Tensor:
    """The exact log-probability of every valid number under the target, (b - a + 1,)."""
    log_p = log_probs(lm, lm, pair)
    return (log_p if target == "valid" else torch.zeros_like(log_p)).log_softmax(0)


def divergences(log_p: Tensor, log_q: Tensor) -> Figures:
    """KL(target || q), nats, None if infinite; KL(q(. | valid) || target); the mass of q on valid numbers."""
    among = log_q.log_softmax(0)
    reverse = torch.where(among > -torch.inf, among.exp() * (among - log_p), 0.0).sum()
    forward = (log_p.exp() * (log_p - log_q)).sum().item()
    return {
        "forward": forward if math.isfinite(forward) else None,
        "reverse": reverse.item(),
        "valid": log_q.exp().sum().item(),
    }


QUESTION = "Can a language model be tuned to draw random numbers from a given distribution?"
SETTING = (
    "A prompt asks for a random integer between two bounds. An answer is valid if it is a number between them, written "
    "without leading zeros."
)
COLUMNS = {
    "KL(target‖q)": "Kullback-Leibler divergence between the target and the method's distribution q, nats, exact; "
    "infinite if q gives no mass to some valid number",
    "KL(q(·|valid)‖target)": "the divergence in the other direction, for q restricted to valid answers, nats",
    "valid": "mass of q on valid answers",
    "training tokens": "tokens that the network read during training",
}


def report(results: Results) -> str:
    """The tables and the claims."""

    def rows(cells: tuple[str, ...]) -> list[list[str]]:
        return [
            [
                cell,
                spread(results[cell], "forward", 4),
                spread(results[cell], "reverse", 4),
                spread(results[cell], "valid", 2, 100) + "%",
                f"{round(mean(r['tokens'] for r in results[cell])):,}",
            ]
            for cell in cells
        ]

    header = ("method", "KL(target‖q)", "KL(q(·\\|valid)‖target)", "valid", "training tokens")
    paper = [["the paper's language model", "3.37", "", "", ""], ["the paper's GFlowNet", "0.0000975", "", "", ""]]
    optimum = [["exact optimum", "0", "0", "100%", ""]]
    uniform = (PRIOR, GFLOWNET, MATCHED, REWARD, SUPERVISED, WEIGHTED)
    text = opening(QUESTION, f"{SETTING} The importance sampler has {DRAWS:,} weighted draws.", COLUMNS)
    text += "The target of the first table is uniform on 0..100:\n\n" + markdown(
        header, paper + rows(uniform) + optimum
    )
    text += "\nThe target is the language model conditioned on validity:\n\n" + markdown(
        header, rows((VALID,)) + optimum
    )
    text += "\nThe target is uniform between two bounds; means over 16 pairs of bounds that no training prompt had:\n\n"
    text += markdown(header, rows((BOUNDS, LIKELIHOOD)) + optimum) + "\n"

    def worst(cell: str, key: str = "forward") -> float:
        return max(math.inf if r[key] is None else r[key] for r in results[cell])

    def least(cell: str) -> float:
        return min(r["valid"] for r in results[cell])

    prior, far = worst(PRIOR), mean(r["reverse"] for r in results[REWARD])
    text += verdict(
        "the language model's numbers are far from uniform (the paper: KL 3.37)", prior > 1,
        f"The KL is {prior:.2f}; the corpus was designed so.",
    )  # fmt: skip
    text += verdict(
        "after GFlowNet tuning the KL is at most 1e-4 and 99.5% is valid, for every seed (the paper: KL 9.75e-5)",
        worst(GFLOWNET) <= 1e-4 and least(GFLOWNET) >= 0.995,
        f"The largest KL of a seed is {worst(GFLOWNET):.1e}, the smallest valid mass {100 * least(GFLOWNET):.3f}%.",
    )  # fmt: skip
    text += verdict(
        "PPO for the reward only learns to be valid and stays far from uniform", least(REWARD) > 0.95 and far > 0.5,
        f"At least {100 * least(REWARD):.2f}% is valid, and the KL of the valid answers is {far:.2f}. With the matched "
        f"KL penalty, KL(target‖q) is at most {worst(MATCHED):.2g}.",
    )  # fmt: skip
    text += verdict(
        "the GFlowNet generalises to unseen bounds (our claim: KL at most 0.01 and 99.5% valid)",
        worst(BOUNDS) <= 0.01 and least(BOUNDS) >= 0.995,
        f"The largest mean KL of a seed is {worst(BOUNDS):.4f}, the smallest valid mass {100 * least(BOUNDS):.2f}%. "
        f"Maximum likelihood on exact draws, with as many steps and a quarter of the draws, has "
        f"{worst(LIKELIHOOD):.4f}.",
    )  # fmt: skip
    return text


def plot(results: Results, path: Path) -> None:
    """The probability of every number for each method, first seed; the line is the uniform distribution."""
    from matplotlib.figure import Figure

    cells = [cell for cell, runs in results.items() if "q" in runs[0]]
    figure = Figure(figsize=(8, 1.3 * len(cells)), layout="constrained")
    for axis, cell in zip(figure.subplots(len(cells), 1, sharex=True), cells, strict=True):
        q = results[cell][0]["q"]
        axis.bar(range(FIXED.a, FIXED.b + 1), q, width=0.9)
        axis.axhline(1 / len(q), lw=0.8, color="k")
        axis.set_title(cell, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=120)


STUDY = Study("random_number", "The random number", CELLS, run, report, plot)
