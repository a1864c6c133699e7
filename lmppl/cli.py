"""The command line: ``lmppl list``, ``compare``, ``train``, ``sample``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.exceptions import TyperException

from . import __version__
from .catalogue import MODELS, SETTINGS
from .command_help import ModelCommand, usage
from .command_options import (
    ALGORITHMS,
    FURTHER,
    Budget,
    Data,
    Device,
    Dtype,
    Failure,
    Lm,
    Model,
    Options,
    Out,
    Seed,
    Setting,
    Steps,
    Threads,
    check_budget,
    chosen_algorithms,
    experiment_of,
    set_threads,
)
from .command_results import (
    Matching,
    Minutes,
    annotate,
    candidates_of,
    claim_training,
    comparing,
    console,
    contents,
    density_tv,
    exact_posterior,
    plan_of,
    sample_text,
    save_training,
    train_beside,
    trainer_of,
)
from .files import claim, writing

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
TRAINED = ("wake-sleep", "ppo")
PARTICLES = 64
REPETITIONS = 4
SAMPLES = "samples.txt"
LEISURE = 4  # `train` takes this many times the steps of `compare`


def main() -> None:
    """The entry point: a user's mistake prints one line and exits with 1, a wrong usage of the command with 2."""
    try:
        code, said = app(standalone_mode=False), None
    except TyperException as error:
        code, said = error.exit_code, usage(error, sys.argv[1:])
    except (Failure, ValueError, OSError, FloatingPointError) as error:
        code, said = 1, " ".join(str(error).split()) or type(error).__name__
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
    budget: Budget = None,
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
    """Infer the latent texts of unseen observations by several algorithms, beside the exact posterior.

    The minutes of --budget are for everything: loading, the exact posterior, trainings, which share alike what is left,
    and the comparison.
    """
    chosen = chosen_algorithms(algorithms)
    trained = [n for n in ("gflownet", *TRAINED) if n in chosen and not (n == "gflownet" and checkpoint)]
    check_budget(budget, steps=steps, quick=quick)
    if budget is not None and not trained:
        raise Failure(f"--budget {budget:g}: nothing is trained here")
    minutes = None if budget is None else Minutes(budget)
    import torch

    from .inference import Trainer, compare
    from .inference.judging.comparison import FILES
    from .inference.posterior.algorithm import sized
    from .models import Experiment
    from .models.budget import plan

    set_threads(threads)
    make = partial(experiment_of, model, lm, data, seed, setting, options, device, dtype)
    experiment = make(checkpoint)
    claim(out, (*FILES, SAMPLES))
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    exact, exact_tokens = exact_posterior(experiment)
    length = steps or experiment.recipe.length(quick)
    if minutes is not None:
        with console.status("Finding how long a comparison takes"):
            count = len(chosen) + ({"smc", "gflownet"} <= set(chosen))  # SMC from the prior, and from the guide
            minutes.kept = comparing(experiment, particles, count, REPETITIONS, exact is not None)

    def train(name: str, own: Experiment, out: Path) -> Trainer:
        """The trained guide of an experiment."""
        steps, looks, maker = length, None, partial(trainer_of, name)
        if minutes is not None:
            found = plan(own, minutes.share(len(trained) - trained.index(name)), maker)
            console.print(f"{name}, {found}", soft_wrap=True)
            own, steps, looks = found.of(own), found.steps, found.looks(own)
        trainer = maker(own)
        train_beside(trainer, own, exact, steps, out, seed, looks)
        return trainer

    gflownet = train("gflownet", experiment, out) if "gflownet" in trained else experiment.gflownet()
    with console.status("Finding how many particles cost as much as the GFlowNet's"):
        match = Matching(experiment, sized(gflownet, particles))
        candidates = candidates_of(chosen, experiment, sized(gflownet, particles), match)
    for name in (n for n in TRAINED if n in chosen):
        other = make(None)  # an adapter of its own
        (out / name).mkdir(exist_ok=True)
        candidates[name] = match(train(name, other, out / name), other)
    console.print(match.cost(REPETITIONS), soft_wrap=True)
    with console.status("Comparing") as status:
        result = compare(
            experiment.model, candidates, *experiment.test, exact=exact, exact_tokens=exact_tokens,
            repetitions=REPETITIONS, progress=lambda name: status.update(Text(f"Comparing: {name}")),
        )  # fmt: skip
    annotate(result, experiment, exact)
    result.print(console)
    result.save(out)
    shown = next(iter(candidates.values())).run(*experiment.test)
    text = sample_text(experiment, shown, exact, len(experiment.test[0]))
    with writing(out, "samples") as fresh:
        (fresh / SAMPLES).write_text(text)
    if experiment.shows is not None:
        with console.status(f"Measuring {experiment.name}"), writing(out, experiment.name) as fresh:
            said = experiment.shows(fresh)
        console.print(said, soft_wrap=True)
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
    budget: Budget = None,
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
    The minutes of --budget are for the training, looks at held-out observations in it; the choice is in the checkpoint.
    """
    check_budget(budget, steps=steps)
    set_threads(threads)
    from .inference.processes.distributed import world

    experiment = experiment_of(model, lm, data, seed, setting, options, device, dtype)
    claim_training(out)
    identity = {"model": model, "setting": setting, "options": " ".join(sorted(options or []))} | contents(data)
    length = steps or LEISURE * experiment.recipe.steps
    looks: dict[str, Any] = {"held_out": experiment.held_out}
    found = plan_of(experiment, budget, out)
    out.mkdir(parents=True, exist_ok=True)
    if found is not None:
        if not world().rank:
            console.print(str(found), soft_wrap=True)
        experiment, length, looks = found.of(experiment), found.steps, found.looks(experiment)
        identity |= found.identity
    gflownet = experiment.gflownet()
    gflownet.fit(
        experiment.batches, length, seed=seed, log=out / "run.jsonl", checkpoint=out / "training",
        checkpoint_every=checkpoint_every, identity=identity, **looks,
    )  # fmt: skip
    if world().rank:
        return  # started by torchrun: the first process writes and reports
    save_training(experiment, out)
    console.print(f"{gflownet.training_tokens:,} tokens; adapter in {out / 'adapter'}")
    exact, _ = exact_posterior(experiment)
    if exact is not None:
        console.print(f"Total variation on unseen observations: {density_tv(exact, experiment):.3f}")


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

    experiment = experiment_of(model, lm, data, seed, setting, options, device, dtype, checkpoint)
    torch.manual_seed(seed)
    posterior = experiment.gflownet().run(*experiment.test, num_particles=particles)
    console.print(sample_text(experiment, posterior, None, observations), highlight=False)
