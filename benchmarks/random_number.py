"""The random number between 0 and 100: every method's distribution beside the target, and the bars to look at.

    python -m benchmarks.random_number --seeds 1 --out docs/random_number

All trained guides get the same number of steps and of draws a step. PPO's reward is the model's: with the matched KL
its optimum is the target, without it any valid number is as good as any other and nothing keeps the spread.
Supervised fine-tuning is told the numbers that the language model draws and that are valid. Importance sampling has no
density; its weighted draws are its answer. One JSON file a method and seed is kept under --runs.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lmppl import LanguageModel
from lmppl.inference import Importance, PolicyGradient, Posterior, SupervisedFineTuning, Trainer
from lmppl.inference.files import save_figure, write_atomically
from lmppl.models import Experiment, RandomNumber
from lmppl.models.random_number import FIXED_RECIPE, experiment, number_in

METHODS = ("GFlowNet", "PPO, matched KL", "PPO, reward only", "supervised", "importance sampling", "language model")
PPO_RATE = 3e-4  # several updates on the same draws
DRAWS = 4096  # of importance sampling


def trainer(name: str, e: Experiment, told: torch.Tensor) -> tuple[Trainer, Any]:
    """The method and its batches."""
    if name == "GFlowNet":
        return e.gflownet(), e.batches
    rate = PPO_RATE if name.startswith("PPO") else e.recipe.learning_rate
    optimizer = torch.optim.AdamW(e.guide_lm.trainable_parameters(), lr=rate)
    if name == "supervised":
        n = e.recipe.particles

        def batches(step: int) -> tuple[Any, ...]:
            a, b = e.batches(step)
            generator = torch.Generator().manual_seed(step)
            return a.expand(n), b.expand(n), {"z": told[torch.randint(len(told), (n,), generator=generator)]}

        return SupervisedFineTuning(e.model, e.guide, optimizer=optimizer), batches
    matched = {"reward": "likelihood", "kl": 1.0} if name == "PPO, matched KL" else {"reward": "joint", "kl": 0.0}
    options = {"num_particles": e.recipe.particles, "floor": 18.0}
    return PolicyGradient(e.model, e.guide, optimizer=optimizer, algorithm="ppo", **matched, **options), e.batches


@torch.no_grad()
def valid_draws(e: Experiment, count: int) -> torch.Tensor:
    """Valid answers of the language model, (n, L)."""
    drawn = Importance(e.model, num_particles=count).run(*e.test)
    return drawn.samples["z"][drawn.log_weights[:, 0] > -torch.inf, 0]


@torch.no_grad()
def probabilities(e: Experiment, lm: LanguageModel, exact: Posterior) -> dict[int, float]:
    """What a language model gives every valid number."""
    values = exact.samples["z"][exact.log_weights[:, 0] > -torch.inf]  # (number, 1, L)
    q = RandomNumber(e.lm).completion(lm, *e.test).log_prob(values)[:, 0].exp()
    return {number_in(s): p for s, p in zip(e.lm.decode(values[:, 0]), q.tolist(), strict=True)}


def divergences(q: dict[int, float], target: dict[int, float]) -> dict[str, float | None]:
    """KL(target || q), and KL(q(. | valid) || target); the share of q that is valid."""
    p = torch.tensor([target[n] for n in sorted(target)], dtype=torch.float64)
    of_q = torch.tensor([q.get(n, 0.0) for n in sorted(target)], dtype=torch.float64)
    valid = of_q.sum()
    forward = (p * (p / of_q).log()).sum().item()
    among = of_q / valid
    reverse = torch.where(among > 0, among * (among / p).log(), torch.zeros_like(p)).sum().item()
    return {
        "KL(target||q)": forward if forward < float("inf") else None,
        "KL(q(.|valid)||target)": reverse,
        "valid": valid.item(),
    }


def measure(name: str, seed: int, target: str, steps: int, runs: Path) -> dict[str, Any]:
    """One method, trained and held against the exact target; kept in a file."""
    path = runs / f"{target} {name} {steps} {seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    torch.manual_seed(seed)
    e = experiment(seed=seed, target=target, recipe=replace(FIXED_RECIPE, steps=steps))
    assert e.exact is not None
    exact = e.exact.run(*e.test)
    truth = {number_in(s): p for s, p in exact.table("z", 0) if p > 0}
    tokens = 0
    if name == "importance sampling":
        drawn = Importance(e.model, num_particles=DRAWS).run(*e.test)
        q = {number_in(s): p for s, p in drawn.table("z", 0) if p > 0}
    else:
        if name != "language model":
            method, batches = trainer(name, e, valid_draws(e, DRAWS) if name == "supervised" else torch.empty(0))
            method.fit(batches, steps, seed=seed, progress=False)
            tokens = method.training_tokens
        q = probabilities(e, e.lm if name == "language model" else e.guide_lm, exact)
    found = {"name": name, "seed": seed, "target": target, "steps": steps, "tokens": tokens, "q": q}
    found |= divergences(q, truth)
    write_atomically(path, json.dumps(found).encode())
    return json.loads(path.read_text())


def table(runs: list[dict[str, Any]]) -> str:
    """Means over seeds, as Markdown."""
    lines = ["| method | KL(target‖q) | KL(q(·\\|valid)‖target) | valid | training tokens |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(r["name"] for r in runs):
        same = [r for r in runs if r["name"] == name]

        def mean(key: str, of: list[dict[str, Any]] = same) -> str:
            values = [r[key] for r in of]
            return "infinite" if None in values else f"{sum(values) / len(values):.3g}"

        valid = f"{100 * sum(r['valid'] for r in same) / len(same):.2f}%"
        tokens = f"{round(sum(r['tokens'] for r in same) / len(same)):,}"
        lines.append(f"| {name} | {mean('KL(target||q)')} | {mean('KL(q(.|valid)||target)')} | {valid} | {tokens} |")
    return "\n".join(lines) + "\n"


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """A row of bars a method, of its first seed: the probability of every number; the line is uniform."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["name"] for r in runs))
    figure = Figure(figsize=(8, 1.3 * len(names)), layout="constrained")
    for axis, name in zip(figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0], names, strict=True):
        q = next(r["q"] for r in runs if r["name"] == name)
        axis.bar([int(n) for n in q], list(q.values()), width=0.9)
        axis.axhline(1 / 101, lw=0.8, color="k")
        axis.set_title(name, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("uniform", "valid"), default="uniform")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("out/random_number"))
    parser.add_argument("--out", type=Path, default=Path("docs/random_number"), help="the picture, without .png")
    a = parser.parse_args()
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    a.runs.mkdir(parents=True, exist_ok=True)
    runs = [measure(name, seed, a.target, a.steps, a.runs) for name in METHODS for seed in range(a.seeds)]
    plot(runs, a.out.with_suffix(".png"))
    print(table(runs))


if __name__ == "__main__":
    main()
