"""The command line: ``lmppl list``, ``compare``, ``train``, ``sample``."""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
import typing
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.exceptions import TyperException

from . import __version__
from .catalogue import MODELS, SETTINGS
from .command_help import ModelCommand, nearest, usage
from .files import claim, save_figure, writing

if TYPE_CHECKING:  # what computes is imported by the function that computes: --help waits for none of it
    from collections.abc import Callable

    from .inference import Comparison, Posterior, Trainer
    from .inference.posterior.algorithm import Algorithm
    from .models import Experiment

    Match = Callable[[Algorithm, Experiment], Algorithm]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(markup=False, emoji=False)  # users' texts, data and file names are shown as they are
COMMON = {"lm", "data", "recipe", "seed", "checkpoint", "setting", "device", "options"}
ALGORITHMS = ("importance", "smc", "gflownet")
FURTHER = ("mcmc", "wake-sleep", "ppo")
TRAINED = ("wake-sleep", "ppo")
DTYPES = ("float32", "bfloat16", "float16")
PARTICLES = 64
REPETITIONS = 4
LEISURE = 4  # `train` takes this many times the steps of `compare`
OUTSIDE_DRAWS = 10_000
SAMPLES, CURVE = "samples.txt", "training.png"


class Failure(Exception):
    """Something the user can mend; printed in one line."""


def _known(model: str) -> str:
    if model not in MODELS:
        raise Failure(f"{model!r} is no model; there are {', '.join(MODELS)}.{nearest(model, MODELS)}")
    return model


Model = Annotated[str, typer.Argument(help="Which model; [bold]lmppl list[/bold] names them.", callback=_known)]
Lm = Annotated[str | None, typer.Option("--lm", help="A Hugging Face checkpoint; default: the embedded one.")]
Data = Annotated[Path | None, typer.Option("--data", help="Observations of your own: see below.")]
Setting = Annotated[str, typer.Option("--setting", help="The target: posterior, or the paper's released setting.")]
Options = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An option of the model, e.g. temperature=0.9.")
]
Out = Annotated[Path, typer.Option("--out", help="Where results go.")]
Seed = Annotated[int, typer.Option("--seed")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Training steps; default: the recipe's.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Torch threads.")]
Device = Annotated[str, typer.Option("--device", help="Where the language model is: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help=f"Of the weights of --lm: {', '.join(DTYPES)}; default: as saved.")
]


def main() -> None:
    """The entry point: a user's mistake prints one line and exits with 1, a wrong usage of the command with 2."""
    try:
        code, said = app(standalone_mode=False), None
    except TyperException as error:
        code, said = error.exit_code, usage(error, sys.argv[1:])
    except (Failure, ValueError, OSError, FloatingPointError) as error:
        code, said = 1, _one_line(error)
    except typer.Abort:
        code, said = 1, "aborted"
    if said:
        Console(stderr=True).print("[bold red]error:[/]", Text(said), highlight=False, soft_wrap=True)
    raise SystemExit(code or 0)


def _print_version(asked: bool) -> None:
    if asked:
        console.print(f"lmppl {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def lmppl(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Latent-variable models of text: infer what was not observed, by several algorithms and a language model."""


@app.command("list")
def list_models() -> None:
    """The models that are ready to run."""
    table = Table("model", "what it infers")
    for name, entry in MODELS.items():
        table.add_row(name, entry.infers)
    console.print(table)


@app.command("compare", cls=ModelCommand)
def compare_command(
    model: Model,
    lm: Lm = None,
    data: Data = None,
    setting: Setting = SETTINGS[0],
    options: Options = None,
    algorithms: Annotated[
        str, typer.Option(help=f"A comma-separated choice; further ones are {', '.join(FURTHER)}.")
    ] = ",".join(ALGORITHMS),
    out: Out = Path("out"),
    steps: Steps = None,
    quick: Annotated[bool, typer.Option("--quick", help="A short training: see it work.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="A trained adapter to use instead of training.")] = None,
    particles: Annotated[
        int, typer.Option(min=1, help="Particles of the GFlowNet; the others get as many tokens a query.")
    ] = PARTICLES,
    seed: Seed = 0,
    threads: Threads = 1,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Infer the latent texts of unseen observations by several algorithms, beside the exact posterior."""
    chosen = _choose(algorithms)
    import torch

    from .inference import compare
    from .inference.judging.comparison import FILES
    from .inference.posterior.algorithm import sized

    _set_threads(threads)
    make = partial(_experiment, model, lm, data, seed, setting, options, device, dtype)
    experiment = make(checkpoint)
    claim(out, (*FILES, SAMPLES))
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    exact, exact_tokens = _truth(experiment)
    gflownet, length = experiment.gflownet(), steps or experiment.recipe.length(quick)
    if "gflownet" in chosen and checkpoint is None:
        _train(gflownet, experiment, exact, length, out, seed)
    with console.status("Finding how many particles cost as much as the GFlowNet's"):
        match = _matching(experiment, sized(gflownet, particles))
        candidates = _candidates(chosen, experiment, sized(gflownet, particles), match)
    for name in (n for n in TRAINED if n in chosen):
        other = make(None)  # an adapter of its own
        trainer = _trainer(name, other)
        (out / name).mkdir(exist_ok=True)
        _train(trainer, other, exact, length, out / name, seed)
        candidates[name] = match(trainer, other)
    with console.status("Comparing") as status:
        result = compare(
            experiment.model, candidates, *experiment.test, exact=exact, exact_tokens=exact_tokens,
            repetitions=REPETITIONS, progress=lambda name: status.update(Text(f"Comparing: {name}")),
        )  # fmt: skip
    _annotate(result, experiment, exact)
    result.print(console)
    result.save(out)
    shown = next(iter(candidates.values())).run(*experiment.test)
    text = sample_text(experiment, shown, exact, len(experiment.test[0]))
    with writing(out, "samples") as fresh:
        (fresh / SAMPLES).write_text(text)
    console.print(f"Written to {out}: " + ", ".join(sorted(p.name for p in out.iterdir() if p.name[0] != ".")))


@app.command("train", cls=ModelCommand)
def train_command(
    model: Model,
    lm: Lm = None,
    data: Data = None,
    setting: Setting = SETTINGS[0],
    options: Options = None,
    out: Out = Path("out/train"),
    steps: Steps = None,
    seed: Seed = 0,
    threads: Threads = 1,
    device: Device = "cpu",
    dtype: Dtype = None,
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", min=1, help="Steps between two checkpoints.")
    ] = 100,
) -> None:
    """Train a model's guide at leisure: checkpoints under --out, and the same command resumes.

    Interrupted (Ctrl-C, SIGTERM) it saves first. A checkpoint of another model, setting, seed, data or --lm is refused.
    """
    _set_threads(threads)
    from .inference.processes.distributed import world

    experiment = _experiment(model, lm, data, seed, setting, options, device, dtype)
    _claim(out)
    out.mkdir(parents=True, exist_ok=True)
    gflownet = experiment.gflownet()
    gflownet.fit(
        experiment.batches, steps or LEISURE * experiment.recipe.steps, seed=seed, held_out=experiment.held_out,
        log=out / "run.jsonl", checkpoint=out / "training", checkpoint_every=checkpoint_every,
        identity={"model": model, "setting": setting, "options": " ".join(sorted(options or []))} | _data_of(data),
    )  # fmt: skip
    if world().rank:
        return  # started by torchrun: the first process writes and reports
    _save(experiment, out)
    console.print(f"{gflownet.training_tokens:,} tokens; adapter in {out / 'adapter'}")
    exact, _ = _truth(experiment)
    if exact is not None:
        console.print(f"Total variation on unseen observations: {_density_tv(exact, experiment):.3f}")


@app.command("sample", cls=ModelCommand)
def sample_command(
    model: Model,
    checkpoint: Annotated[Path, typer.Option(help="The adapter that train or compare saved.")],
    lm: Lm = None,
    data: Data = None,
    setting: Setting = SETTINGS[0],
    options: Options = None,
    particles: Annotated[int, typer.Option(min=1)] = PARTICLES,
    observations: Annotated[int, typer.Option(min=1, help="How many test observations to show.")] = 4,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Sample latent texts for unseen observations from a trained guide."""
    import torch

    experiment = _experiment(model, lm, data, seed, setting, options, device, dtype, checkpoint)
    torch.manual_seed(seed)
    posterior = experiment.gflownet().run(*experiment.test, num_particles=particles)
    console.print(sample_text(experiment, posterior, None, observations), highlight=False)


# -- the parts --------------------------------------------------------------------------------------------------------


def _choose(algorithms: str) -> list[str]:
    chosen = [a.strip() for a in algorithms.split(",") if a.strip()]
    for name in chosen:
        if name not in (*ALGORITHMS, *FURTHER):
            known = (*ALGORITHMS, *FURTHER)
            raise Failure(f"--algorithms: {name!r} is none of {', '.join(known)}.{nearest(name, known)}")
    if not chosen:
        raise Failure("--algorithms: name at least one")
    return chosen


def _experiment(
    model: str,
    lm: str | None,
    data: Path | None,
    seed: int,
    setting: str,
    options: list[str] | None,
    device: str,
    dtype: str | None,
    checkpoint: Path | None = None,
) -> Experiment:
    if data is not None and not data.exists():
        raise Failure(f"--data {data}: there is no such file or directory")
    if lm == "":
        raise Failure("--lm: it is empty; name a checkpoint's directory, or a name on the Hugging Face hub")
    if not -(2**43) < seed < 2**43:
        raise Failure(f"--seed {seed}: expected an integer of at most 43 bits")
    import torch
    import transformers

    from .language_model import LanguageModel
    from .models import EXPERIMENTS

    device = _own_device(device)
    _check_device(device, dtype, lm)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    weights = None if dtype is None else getattr(torch, dtype)
    loaded = None if lm is None else LanguageModel.from_pretrained(lm, device=device, dtype=weights)
    own = _own_options(model, options or [])
    try:
        return EXPERIMENTS[model](loaded, data, seed=seed, checkpoint=checkpoint, setting=setting, device=device, **own)
    except (TypeError, LookupError, RuntimeError, OverflowError, AssertionError) as error:
        if not own:
            raise
        raise Failure(f"--set {' --set '.join(options or [])}: {model} cannot be made of this ({error})") from error


def _own_device(device: str) -> str:
    """Of several processes each takes a GPU of its own."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def _check_device(device: str, dtype: str | None, lm: str | None) -> None:
    import torch

    from .adapters import first_line

    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Failure(f"--device {device}: there is no such device here ({first_line(error)})") from None
    if dtype is not None and (dtype not in DTYPES or lm is None):
        raise Failure(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}, together with --lm")


def _own_options(model: str, options: list[str]) -> dict[str, Any]:
    """What a model's `experiment` takes besides what all of them take: numbers as numbers, the rest as text."""
    from .models import EXPERIMENTS

    known = [p for p in inspect.signature(EXPERIMENTS[model]).parameters if p not in COMMON]
    found: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if name not in known or not equals:
            names = f"expected NAME=VALUE with a name of {', '.join(known)} for {model}"
            raise Failure(f"--set {option}: {names if known else f'{model} has no options'}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
        kind = typing.get_type_hints(EXPERIMENTS[model])[name]
        if kind is str or (str in typing.get_args(kind) and found[name] is not None):  # 5 as a text, too
            found[name] = value
        if not _is(found[name], kind):
            raise Failure(f"--set {option}: expected {name} to be {_said(kind)}")
    return found


def _said(kind: Any) -> str:
    """What an option is annotated with, in words."""
    words = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return " or ".join(words.get(k, "several, as [0.8, 0.9]") for k in (typing.get_args(kind) or (kind,)))


def _is(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is of a type that an option is annotated with."""
    if isinstance(value, list):
        return any(
            typing.get_origin(k) is Sequence and all(_is(v, typing.get_args(k)[0]) for v in value)
            for k in (typing.get_args(kind) or (kind,))
        )
    if isinstance(value, bool):
        return kind is bool or bool in typing.get_args(kind)
    kinds = typing.get_args(kind) or (kind,)
    return isinstance(value, tuple(k for k in kinds if isinstance(k, type))) or (type(value) is int and float in kinds)


def _set_threads(threads: int) -> None:
    most = 4 * (os.cpu_count() or 1)
    if threads > most:
        raise Failure(f"--threads {threads}: this machine has {os.cpu_count()} cores; at most {most} threads")
    import torch

    torch.set_num_threads(threads)


def _truth(experiment: Experiment) -> tuple[Posterior | None, int | None]:
    """The exact posterior of the test observations and its cost in tokens, where it can be had."""
    if experiment.exact is None:
        return None, None
    before, started = experiment.lm.tokens_scored, time.time()
    with console.status("Enumerating the exact posterior of every test observation"):
        exact = experiment.exact.run(*experiment.test)
    console.print(f"Exact posterior of {exact.log_evidence.numel()} observations: {time.time() - started:.0f} s")
    return exact, experiment.lm.tokens_scored - before


def _trainer(name: str, experiment: Experiment) -> Trainer:
    from .inference import PolicyGradient, ReweightedWakeSleep

    given: dict[str, Any] = {"optimizer": experiment.optimizer(), "num_particles": experiment.recipe.particles}
    if name == "wake-sleep":
        return ReweightedWakeSleep(experiment.model, experiment.guide, **given)
    return PolicyGradient(experiment.model, experiment.guide, algorithm=name, **given)


def _train(trainer: Trainer, experiment: Experiment, exact: Posterior | None, steps: int, out: Path, seed: int) -> None:
    from .inference.training.loop import checkpoint as checkpoints
    from .inference.training.loop.log import Log

    if checkpoints.exists(out / "training"):
        raise Failure(f"--out {out}: `lmppl train` keeps its run there; name another directory")
    _claim(out)
    Log(out / "run.jsonl").cut(0)
    if exact is not None:
        console.print(f"Total variation of the guide before training: {_density_tv(exact, experiment):.3f}")
    trainer.fit(experiment.batches, steps, seed=seed, held_out=experiment.held_out, log=out / "run.jsonl")
    _save(experiment, out)


def _claim(out: Path) -> None:
    """Before anything is trained, refuse a directory in which others have files of the names that will be written."""
    from .adapters import CONFIG, WEIGHTS
    from .inference.training.loop.log import Log

    claim(out, [CURVE])
    claim(out / "adapter", [CONFIG, WEIGHTS])
    Log(out / "run.jsonl")


def _data_of(path: Path | None) -> dict[str, str]:
    """What tells data files apart: what is in them."""
    from .inference.training.loop.identity import digest

    if path is None:
        return {}
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {"data files": digest([file.read_bytes() for file in files])}


def _save(experiment: Experiment, out: Path) -> None:
    """The adapter, and the training curve of the log."""
    history = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    with writing(out, "training curve") as fresh:
        plot_training(history, fresh / CURVE)
    experiment.guide_lm.save_pretrained(out / "adapter")


def _matching(experiment: Experiment, gflownet: Algorithm) -> Match:
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


def _candidates(chosen: list[str], experiment: Experiment, gflownet: Algorithm, match: Match) -> dict[str, Algorithm]:
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


def _density_tv(exact: Posterior, experiment: Experiment) -> float:
    from .inference.judging.quality import density_quality

    return float(density_quality(exact, experiment.guide, experiment.test, {}).total_variation.mean())


def _annotate(result: Comparison, experiment: Experiment, exact: Posterior | None) -> None:
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
