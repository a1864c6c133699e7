"""What the commands train, compare and write."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .command_options import Failure
from .files import claim, save_figure, writing

if TYPE_CHECKING:  # what computes is imported by the function that computes: --help waits for none of it
    from collections.abc import Callable

    from .inference import Comparison, Posterior, Trainer
    from .inference.posterior.algorithm import Algorithm
    from .models import Experiment

    Match = Callable[[Algorithm, Experiment], Algorithm]

console = Console(markup=False, emoji=False)  # users' texts, data and file names are shown as they are
OUTSIDE_DRAWS = 10_000
CURVE = "training.png"


def exact_posterior(experiment: Experiment) -> tuple[Posterior | None, int | None]:
    """The exact posterior of the test observations and its cost in tokens, where it can be had."""
    if experiment.exact is None:
        return None, None
    before, started = experiment.lm.tokens_scored, time.time()
    with console.status("Enumerating the exact posterior of every test observation"):
        exact = experiment.exact.run(*experiment.test)
    console.print(f"Exact posterior of {exact.log_evidence.numel()} observations: {time.time() - started:.0f} s")
    return exact, experiment.lm.tokens_scored - before


def trainer_of(name: str, experiment: Experiment) -> Trainer:
    """What trains the experiment's guide otherwise than a GFlowNet: "wake-sleep", or a policy gradient."""
    from .inference import PolicyGradient, ReweightedWakeSleep

    given: dict[str, Any] = {"optimizer": experiment.optimizer(), "num_particles": experiment.recipe.particles}
    if name == "wake-sleep":
        return ReweightedWakeSleep(experiment.model, experiment.guide, **given)
    return PolicyGradient(experiment.model, experiment.guide, algorithm=name, **given)


def train_beside(
    trainer: Trainer, experiment: Experiment, exact: Posterior | None, steps: int, out: Path, seed: int
) -> None:
    """Train a guide, by the exact posterior where there is one, with log, curve and adapter in ``out``."""
    from .inference.training.loop import checkpoint as checkpoints
    from .inference.training.loop.log import Log

    if checkpoints.exists(out / "training"):
        raise Failure(f"--out {out}: `lmppl train` keeps its run there; name another directory")
    claim_training(out)
    Log(out / "run.jsonl").cut(0)
    if exact is not None:
        console.print(f"Total variation of the guide before training: {density_tv(exact, experiment):.3f}")
    trainer.fit(experiment.batches, steps, seed=seed, held_out=experiment.held_out, log=out / "run.jsonl")
    save_training(experiment, out)


def claim_training(out: Path) -> None:
    """Before anything is trained, refuse a directory in which others have files of the names that will be written."""
    from .inference.training.loop.log import Log
    from .loading import CONFIG, WEIGHTS

    claim(out, [CURVE])
    claim(out / "adapter", [CONFIG, WEIGHTS])
    Log(out / "run.jsonl")


def contents(path: Path | None) -> dict[str, str]:
    """What tells data files apart: what is in them."""
    from .inference.training.loop.identity import digest

    if path is None:
        return {}
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {"data files": digest([file.read_bytes() for file in files])}


def save_training(experiment: Experiment, out: Path) -> None:
    """The adapter, and the training curve of the log."""
    history = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    with writing(out, "training curve") as fresh:
        plot_training(history, fresh / CURVE)
    experiment.guide_lm.save_pretrained(out / "adapter")


def matching(experiment: Experiment, gflownet: Algorithm) -> Match:
    """What gives an algorithm as many particles as cost the GFlowNet's tokens a query."""
    from .inference.judging.compare import PILOTS, Meter, particles_within
    from .inference.posterior.algorithm import sized

    meter = Meter([experiment.lm.network])
    answer, spent, _ = meter(lambda: gflownet.run(*experiment.test))
    n, tokens = answer.num_particles, spent / len(experiment.test[0])

    def match(algorithm: Algorithm, own: Experiment) -> Algorithm:
        meter.watch([own.lm.network])
        pilots = min(n, PILOTS[0]), min(4 * n, PILOTS[1])
        return sized(algorithm, particles_within(algorithm, tokens, meter, args=own.test, pilots=pilots, checks=3))

    return match


def candidates_of(chosen: list[str], experiment: Experiment, gflownet: Algorithm, match: Match) -> dict[str, Algorithm]:
    """The algorithms, all others with as many particles as cost the GFlowNet's tokens."""
    from .inference import SMC, Importance, MetropolisHastings

    found: dict[str, Algorithm] = {}
    model, guide = experiment.model, experiment.guide
    if "gflownet" in chosen:
        found["GFlowNet"] = gflownet
    if "importance" in chosen:
        found["importance sampling (prior)"] = match(Importance(model), experiment)
    if "smc" in chosen:
        found["SMC (prior, stop twist)"] = match(SMC(model, twist="stop"), experiment)
    if "mcmc" in chosen:
        found["MCMC (prior, regrowth)"] = match(MetropolisHastings(model), experiment)
    if "smc" in chosen and "gflownet" in chosen:
        found["SMC (GFlowNet, flow twist)"] = match(SMC(model, guide, twist="flow"), experiment)
    return found


def density_tv(exact: Posterior, experiment: Experiment) -> float:
    """The guide's total variation from the posterior, by its densities, a mean over the test observations."""
    from .inference.judging.quality import density_quality

    return float(density_quality(exact, experiment.guide, experiment.test, {}).total_variation.mean())


def annotate(result: Comparison, experiment: Experiment, exact: Posterior | None) -> None:
    """Say what the figures are of, and how much of the posterior the enumeration may lack."""
    from .inference import Importance
    from .inference.judging.quality import outside_mass

    count = len(experiment.test[0])
    result.notes.insert(0, f"Target: {experiment.target}. {count} unseen observations; |error| and KL in nats.")
    if exact is None:
        return
    shares = []
    for source, guide in {"prior": None, "guide": experiment.guide}.items():
        drawn = Importance(experiment.model, guide, num_particles=-(-OUTSIDE_DRAWS // count)).run(*experiment.test)
        shares.append(
            f"{float(outside_mass(exact, drawn).mean()):.4f} by {drawn.num_particles * count:,} {source} draws"
        )
    result.notes.append(
        "Every TV is to the enumerated posterior; posterior mass outside it: " + ", ".join(shares) + "."
    )


def sample_text(experiment: Experiment, posterior: Posterior, exact: Posterior | None, observations: int) -> str:
    """The most probable texts of each observation, with their exact probabilities where those are known."""
    lines = []
    for i in range(min(observations, len(experiment.test[0]))):
        truth = dict(exact.table(experiment.site, i)) if exact is not None else {}
        lines.append(experiment.describe(i))
        for text, p in posterior.table(experiment.site, i)[:6]:
            known = f"   exact {truth.get(text, 0.0):.3f}" if truth else ""
            lines.append(f"    {p:.3f}{known}  {text.strip()}")
    return "\n".join(lines) + "\n"


def plot_training(history: list[dict[str, float]], path: Path) -> None:
    """sd(u) of training draws and on held-out observations, against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for key, style, label in (
        ("sd_u", {"lw": 0.6, "alpha": 0.6}, "training draws"),
        ("held_out_sd_u", {"marker": "o", "ms": 3}, "held out, on-policy"),
    ):
        measured = [(h["step"], h[key]) for h in history if h.get(key) is not None]  # a GFlowNet alone has the first
        if measured:
            axis.plot(*zip(*measured, strict=True), label=label, **style)
    axis.set(xlabel="step", ylabel="sd(u), nats; 0 at the posterior", ylim=(0, None))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
