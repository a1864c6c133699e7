"""The command line: ``lmppl list``, ``compare``, ``train``, ``sample``, ``report``."""

from __future__ import annotations

import json
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
    USUAL,
    Algorithms,
    Budget,
    Data,
    Device,
    Dtype,
    Failure,
    Lm,
    Model,
    Options,
    Out,
    Quiet,
    Seed,
    Setting,
    Steps,
    Threads,
    check_budget,
    chosen_algorithms,
    experiment_of,
    set_threads,
)
from .command_output import Output, console
from .command_record import FILE, Record, settings_of
from .command_results import (
    SAMPLES,
    Matching,
    Minutes,
    annotate,
    candidates_of,
    claim_training,
    comparing,
    contents,
    density_tv,
    exact_posterior,
    plan_of,
    refuse_run,
    sample_text,
    samples,
    save_samples,
    save_training,
    train_beside,
    trainer_of,
    verdict_of,
)
from .files import claim, writing

EXIT_CODES = (
    "Exit codes: 0, success; 1, a wrong value, or a run that failed; 2, wrong usage of the command; "
    "130 or 143, interrupted by Ctrl-C or SIGTERM, after train has saved."
)
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, epilog=EXIT_CODES)
TRAINED = ("wake-sleep", "ppo")
PARTICLES = 64
REPETITIONS = 4
COMPARED = "lmppl comparison 1"  # the format of --json
LEISURE = 4  # `train` takes this many times the steps of `compare`


def main() -> None:
    """The entry point: a user's mistake prints one line and exits with 1, a wrong usage of the command with 2.

    See `EXIT_CODES`.
    """
    try:
        code, said = app(standalone_mode=False, prog_name="lmppl"), None
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
        console().print(f"lmppl {__version__}")
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
    console().print(table)


@app.command("compare", cls=ModelCommand)
def compare_command(
    ctx: typer.Context,
    model: Model,
    lm: Lm = None,
    data: Data = None,
    setting: Setting = SETTINGS[0],
    options: Options = None,
    algorithms: Algorithms = USUAL,
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
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON instead of tables.")] = False,
) -> None:
    """Infer the latent texts of unseen observations by several algorithms, beside the exact posterior.

    The minutes of --budget include everything: loading, the exact posterior, the comparison, and the trainings, which
    share the rest equally.
    """
    chosen = chosen_algorithms(algorithms)
    trained = [n for n in ("gflownet", *TRAINED) if n in chosen and not (n == "gflownet" and checkpoint)]
    check_budget(budget, steps=steps, quick=quick)
    if budget is not None and not trained:
        raise Failure(f"--budget {budget:g}: nothing is trained here")
    minutes = None if budget is None else Minutes(budget)
    output = Output(quiet, as_json)
    import torch

    from .inference import Trainer, compare
    from .inference.judging.comparison import FILES
    from .inference.posterior.algorithm import sized
    from .models import Experiment
    from .models.budget import plan

    set_threads(threads)
    make = partial(experiment_of, model, lm, data, seed, setting, options, device, dtype)
    experiment = make(checkpoint)
    claim(out, (*FILES, *SAMPLES, FILE))
    if "gflownet" in trained:
        refuse_run(out)
    out.mkdir(parents=True, exist_ok=True)
    with Record(out, "compare", settings_of(ctx)) as record, output.quietly():
        record.begin()
        torch.manual_seed(seed)
        exact, exact_tokens = exact_posterior(experiment, output)
        length = steps or experiment.recipe.length(quick)
        if minutes is not None:
            with output.status("Finding how long a comparison takes"):
                count = len(chosen) + ({"smc", "gflownet"} <= set(chosen))  # SMC from the prior, and from the guide
                minutes.kept = comparing(experiment, particles, count, REPETITIONS, exact is not None)

        def train(name: str, own: Experiment, out: Path) -> Trainer:
            """The trained guide of an experiment."""
            steps, looks, maker = length, None, partial(trainer_of, name)
            if minutes is not None:
                found = plan(own, minutes.share(len(trained) - trained.index(name)), maker)
                output.say(f"{name}, {found}")
                own, steps, looks = found.of(own), found.steps, found.looks(own)
            trainer = maker(own)
            train_beside(trainer, own, exact, steps, out, seed, output, looks)
            return trainer

        gflownet = train("gflownet", experiment, out) if "gflownet" in trained else experiment.gflownet()
        with output.status("Finding how many particles cost as much as the GFlowNet's"):
            match = Matching(experiment, sized(gflownet, particles))
            candidates = candidates_of(chosen, experiment, sized(gflownet, particles), match)
        for name in (n for n in TRAINED if n in chosen):
            other = make(None)  # an adapter of its own
            (out / name).mkdir(exist_ok=True)
            candidates[name] = match(train(name, other, out / name), other)
        output.say(match.cost(REPETITIONS))
        result = compare(
            experiment.model, candidates, *experiment.test, exact=exact, exact_tokens=exact_tokens,
            repetitions=REPETITIONS, progress=not quiet,
        )  # fmt: skip
        annotate(result, experiment, exact)
        if not as_json:
            result.print(output.results)
        result.save(out)
        save_samples(samples(experiment, next(iter(candidates.values())).run(*experiment.test), exact), out)
        if experiment.shows is not None:
            with output.status(f"Measuring {experiment.name}"), writing(out, experiment.name) as fresh:
                record.results["shown"] = experiment.shows(fresh)
            output.result(record.results["shown"])
    output.result(f"Written to {out}: " + ", ".join(sorted(p.name for p in out.iterdir() if p.name[0] != ".")))
    if as_json:
        print(json.dumps({"format": COMPARED} | record.entry | result.to_json(), indent=1, allow_nan=False))


@app.command("train", cls=ModelCommand)
def train_command(
    ctx: typer.Context,
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
    quiet: Quiet = False,
) -> None:
    """Train a model's guide, with checkpoints under --out; the same command resumes.

    If it is interrupted (Ctrl-C, SIGTERM) it saves first. A checkpoint of another model, setting, seed, data or --lm is
    refused. The minutes of --budget include the evaluations on held-out observations; the choice is saved in the
    checkpoint.
    """
    check_budget(budget, steps=steps)
    set_threads(threads)
    output = Output(quiet)
    import torch

    from .inference.processes.distributed import world
    from .inference.training.loop import checkpoint as checkpoints

    experiment = experiment_of(model, lm, data, seed, setting, options, device, dtype)
    claim_training(out)
    claim(out, SAMPLES)
    identity = {"model": model, "setting": setting, "options": " ".join(sorted(options or []))} | contents(data)
    length = steps or LEISURE * experiment.recipe.steps
    looks: dict[str, Any] = {"held_out": experiment.held_out}
    found = plan_of(experiment, budget, out)
    out.mkdir(parents=True, exist_ok=True)
    rank, processes = world()
    if found is not None:
        if not rank:
            output.say(str(found))
        experiment, length, looks = found.of(experiment), found.steps, found.looks(experiment)
        identity |= found.identity
    resumes = checkpoints.exists(out / "training")
    with (
        Record(out, "train", settings_of(ctx), resumes=resumes, processes=processes, kept=not rank) as record,
        output.quietly(),
    ):
        if not resumes:
            record.begin()
        gflownet = experiment.gflownet()
        gflownet.fit(
            experiment.batches, length, seed=seed, log=out / "run.jsonl", checkpoint=out / "training",
            checkpoint_every=checkpoint_every, identity=identity, progress=not quiet, callback=record.begin, **looks,
        )  # fmt: skip
        if rank:
            return  # started by torchrun: the first process writes and reports
        save_training(experiment, out)
        record.results |= {"steps": length, "training_tokens": gflownet.training_tokens}
        output.result(f"{gflownet.training_tokens:,} tokens; adapter in {out / 'adapter'}")
        said = verdict_of(out)
        if said is not None:
            record.results["verdict"] = said
            output.result(f"The guide on held-out observations: {said}")
        exact, _ = exact_posterior(experiment, output)
        if exact is not None:
            record.results["density_tv"] = density_tv(exact, experiment)
            output.result(f"Total variation on unseen observations: {record.results['density_tv']:.3f}")
        torch.manual_seed(seed)
        drawn = gflownet.run(*experiment.test, num_particles=PARTICLES)
        save_samples(samples(experiment, drawn, exact, required=False), out)


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
    Output().result(sample_text(samples(experiment, posterior, None, observations)))


@app.command("report")
def report_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What --out of train or compare named.")],
) -> None:
    """Write report.html into the directory of a run: one page with everything about it, to keep or to send.

    It has settings, tables, curves, sample texts, diagnosis, cost, versions, the seed and the command that repeats it,
    and needs no other file. A run that has not ended has a page too, which says so.
    """
    from .command_report import write_report

    Output().result(f"Written: {write_report(directory)}")
