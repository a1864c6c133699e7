"""Tempered continuation against the usual decoding: likelihood under the base language model, against diversity.

    python -m benchmarks.continuation --out out/continuation    # the same command resumes

On the embedded story LM a guide is trained for each temperature, and one for several together; each is held against the
exact target p(z|x)^(1/T) of unseen prompts.  Beside them greedy, beam, diverse beam, nucleus and token temperature.
Every log-likelihood is the base model's, whoever wrote the text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from lmppl.distributions import Completion
from lmppl.inference.compare.quality import density_quality
from lmppl.inference.files import save_figure, write_atomically
from lmppl.models import Experiment, continuation, decoding

LIMIT = {"max_tokens": continuation.EMBEDDED_LONGEST}
TOKEN_TEMPERATURES, TOP_P = (1.0, 0.9, 0.8, 0.5, 0.25), (0.95, 0.9, 0.8, 0.5)
PENALTIES = (0.5, 2.0)
FAR = 3.0  # nats below the best: in the table, not in the picture


def measure(experiment: Experiment, family: str, setting: str, z: Tensor, tv: float | None = None) -> dict[str, Any]:
    """A row: texts z (n, B, E) for the test prompts."""
    log_p = decoding.log_likelihood(experiment.lm, experiment.test[0], z, **LIMIT)
    repeated = bool((z == z[:1]).all())
    return {
        "family": family, "setting": setting, "draws": len(z), "prompts": z.shape[1],
        "log_likelihood": float(log_p.mean()), "se": 0.0 if repeated else float(log_p.std() / log_p.numel() ** 0.5),
        "distinct": float(decoding.distinct(z).mean()), "distance": float(decoding.edit_distance(z).mean()), "tv": tv,
    }  # fmt: skip


def usual(experiment: Experiment, n: int) -> list[dict[str, Any]]:
    """The usual decoding methods."""
    lm, x = experiment.lm, experiment.test[0]
    rows = [measure(experiment, "greedy", "", decoding.generate(lm, x, n, **LIMIT))]
    z = decoding.generate(lm, x, n, num_beams=n, length_penalty=0.0, **LIMIT)
    rows.append(measure(experiment, "beam", f"{n} beams", z))
    for penalty in PENALTIES:
        z = decoding.beams(lm, x, n, groups=n, penalty=penalty, **LIMIT)
        rows.append(measure(experiment, "diverse beam", f"{n} groups, penalty {penalty:g}", z))
    for p in TOP_P:
        z = decoding.generate(lm, x, n, do_sample=True, top_p=p, **LIMIT)
        rows.append(measure(experiment, "nucleus", f"p = {p:g}", z))
    for t in TOKEN_TEMPERATURES:
        z = decoding.generate(lm, x, n, do_sample=True, temperature=t, **LIMIT)
        rows.append(measure(experiment, "token temperature", f"T = {t:g}", z))
    return rows


def tempered(temperature: float, n: int, steps: int, seed: int) -> list[dict[str, Any]]:
    """The exact target, a guide trained for it, and two untrained densities, at one temperature."""
    experiment = continuation.experiment(temperature=temperature, seed=seed)
    lm, args = experiment.lm, experiment.test
    assert experiment.exact is not None
    exact = experiment.exact.run(*args)
    experiment.gflownet().fit(experiment.batches, steps, seed=seed, progress=False)

    def token_temperature(x: Tensor, T: Tensor) -> Tensor:
        with pyro.plate("prompts", len(x)):
            return pyro.sample("z", Completion(lm, x, stop=".", temperature=T, **LIMIT))

    def distance(program: Any, arguments: tuple[Tensor, ...]) -> float:
        return float(density_quality(exact, program, arguments, {}).total_variation.mean())

    torch.manual_seed(seed)
    drawn = experiment.gflownet().run(*args, num_particles=n).samples["z"]
    setting = f"T = {temperature:g}"
    rows = [
        measure(experiment, "exact target", setting, exact.resample(n, "multinomial").samples["z"], 0.0),
        measure(experiment, "GFlowNet", setting, drawn, distance(experiment.guide, args)),
    ]
    rows[0] |= {
        "lm_tv": float((0.5 * (exact.log_prior.softmax(0) - exact.probabilities).abs().sum(0)).mean()),
        "token_temperature_tv": distance(token_temperature, args),
        "unexplored": float(exact.unexplored.max()),
    }  # fmt: skip
    return rows


def conditioned(temperatures: tuple[float, ...], n: int, steps: int, seed: int) -> list[dict[str, Any]]:
    """One guide that reads its temperature, measured at each."""
    experiment = continuation.experiment(temperature=temperatures, seed=seed)
    experiment.gflownet().fit(experiment.batches, steps, seed=seed, progress=False)
    assert experiment.exact is not None
    rows = []
    for t in temperatures:
        args = (experiment.test[0], torch.full_like(experiment.test[1], t))
        exact = experiment.exact.run(*args)
        tv = float(density_quality(exact, experiment.guide, args, {}).total_variation.mean())
        torch.manual_seed(seed)
        z = experiment.gflownet().run(*args, num_particles=n).samples["z"]
        rows.append(measure(experiment, "GFlowNet given T", f"T = {t:g}", z, tv))
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Two tables: every method's texts, and how far each density is from the target."""
    lines = ["| method | setting | log p(z given x) | distinct | edit distance | TV to the target |",
             "|---|---|---:|---:|---:|---:|"]  # fmt: skip
    for r in rows:
        tv = "" if r["tv"] is None else f"{r['tv']:.3f}"
        likelihood = f"{r['log_likelihood']:.2f} ± {r['se']:.2f}"
        lines.append(
            f"| {r['family']} | {r['setting']} | {likelihood} | {r['distinct']:.2f} | {r['distance']:.2f} | {tv} |"
        )
    lines += ["", "| target | the LM itself | token temperature T | GFlowNet |", "|---|---:|---:|---:|"]
    guides = {r["setting"]: r["tv"] for r in rows if r["family"] == "GFlowNet"}
    for r in rows:
        if "lm_tv" in r:
            lines.append(
                f"| {r['setting']} | {r['lm_tv']:.3f} | {r['token_temperature_tv']:.3f} | {guides[r['setting']]:.3f} |"
            )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Mean log-likelihood against diversity: one line a family, up and to the right is better."""
    from matplotlib.figure import Figure

    best = max(r["log_likelihood"] for r in rows)
    far = [r for r in rows if r["log_likelihood"] < best - FAR]
    rows = [r for r in rows if r not in far]
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axis = figure.subplots()
    markers = dict(zip(dict.fromkeys(r["family"] for r in rows), "sPXDov^*", strict=False))
    for family, marker in markers.items():
        mine = sorted((r for r in rows if r["family"] == family), key=lambda r: r["distance"])
        axis.errorbar(
            [r["distance"] for r in mine], [r["log_likelihood"] for r in mine], yerr=[r["se"] for r in mine],
            marker=marker, ms=5, lw=0.9, elinewidth=0.7, alpha=0.85, label=family,
        )  # fmt: skip
    axis.set(xlabel="mean normalised edit distance between a prompt's texts", ylabel="mean log p(z | x), nats")
    if far:
        below = "; ".join(f"{r['family']}, {r['setting']}: {r['log_likelihood']:.1f}" for r in far)
        axis.set_title(f"not shown, below: {below}", fontsize=7)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/continuation"))
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.8, 0.25, 0.5, 0.95, 0.9, 0.85])
    parser.add_argument("--draws", type=int, default=32, help="texts for each prompt")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each guide")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    file = a.out / "continuation.json"
    settings = {"steps": a.steps, "seed": a.seed, "draws": a.draws}
    saved = json.loads(file.read_text()) if file.exists() else {}
    stages: dict[str, Any] = saved.get("stages", {}) if saved.get("settings") == settings else {}
    work: dict[str, Callable[[], list[dict[str, Any]]]] = {"usual": lambda: usual(continuation.experiment(), a.draws)}
    for t in a.temperatures:
        work[f"T = {t:g}"] = partial(tempered, t, a.draws, a.steps, a.seed)
    work["given T"] = partial(conditioned, continuation.TEMPERATURES, a.draws, a.steps, a.seed)
    for name, stage in work.items():
        if name not in stages:
            torch.manual_seed(a.seed)
            stages[name] = stage()
            write_atomically(file, json.dumps({"settings": settings, "stages": stages}, indent=1).encode())
            print(f"{name}: done", flush=True)
    rows = [row for stage in stages.values() for row in stage]
    families = list(dict.fromkeys(r["family"] for r in rows))
    rows.sort(key=lambda r: families.index(r["family"]))
    write_atomically(a.out / "continuation.md", markdown(rows).encode())
    plot(rows, a.out / "continuation.png")
    print(markdown(rows))


if __name__ == "__main__":
    main()
