"""The options of the commands, checked before anything is computed."""

from __future__ import annotations

import inspect
import json
import math
import os
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .catalogue import MODELS, SETTINGS
from .command_help import model_asked, nearest

if TYPE_CHECKING:  # what computes is imported by the function that computes: --help waits for none of it
    from .models import Experiment

COMMON = {"lm", "data", "recipe", "seed", "checkpoint", "setting", "device", "options"}
ALGORITHMS = ("importance", "smc", "gflownet")
FURTHER = ("mcmc", "wake-sleep", "ppo")
USUAL = ",".join(ALGORITHMS)
DTYPES = ("float32", "bfloat16", "float16")


class Failure(Exception):
    """An error that the user can correct; it is printed in one line."""


def _known(ctx: typer.Context, model: str) -> str:
    if model not in MODELS and not ctx.resilient_parsing:  # which is how a shell's completion parses
        raise Failure(f"{model!r} is no model; there are {', '.join(MODELS)}.{nearest(model, MODELS)}")
    return model


# -- what a shell completes --------------------------------------------------------------------------------------------


def _models(incomplete: str) -> list[tuple[str, str]]:
    return [(name, entry.infers) for name, entry in MODELS.items() if name.startswith(incomplete)]


def _model_options(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """The options of the model in the command line; none if there is no model yet."""
    entry = MODELS.get(model_asked(ctx) or "")
    options = {} if entry is None else entry.options
    return [(f"{name}=", meaning) for name, meaning in options.items() if name.startswith(incomplete)]


def _algorithms(incomplete: str) -> list[str]:
    """Completes the name after the last comma, with algorithms that are not in the list yet."""
    before, comma, last = incomplete.rpartition(",")
    named = before.split(",")
    return [before + comma + a for a in (*ALGORITHMS, *FURTHER) if a.startswith(last) and a not in named]


def _among(*names: str) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


# -- options -----------------------------------------------------------------------------------------------------------

Model = Annotated[
    str,
    typer.Argument(help="Which model; [bold]lmppl list[/bold] names them.", callback=_known, autocompletion=_models),
]
Lm = Annotated[str | None, typer.Option("--lm", help="A Hugging Face checkpoint; default: the embedded one.")]
Data = Annotated[Path | None, typer.Option("--data", help="Observations of your own: see below.")]
Setting = Annotated[
    str,
    typer.Option(
        "--setting",
        help="The target: posterior, or the paper's released setting.",
        autocompletion=_among(*SETTINGS),
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="An option of the model, e.g. temperature=0.9.",
        autocompletion=_model_options,
    ),
]
Algorithms = Annotated[
    str,
    typer.Option(
        "--algorithms",
        help=f"A comma-separated choice; further ones are {', '.join(FURTHER)}.",
        autocompletion=_algorithms,
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Where results go.")]
Seed = Annotated[int, typer.Option("--seed")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Training steps; default: the recipe's.")]
Budget = Annotated[
    float | None,
    typer.Option("--budget", metavar="MINUTES", help="Choose observations, particles and steps that take so long."),
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Torch threads.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the results alone: no progress, no warnings.")]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where the language model is: cpu, cuda, cuda:1, mps.",
        autocompletion=_among("cpu", "cuda", "mps"),
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help=f"Of the weights of --lm: {', '.join(DTYPES)}; default: as saved.",
        autocompletion=_among(*DTYPES),
    ),
]


def chosen_algorithms(algorithms: str) -> list[str]:
    """Returns the names in a comma-separated list."""
    chosen = [a.strip() for a in algorithms.split(",") if a.strip()]
    for name in chosen:
        if name not in (*ALGORITHMS, *FURTHER):
            known = (*ALGORITHMS, *FURTHER)
            raise Failure(f"--algorithms: {name!r} is none of {', '.join(known)}.{nearest(name, known)}")
    if not chosen:
        raise Failure("--algorithms: name at least one")
    return chosen


def check_budget(budget: float | None, **others: Any) -> None:
    """Raises Failure for a budget that is not a time, or together with another option for the length of training."""
    if budget is None:
        return
    if not 0 < 60 * budget < math.inf:
        raise Failure(f"--budget {budget:g}: expected minutes, a positive number")
    for name, value in others.items():
        if value:
            raise Failure(f"--budget and --{name}: each says how long to train; give one of them")


def experiment_of(
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
    """Returns the experiment for these options, with its data and language models."""
    if data is not None and not data.exists():
        raise Failure(f"--data {data}: there is no such file or directory")
    if lm == "":
        raise Failure("--lm: it is empty; name a checkpoint's directory, or a name on the Hugging Face hub")
    if not -(2**43) < seed < 2**43:
        raise Failure(f"--seed {seed}: expected an integer of at most 43 bits")
    import torch
    import transformers

    import lmppl

    from .models import EXPERIMENTS

    device = own_device(device)
    _check_device(device, dtype, lm)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    weights = None if dtype is None else getattr(torch, dtype)
    kind = getattr(lmppl, MODELS[model].lm)
    loaded = None if lm is None else kind.from_pretrained(lm, device=device, dtype=weights)
    own = _own_options(model, options or [])
    try:
        return EXPERIMENTS[model](loaded, data, seed=seed, checkpoint=checkpoint, setting=setting, device=device, **own)
    except (TypeError, LookupError, RuntimeError, OverflowError, AssertionError) as error:
        if not own:
            raise
        raise Failure(f"--set {' --set '.join(options or [])}: {model} cannot be made of this ({error})") from error


def own_device(device: str) -> str:
    """Returns the device of this process: each of several processes has its own GPU."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def _check_device(device: str, dtype: str | None, lm: str | None) -> None:
    import torch

    from .damage import first_line

    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Failure(f"--device {device}: there is no such device here ({first_line(error)})") from None
    if dtype is not None and (dtype not in DTYPES or lm is None):
        raise Failure(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}, together with --lm")


def _own_options(model: str, options: list[str]) -> dict[str, Any]:
    """Returns the options of one model's `experiment`: numbers as numbers, the rest as strings."""
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
    """Returns the type of an option in words."""
    words = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return " or ".join(words.get(k, "several, as [0.8, 0.9]") for k in (typing.get_args(kind) or (kind,)))


def _is(value: Any, kind: Any) -> bool:
    """Returns whether a value read from JSON has the type of an option."""
    if isinstance(value, list):
        return any(
            typing.get_origin(k) is Sequence and all(_is(v, typing.get_args(k)[0]) for v in value)
            for k in (typing.get_args(kind) or (kind,))
        )
    if isinstance(value, bool):
        return kind is bool or bool in typing.get_args(kind)
    kinds = typing.get_args(kind) or (kind,)
    return isinstance(value, tuple(k for k in kinds if isinstance(k, type))) or (type(value) is int and float in kinds)


def set_threads(threads: int) -> None:
    most = 4 * (os.cpu_count() or 1)
    if threads > most:
        raise Failure(f"--threads {threads}: this machine has {os.cpu_count()} cores; at most {most} threads")
    import torch

    torch.set_num_threads(threads)
