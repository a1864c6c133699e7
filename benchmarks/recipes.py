"""Which objective and recipe trains the infilling guide best? Successive halving at equal tokens, on unseen stories.

    python -m benchmarks.recipes --jobs 2 --out out/recipes.md

Every recipe trains on the same number of tokens scored (sampling, rewards and guide), with 3 seeds. The best four, by
mean total variation to the exact posterior of held-out stories, train again from scratch on twice the tokens. The best
two of these are compared with 5 seeds. The test stories are not used here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lmppl import files
from lmppl.inference import Objective, PooledVarGrad, SubTB, Tempered, VarGrad

STORIES = 16
ROUNDS = ((12, 3), (4, 3), (2, 5))  # recipes left, seeds

TEMPERED = Tempered(1.5, 0.25)
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "VarGrad": lambda: VarGrad(exploration=TEMPERED),
    "SubTB(1), all": lambda: SubTB(exploration=TEMPERED),
    "SubTB(1), 3": lambda: SubTB(prefixes=3, exploration=TEMPERED),
    "SubTB(0.9), all": lambda: SubTB(lam=0.9, exploration=TEMPERED),
    "pooled uniform, all": lambda: PooledVarGrad("uniform", exploration=TEMPERED),
    "pooled uniform, 3": lambda: PooledVarGrad("uniform", prefixes=3, exploration=TEMPERED),
    "pooled stop, all": lambda: PooledVarGrad(exploration=TEMPERED),
    "pooled stop, 3": lambda: PooledVarGrad(prefixes=3, exploration=TEMPERED),
}
# name: (objective, learning rate, observations, particles)
RECIPES: dict[str, tuple[str, float, int, int]] = {
    "VarGrad, 1e-3": ("VarGrad", 1e-3, 8, 16),
    "VarGrad, 3e-3": ("VarGrad", 3e-3, 8, 16),
    "VarGrad, 3e-3, 16 x 16": ("VarGrad", 3e-3, 16, 16),
    "SubTB(1), all, 3e-3": ("SubTB(1), all", 3e-3, 8, 16),
    "SubTB(1), 3, 3e-3": ("SubTB(1), 3", 3e-3, 8, 16),
    "SubTB(0.9), all, 3e-3": ("SubTB(0.9), all", 3e-3, 8, 16),
    "pooled uniform, all, 3e-3": ("pooled uniform, all", 3e-3, 8, 16),
    "pooled uniform, 3, 3e-3": ("pooled uniform, 3", 3e-3, 8, 16),
    "pooled stop, all, 1e-3": ("pooled stop, all", 1e-3, 8, 16),
    "pooled stop, all, 3e-3": ("pooled stop, all", 3e-3, 8, 16),
    "pooled stop, 3, 3e-3": ("pooled stop, 3", 3e-3, 8, 16),
    "pooled stop, 3, 3e-3, 16 x 16": ("pooled stop, 3", 3e-3, 16, 16),
}


def train(name: str, seed: int, tokens: int) -> dict[str, Any]:
    """Train one recipe from scratch for ``tokens``; its quality on validation stories."""
    torch.set_num_threads(1)
    import transformers

    from lmppl.inference.judging.quality import density_quality
    from lmppl.models import Recipe, infilling

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    objective, rate, observations, particles = RECIPES[name]
    recipe = Recipe(learning_rate=rate, observations=observations, particles=particles, objective=OBJECTIVES[objective])
    experiment = infilling.experiment(recipe=recipe, seed=seed)
    gflownet = experiment.gflownet()
    gflownet.step(*experiment.batches(0))  # what a step costs; undone below
    steps = max(1, tokens // gflownet.training_tokens)
    experiment = infilling.experiment(recipe=recipe, seed=seed)
    gflownet = experiment.gflownet()
    gflownet.fit(experiment.batches, steps, seed=seed, progress=False)
    assert experiment.exact is not None
    exact = experiment.exact.run(*experiment.held_out)
    quality = density_quality(exact, experiment.guide, experiment.held_out, {})
    return {
        "recipe": name, "seed": seed, "steps": steps, "tokens": gflownet.training_tokens,
        "tv": float(quality.total_variation.mean()), "kl": float(quality.forward_kl.mean()),
    }  # fmt: skip


def halve(budget: int, jobs: int, log: Path | None = None) -> list[list[dict[str, Any]]]:
    """The rounds' results, best recipe first."""
    names, rounds = list(RECIPES), []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for i, (keep, seeds) in enumerate(ROUNDS):
            names = names[:keep]
            runs = [pool.submit(train, name, seed, budget * 2**i) for name in names for seed in range(seeds)]
            results = [run.result() for run in runs]
            if log is not None:
                with log.open("a") as file:
                    file.writelines(json.dumps({"round": i, **r}) + "\n" for r in results)
            summary = []
            for name in names:
                tv = torch.tensor([r["tv"] for r in results if r["recipe"] == name])
                mine = [r for r in results if r["recipe"] == name]
                summary.append(
                    {"recipe": name, "seeds": seeds, "steps": mine[0]["steps"], "tokens": mine[0]["tokens"],
                     "tv": float(tv.mean()), "sd": float(tv.std()), "kl": sum(r["kl"] for r in mine) / len(mine)}
                )  # fmt: skip
            summary.sort(key=lambda r: r["tv"])
            names = [r["recipe"] for r in summary]
            rounds.append(summary)
    return rounds


def markdown(rounds: list[list[dict[str, Any]]]) -> str:
    """The rounds as tables."""
    lines = ["# Recipes", "", (__doc__ or "").strip(), ""]
    for i, summary in enumerate(rounds):
        lines += [f"## Round {i + 1}: {summary[0]['seeds']} seeds, about {summary[0]['tokens']:,} tokens each", "",
                  "| recipe | steps | mean TV | sd over seeds | KL(p,q) |", "|---|---:|---:|---:|---:|"]  # fmt: skip
        lines += [f"| {r['recipe']} | {r['steps']} | {r['tv']:.3f} | {r['sd']:.3f} | {r['kl']:.3f} |" for r in summary]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="a recipe's training tokens in round one")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/recipes.md"))
    parser.add_argument("--log", type=Path, default=None)
    arguments = parser.parse_args()
    rounds = halve(arguments.tokens, arguments.jobs, arguments.log)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    files.write(arguments.out, markdown(rounds).encode())
    print(markdown(rounds))


if __name__ == "__main__":
    main()
