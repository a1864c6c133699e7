"""The random number (Hu et al. 2024, section 2): every method's distribution over 0..100 beside the target.

All trained guides get the same number of steps and of draws a step, and the same adapter.  PPO's reward is the model's:
with the matched KL its optimum is the target, without it any valid number is as good as any other and nothing keeps the
spread.  Supervised fine-tuning is told the numbers that the language model draws and that are valid.  Importance
sampling has no density; its weighted draws are its answer.  On unseen bounds a row of maximum likelihood, told exact
uniform draws for the training pairs, says what the same guide learns from the answers themselves in as many steps, each
of a quarter of the draws.
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

from .study import Figures, Results, Study, markdown, mean_of, spread, verdict
from .targets import ppo

GFLOWNET, VALID, BOUNDS = "GFlowNet", "GFlowNet, valid", "GFlowNet, unseen bounds"
LIKELIHOOD = "maximum likelihood, unseen bounds"
MATCHED, REWARD, SUPERVISED = "PPO, matched KL", "PPO, reward only", "supervised"
WEIGHTED, PRIOR = "importance sampling", "language model"
CELLS = (GFLOWNET, MATCHED, REWARD, SUPERVISED, WEIGHTED, PRIOR, VALID, BOUNDS, LIKELIHOOD)
DRAWS = 4096  # of importance sampling
SHORT: dict[str, Any] = {"steps": 15, "particles": 64}  # for tests


def run(cell: str, seed: int, short: bool) -> Figures:
    """Train one method and hold it against the exact target."""
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
    """Train the guide by the method; the tokens that it took."""
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
    """The log-probability that a language model gives every valid number, (b - a + 1,)."""
    numbers = base.encode([f"{n}." for n in range(pair.a, pair.b + 1)])[:, None]
    return RandomNumber(base).completion(lm, *tensors([pair])).log_prob(numbers)[:, 0].double()


def log_target(lm: LanguageModel, pair: Bounds, target: str) -> Tensor:
    """The exact posterior of every valid number, (b - a + 1,)."""
    log_p = log_probs(lm, lm, pair)
    return (log_p if target == "valid" else torch.zeros_like(log_p)).log_softmax(0)


def divergences(log_p: Tensor, log_q: Tensor) -> Figures:
    """KL(target || q), nats, null where infinite; KL(q(. | valid) || target); the share of q that is valid."""
    among = log_q.log_softmax(0)
    reverse = torch.where(among > -torch.inf, among.exp() * (among - log_p), 0.0).sum()
    forward = (log_p.exp() * (log_p - log_q)).sum().item()
    return {
        "forward": forward if math.isfinite(forward) else None,
        "reverse": reverse.item(),
        "valid": log_q.exp().sum().item(),
    }


def report(results: Results) -> str:
    """The table, and a sentence a claim."""

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
    text = "Target: uniform on 0..100; KL in nats, exact.\n\n" + markdown(header, paper + rows(uniform) + optimum)
    text += "\nTarget: the language model conditioned on validity.\n\n" + markdown(header, rows((VALID,)) + optimum)
    text += "\nTarget: uniform between bounds that no training prompt had; means over 16 test pairs.\n\n"
    text += markdown(header, rows((BOUNDS, LIKELIHOOD)) + optimum) + "\n"

    def worst(cell: str, key: str = "forward") -> float:
        return max(math.inf if r[key] is None else r[key] for r in results[cell])

    def least(cell: str) -> float:
        return min(r["valid"] for r in results[cell])

    prior, far = worst(PRIOR), mean(r["reverse"] for r in results[REWARD])
    text += verdict(
        "The language model's numbers are far from uniform (KL 3.37)", prior > 1,
        f"Here {prior:.2f}, by the corpus's design.",
    )  # fmt: skip
    text += verdict(
        "After GFlowNet tuning the KL is 9.75e-5 (here: at most 1e-4, and 99.5% valid, for every seed)",
        worst(GFLOWNET) <= 1e-4 and least(GFLOWNET) >= 0.995,
        f"Largest KL {worst(GFLOWNET):.1e}, least valid {100 * least(GFLOWNET):.3f}%.",
    )  # fmt: skip
    text += verdict(
        "PPO learns to be valid and stays skewed", least(REWARD) > 0.95 and far > 0.5,
        f"For the reward alone {100 * least(REWARD):.2f}% valid or more, among the valid a KL of {far:.2f}; "
        f"with the KL penalty that matches the target it is {worst(MATCHED):.2g} at most.",
    )  # fmt: skip
    text += verdict(
        "It carries over to unseen bounds (ours: KL at most 0.01, and 99.5% valid)",
        worst(BOUNDS) <= 0.01 and least(BOUNDS) >= 0.995,
        f"Largest mean KL of a seed {worst(BOUNDS):.4f}, least valid {100 * least(BOUNDS):.2f}%; maximum likelihood on "
        f"exact draws in as many steps, with a quarter of the draws: {worst(LIKELIHOOD):.4f}.",
    )  # fmt: skip
    return text


def plot(results: Results, path: Path) -> None:
    """A row of bars a method, of its first seed: the probability of every number; the line is uniform."""
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
