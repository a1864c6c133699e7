"""Every algorithm on the embedded infilling task, at equal tokens scored, compared with the exact posterior.

    python -m benchmarks.algorithms --jobs 2 --out docs/algorithms.md

The network reads the same number of tokens for each trained guide (draws, rewards, likelihoods and gradients), on the
same training stories, with 16 particles and 8 stories per step if the method has particles. The learning rate is the
better of two on *validation* stories, chosen with another seed at half the budget. Then five seeds are trained from
scratch and measured on the test stories. Each sampler without training gets as many particles as cost the same as 64
draws of an untrained guide; "guide" there is VarGrad's. Every run is one file under --runs, so that the same command
continues an interrupted one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lmppl.engine.tuning import TUNING
from lmppl.files import replacing, write
from lmppl.inference import (
    SMC,
    DetailedBalance,
    Enumeration,
    GFlowNet,
    Importance,
    LocalSearch,
    MetropolisHastings,
    PolicyGradient,
    PooledVarGrad,
    Posterior,
    Prompting,
    Replay,
    ReweightedWakeSleep,
    SubTB,
    SupervisedFineTuning,
    Tempered,
    Trainer,
    TrajectoryBalance,
    VarGrad,
    compare,
    dreams,
    few_shot,
)
from lmppl.inference.judging.compare import Meter, particles_within
from lmppl.inference.judging.comparison import Comparison, Row, averaged
from lmppl.inference.judging.quality import density_quality
from lmppl.inference.posterior.algorithm import sized
from lmppl.models import Experiment, Recipe, infilling

RATES = 1e-3, 3e-3
PPO_RATES = 3e-4, 1e-3  # several updates on the same draws
SEEDS = 5
SELECTION_SEED = 1000
PARTICLES = 64
REPETITIONS = 4
POINTS = 5  # of a training curve

Make = Callable[[Experiment, torch.optim.Optimizer], Trainer]


def _gflownet(objective: Callable[[], Any], **options: Any) -> Make:
    return lambda e, optimizer: GFlowNet(e.model, e.guide, objective(), optimizer=optimizer, **options)


def _policy(**options: Any) -> Make:
    return lambda e, optimizer: PolicyGradient(e.model, e.guide, optimizer=optimizer, **options)


def _wake_sleep(wake: float, sleep: float) -> Make:
    return lambda e, optimizer: ReweightedWakeSleep(
        e.model, e.guide, optimizer=optimizer, wake=wake, sleep=sleep, simulate=dreams(e.model)
    )


TOLD = "supervised, told stories"
SERVES = "VarGrad"  # as the guide of samplers
# Objectives draw a quarter of their particles at temperature 1.5, unless they say otherwise.
TRAINED: dict[str, Make] = {
    "VarGrad": _gflownet(VarGrad),
    "VarGrad, on-policy": _gflownet(VarGrad, exploration=None),
    "VarGrad, replay": lambda e, o: GFlowNet(e.model, e.guide, optimizer=o, replay=Replay(capacity=64, fraction=0.25)),
    "VarGrad, local search": lambda e, o: GFlowNet(
        e.model, e.guide, optimizer=o, exploration=LocalSearch(Tempered(1.5, 0.25), moves=1, fraction=0.25)
    ),
    "pooled, by stop": _gflownet(PooledVarGrad),
    "pooled, uniform": _gflownet(lambda: PooledVarGrad("uniform")),
    "SubTB(1)": _gflownet(SubTB),
    "SubTB(1), 3 prefixes": _gflownet(lambda: SubTB(prefixes=3)),
    "detailed balance": _gflownet(DetailedBalance),
    "trajectory balance": _gflownet(TrajectoryBalance),
    "wake-sleep: wake": _wake_sleep(1.0, 0.0),
    "wake-sleep: sleep": _wake_sleep(0.0, 1.0),
    "REINFORCE, matched KL": _policy(),
    "PPO, matched KL": _policy(algorithm="ppo"),
    "PPO, reward only": _policy(algorithm="ppo", reward="joint", kl=0.0),
    TOLD: lambda e, optimizer: SupervisedFineTuning(e.model, e.guide, optimizer=optimizer),
}
SHOTS = 3


def rates(name: str) -> tuple[float, ...]:
    """The learning rates to choose from."""
    return PPO_RATES if name.startswith("PPO") else RATES


@cache
def _truth(split: str) -> tuple[Posterior, float]:
    """The exact posterior of a split's stories and its cost in tokens; once a process."""
    experiment = infilling.experiment()
    assert isinstance(experiment.exact, Enumeration)
    args = experiment.test if split == "test" else experiment.held_out
    exact, tokens, _ = Meter([experiment.lm.network])(lambda: experiment.exact.run(*args))
    return exact, tokens


def _quiet() -> None:
    import transformers

    torch.set_num_threads(1)
    TUNING.prompt_tokens = 0  # every method pays for the prompts that it reads, at every step
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def train(name: str, rate: float, seed: int, tokens: int, split: str) -> tuple[Experiment, Trainer, dict[str, Any]]:
    """Train one guide from scratch; where it got on the way: tokens and total variation on the split's stories."""
    experiment = infilling.experiment(recipe=Recipe(learning_rate=rate), seed=seed)
    optimizer = torch.optim.AdamW(experiment.guide_lm.trainable_parameters(), lr=rate)
    trainer = TRAINED[name](experiment, optimizer)
    batches = _told(experiment, seed) if name == TOLD else experiment.batches
    args = experiment.test if split == "test" else experiment.held_out
    exact, _ = _truth(split)
    # What a step costs is learnt on a guide of its own, which is then forgotten.
    trial = infilling.experiment(recipe=Recipe(learning_rate=rate), seed=seed)
    pilot = TRAINED[name](trial, torch.optim.AdamW(trial.guide_lm.trainable_parameters(), lr=rate))
    for step in range(3):
        pilot.step(*batches(step))
    steps = max(POINTS, round(3 * tokens / pilot.training_tokens))
    curve = []

    def watch(step: int, metrics: dict[str, float]) -> None:
        if (step + 1) % max(1, steps // POINTS) == 0 or step + 1 == steps:
            before = experiment.lm.network.tokens_scored
            tv = float(density_quality(exact, experiment.guide, args, {}).total_variation.mean())
            experiment.lm.network.tokens_scored = before
            curve.append((trainer.training_tokens, tv))

    trainer.fit(batches, steps, seed=seed, progress=False, callback=watch)
    return experiment, trainer, {"steps": steps, "tokens": trainer.training_tokens, "curve": curve}


def _told(experiment: Experiment, seed: int) -> Callable[[int], tuple[Any, ...]]:
    """Batches (x, y, {"z": what was told}) in the order of the other methods."""
    from lmppl import embedded

    stories = embedded.data("stories", "train")
    lm, size = experiment.lm, 8 * 16

    def batches(step: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed * 7919 + step)
        chosen = [stories[i] for i in torch.randint(len(stories), (size,), generator=generator)]
        x, y, z = (lm.encode([getattr(s, part) for s in chosen]) for part in "xyz")
        return x, y, {"z": z}

    return batches


def select(name: str, rate: float, tokens: int, runs: Path) -> dict[str, Any]:
    """Total variation on validation stories at half the budget."""
    return _kept(runs / f"select {name} {rate}.json", lambda: _select(name, rate, tokens))


def _select(name: str, rate: float, tokens: int) -> dict[str, Any]:
    _quiet()
    *_, found = train(name, rate, SELECTION_SEED, tokens // 2, "validation")
    return {"name": name, "rate": rate, "tv": found["curve"][-1][1], **found}


def measure(name: str, rate: float, seed: int, tokens: int, runs: Path) -> dict[str, Any]:
    """One seed of a trained guide on the test stories, and of the samplers that use it."""
    return _kept(runs / f"{name} {seed}.json", lambda: _measure(name, rate, seed, tokens))


def _measure(name: str, rate: float, seed: int, tokens: int) -> dict[str, Any]:
    _quiet()
    experiment, trainer, found = train(name, rate, seed, tokens, "test")
    exact, exact_tokens = _truth("test")
    algorithms: dict[str, Any] = {name: sized(trainer, PARTICLES)}
    if name == SERVES:
        model, guide = experiment.model, experiment.guide
        algorithms |= {
            "SMC, guide": SMC(model, guide, PARTICLES),
            "SMC, guide, flow twist": SMC(model, guide, PARTICLES, twist="flow"),
            "SMC, guide, flow, always": SMC(model, guide, PARTICLES, ess_threshold=1.0, twist="flow"),
            "Metropolis, guide": MetropolisHastings(
                model, guide, num_chains=16, num_samples=4, warmup=4, moves="independence"
            ),
        }
    rows = _rows(experiment, algorithms, seed, exact, exact_tokens)
    return {"name": name, "rate": rate, "seed": seed, "rows": rows, **found}


def untrained(seed: int, runs: Path) -> dict[str, Any]:
    """One seed of the algorithms that train nothing, at the tokens a query of a trained guide."""
    return _kept(runs / f"untrained {seed}.json", lambda: _untrained(seed))


def _untrained(seed: int) -> dict[str, Any]:
    _quiet()
    from lmppl import embedded

    experiment = infilling.experiment()
    model, args, lm = experiment.model, experiment.test, experiment.lm
    exact, exact_tokens = _truth("test")
    meter = Meter([lm.network])
    budget = meter(lambda: Importance(model, experiment.guide, PARTICLES).run(*args))[1] / len(args[0])
    shots = [({"x": s.x, "y": s.y}, s.z) for s in embedded.data("stories", "train")[:SHOTS]]
    asked = {
        "prompting, zero-shot": infilling.Infilling(lm, lm),
        "prompting, three shots": infilling.Infilling(lm, lm, template=few_shot(infilling.TEMPLATE, shots, "\n")),
    }
    samplers: dict[str, Any] = {
        "importance sampling, prior": Importance(model),
        "SMC, prior": SMC(model),
        "SMC, prior, stop twist": SMC(model, twist="stop"),
        "Metropolis, prior": MetropolisHastings(model, num_chains=16, num_samples=4, warmup=0),
    }
    samplers = {n: sized(a, particles_within(a, budget, meter, args=args)) for n, a in samplers.items()}
    algorithms = samplers | {n: Prompting(model, task.guide, PARTICLES) for n, task in asked.items()}
    return {"seed": seed, "rows": _rows(experiment, algorithms, seed, exact, exact_tokens)}


def _rows(
    experiment: Experiment, algorithms: dict[str, Any], seed: int, exact: Posterior, exact_tokens: float
) -> list[dict[str, Any]]:
    found = compare(
        experiment.model, algorithms, *experiment.test, exact=exact, exact_tokens=exact_tokens, seeds=[seed],
        repetitions=REPETITIONS,
    )  # fmt: skip
    return [asdict(row) for row in found.rows]


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.exists():
        write(path, json.dumps(make()).encode())
    return json.loads(path.read_text())


def table(runs: list[dict[str, Any]]) -> Comparison:
    """The rows of all seeds as one comparison: trained guides first, sorted by their mean total variation."""
    rows: dict[str, list[Row]] = {}
    for run in runs:
        for row in run["rows"]:
            if row["name"] in ("enumeration", f"exact posterior, {PARTICLES} draws"):
                rows[row["name"]] = [Row(**row)]
            elif not row["name"].startswith("exact"):
                rows.setdefault(row["name"], []).append(Row(**row))
    means = [averaged(same) for same in rows.values()]
    for mean, same in zip(means, rows.values(), strict=True):
        mean.sd.pop("break_even", None)
        if len({row.num_particles for row in same}) == 1:
            mean.num_particles = same[0].num_particles
    key = [(row.name.startswith(("exact", "enum")), row.density_tv is None, row.density_tv or row.draws_tv or 0.0)
           for row in means]  # fmt: skip
    order = sorted(range(len(means)), key=lambda i: key[i])
    return Comparison([means[i] for i in order])


def plot_training(runs: list[dict[str, Any]], path: Path) -> None:
    """Total variation of the density by training tokens, mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.4), layout="constrained")
    axis = figure.subplots()
    names = dict.fromkeys(run["name"] for run in runs)
    for i, name in enumerate(names):
        curves = torch.tensor([run["curve"][:POINTS] for run in runs if run["name"] == name])  # (seed, point, 2)
        tokens, tv = curves.mean(0).T
        axis.plot(tokens, tv, "osv^D"[i // 10] + "-", ms=3, lw=1, color=f"C{i % 10}", label=name)
    axis.set(xlabel="training tokens", ylabel="TV of the density to the exact posterior", yscale="log")
    axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=120)


def markdown(comparison: Comparison, runs: list[dict[str, Any]], picture: str) -> str:
    """The generated part of the page."""
    rates = {run["name"]: (run["rate"], run["steps"]) for run in runs}
    lines = [comparison.markdown(), f"![training curves]({picture})", "",
             "Learning rates, chosen on validation stories, and numbers of steps: "
             + "; ".join(f"{n} {r:g}, {s}" for n, (r, s) in rates.items()) + "."]  # fmt: skip
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- begin: python -m benchmarks.algorithms -->", "<!-- end -->"


def insert(page: str, generated: str) -> str:
    """The page with its generated part replaced; the text around it stays."""
    head, _, rest = page.partition(BEGIN)
    return f"{head.rstrip()}\n\n{BEGIN}\n\n{generated}\n{END}{rest.partition(END)[2]}".lstrip() + ("" if rest else "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=500_000, help="training tokens of each guide")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default=None, help="a choice, separated by semicolons, of trained guides")
    parser.add_argument("--rate", type=float, default=None, help="this learning rate; default: the better of two")
    parser.add_argument("--runs", type=Path, default=Path("out/algorithms"))
    parser.add_argument("--out", type=Path, default=Path("docs/algorithms.md"))
    a = parser.parse_args()
    a.runs.mkdir(parents=True, exist_ok=True)
    names = list(TRAINED) if a.only is None else [n.strip() for n in a.only.split(";")]
    with ProcessPoolExecutor(a.jobs, mp_context=get_context("spawn")) as pool:
        without = [pool.submit(untrained, seed, a.runs) for seed in range(a.seeds) if a.only is None]
        trials = [pool.submit(select, name, rate, a.tokens, a.runs) for name in names for rate in rates(name)
                  if a.rate is None]  # fmt: skip
        found = [trial.result() for trial in trials]
        best = {n: a.rate or min((f for f in found if f["name"] == n), key=lambda f: f["tv"])["rate"] for n in names}
        trained = [pool.submit(measure, n, best[n], seed, a.tokens, a.runs) for n in names for seed in range(a.seeds)]
        runs = [run.result() for run in trained]
        rest = [run.result() for run in without]
    comparison = table(runs + rest)
    picture = a.out.with_suffix(".png")
    plot_training(runs, picture)
    page = a.out.read_text() if a.out.exists() else "# Algorithms\n"
    write(a.out, insert(page, markdown(comparison, runs, picture.name)).encode())
    comparison.print()


if __name__ == "__main__":
    main()
