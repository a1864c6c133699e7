"""The command line: ``lmppl list``, ``compare``, ``train``, ``sample``."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from .inference import SMC, Comparison, GFlowNet, Importance, Posterior, compare
from .inference.compare import write_atomically
from .language_model import LanguageModel
from .models import EXPERIMENTS, Experiment

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()
ALGORITHMS = ("importance", "smc", "gflownet")
PARTICLES = 64

Model = Annotated[str, typer.Argument(help="Which model; `lmppl list` names them.")]
Lm = Annotated[str | None, typer.Option("--lm", help="A Hugging Face checkpoint; default: the embedded one.")]
Data = Annotated[Path | None, typer.Option("--data", help="Observations of your own, e.g. a story a line.")]
Out = Annotated[Path, typer.Option("--out", help="Where results go.")]
Seed = Annotated[int, typer.Option("--seed")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Training steps; default: the recipe's.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Torch threads.")]


class Failure(Exception):
    """Something the user can mend; printed in one line."""


def main() -> None:
    """The entry point: a user's mistake prints one line and exits with 1."""
    try:
        app()
    except (Failure, ValueError, OSError, FloatingPointError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_one_line(error)}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


@app.command("list")
def list_models() -> None:
    """The models that are ready to run."""
    table = Table("model", "what it infers")
    for name, make in EXPERIMENTS.items():
        table.add_row(name, (make.__doc__ or "").strip().splitlines()[0])
    console.print(table)


@app.command("compare")
def compare_command(
    model: Model,
    lm: Lm = None,
    data: Data = None,
    algorithms: Annotated[str, typer.Option(help="A comma-separated choice.")] = ",".join(ALGORITHMS),
    out: Out = Path("out"),
    steps: Steps = None,
    quick: Annotated[bool, typer.Option("--quick", help="A short training: see it work.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="A trained adapter to use instead of training.")] = None,
    particles: Annotated[int, typer.Option(min=1, help="Particles of the GFlowNet; the others get its tokens.")] = PARTICLES,
    seed: Seed = 0,
    threads: Threads = 1,
) -> None:
    """Infer the latent texts of unseen observations by several algorithms, beside the exact posterior."""
    torch.set_num_threads(threads)
    chosen = _choose(algorithms)
    experiment = _experiment(model, lm, data, seed, checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    exact = None
    before = experiment.lm.tokens_scored
    if experiment.exact is not None:
        with console.status("Enumerating the exact posterior of every test observation"):
            started = time.time()
            exact = experiment.exact.run(*experiment.test)
            console.print(f"Exact posterior of {exact.log_evidence.numel()} observations in {time.time() - started:.0f} s.")
    exact_tokens = experiment.lm.tokens_scored - before
    candidates: dict[str, object] = {}
    if "gflownet" in chosen:
        gflownet = experiment.gflownet()
        if exact is not None and checkpoint is None:
            untrained = _density_tv(exact, experiment)
            console.print(f"Total variation of the guide before training: {untrained:.3f}")
        if checkpoint is None:
            steps = steps or (experiment.recipe.quick_steps if quick else experiment.recipe.steps)
            history = _fit(gflownet, experiment, steps, out, seed, fresh=True)
            plot_training(history, out / "training.png")
            experiment.guide_lm.save_pretrained(out / "adapter")
        candidates["GFlowNet"] = _Sized(gflownet, particles)
    tokens = _tokens_a_query(experiment, _Sized(experiment.gflownet(), particles))
    if "importance" in chosen:
        n = _matched(experiment, lambda n: Importance(experiment.model, num_particles=n), tokens, particles)
        candidates["importance sampling (prior)"] = Importance(experiment.model, num_particles=n)
    if "smc" in chosen:
        n = _matched(experiment, lambda n: SMC(experiment.model, num_particles=n, twist="stop"), tokens, particles)
        candidates["SMC (stop twist)"] = SMC(experiment.model, num_particles=n, twist="stop")
        if "gflownet" in chosen:
            candidates["SMC (GFlowNet proposal)"] = SMC(experiment.model, experiment.guide, num_particles=particles)
    with console.status("Comparing") as status:
        result = compare(
            experiment.model, candidates, *experiment.test, exact=exact, exact_tokens=exact_tokens,
            repetitions=4, progress=lambda name: status.update(f"Comparing: {name}"),
        )  # fmt: skip
    _report(result, experiment, exact, candidates, out)


class _Sized:
    """A GFlowNet whose ``run`` takes this many particles."""

    def __init__(self, gflownet: GFlowNet, num_particles: int):
        self.gflownet, self.num_particles = gflownet, num_particles
        self.density = gflownet.guide

    @property
    def training_tokens(self) -> int | None:
        return self.gflownet.training_tokens or None

    def run(self, *args: object) -> Posterior:
        return self.gflownet.run(*args, num_particles=self.num_particles)


@app.command("train")
def train_command(
    model: Model,
    lm: Lm = None,
    data: Data = None,
    out: Out = Path("out/train"),
    steps: Steps = None,
    seed: Seed = 0,
    threads: Threads = 1,
) -> None:
    """Train a model's guide at leisure: checkpoints under --out, and the same command resumes."""
    torch.set_num_threads(threads)
    experiment = _experiment(model, lm, data, seed)
    out.mkdir(parents=True, exist_ok=True)
    gflownet = experiment.gflownet()
    history = _fit(gflownet, experiment, steps or 4 * experiment.recipe.steps, out, seed, fresh=False)
    experiment.guide_lm.save_pretrained(out / "adapter")
    if history:
        plot_training(history, out / "training.png")
    console.print(f"{gflownet.training_tokens:,} tokens; adapter in {out / 'adapter'}")
    if experiment.exact is not None:
        exact = experiment.exact.run(*experiment.test)
        console.print(f"Total variation to the exact posterior on unseen observations: {_density_tv(exact, experiment):.3f}")


@app.command("sample")
def sample_command(
    model: Model,
    checkpoint: Annotated[Path, typer.Option(help="The adapter that `lmppl train` or `compare` saved.")],
    lm: Lm = None,
    data: Data = None,
    particles: Annotated[int, typer.Option(min=1)] = PARTICLES,
    observations: Annotated[int, typer.Option(min=1, help="How many test observations to show.")] = 4,
    seed: Seed = 0,
) -> None:
    """Sample latent texts for unseen observations from a trained guide."""
    experiment = _experiment(model, lm, data, seed, checkpoint)
    torch.manual_seed(seed)
    posterior = experiment.gflownet().run(*experiment.test, num_particles=particles)
    console.print(sample_text(experiment, posterior, None, observations), highlight=False, markup=False)


# -- the parts --------------------------------------------------------------------------------------------------------


def _choose(algorithms: str) -> list[str]:
    chosen = [a.strip() for a in algorithms.split(",") if a.strip()]
    for name in chosen:
        if name not in ALGORITHMS:
            raise Failure(f"--algorithms: {name!r} is none of {', '.join(ALGORITHMS)}")
    if not chosen:
        raise Failure("--algorithms: name at least one")
    return chosen


def _experiment(
    model: str, lm: str | None, data: Path | None, seed: int, checkpoint: Path | None = None
) -> Experiment:
    if model not in EXPERIMENTS:
        raise Failure(f"{model!r} is no model; there are {', '.join(EXPERIMENTS)}")
    with _quiet():
        loaded = None if lm is None else LanguageModel.from_pretrained(lm)
        return EXPERIMENTS[model](loaded, data, seed=seed, checkpoint=checkpoint)


@contextmanager
def _quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lmppl").setLevel(logging.WARNING)
    yield


def _fit(
    gflownet: GFlowNet, experiment: Experiment, steps: int, out: Path, seed: int, fresh: bool
) -> list[dict[str, float]]:
    log = out / "run.jsonl"
    if fresh:
        log.unlink(missing_ok=True)
    gflownet.fit(
        experiment.batches, steps, seed=seed, held_out=experiment.held_out, log=log,
        checkpoint=None if fresh else out / "training",
    )  # fmt: skip
    return [json.loads(line) for line in log.read_text().splitlines()]


def _density_tv(exact: Posterior, experiment: Experiment) -> float:
    from .inference.quality import density_quality

    return float(density_quality(exact, experiment.guide, experiment.test, {}).total_variation.mean())


def _tokens_a_query(experiment: Experiment, algorithm: object) -> int:
    before = experiment.lm.tokens_scored
    algorithm.run(*experiment.test)  # type: ignore[attr-defined]
    return experiment.lm.tokens_scored - before


def _matched(experiment: Experiment, make: Callable[[int], object], tokens: int, particles: int) -> int:
    """How many particles of an algorithm cost about ``tokens`` a query."""
    return max(1, math.floor(particles * tokens / _tokens_a_query(experiment, make(particles))))


def _report(
    result: Comparison, experiment: Experiment, exact: Posterior | None, candidates: dict[str, object], out: Path
) -> None:
    result.notes.insert(0, f"Target: {experiment.target}. {len(experiment.test[0])} unseen observations; |error| and KL in nats.")
    result.print(console)
    result.save(out)
    shown = candidates.get("GFlowNet") or next(iter(candidates.values()))
    posterior = shown.run(*experiment.test)  # type: ignore[attr-defined]
    text = sample_text(experiment, posterior, exact, len(experiment.test[0]))
    write_atomically(out / "samples.txt", text.encode())
    console.print(f"Written to {out}: " + ", ".join(sorted(p.name for p in out.iterdir())))


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
    axis.plot([h["step"] for h in history], [h["sd_u"] for h in history], lw=0.6, alpha=0.6, label="training draws")
    held_out = [h for h in history if "held_out_sd_u" in h]
    axis.plot([h["step"] for h in held_out], [h["held_out_sd_u"] for h in held_out], "o-", ms=3, label="held out, on-policy")
    axis.set(xlabel="step", ylabel="sd(u), nats; 0 at the posterior", ylim=(0, None))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
