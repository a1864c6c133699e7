"""Training checkpoints: parameters and optimiser state in safetensors, the rest in JSON; written atomically."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from .... import files
from ....damage import first_line
from ...core.packed import pack, unpack
from ...processes.distributed import first_alone, like, whole

KIND, FORMAT = "training checkpoint", "lmppl training 1"
TENSORS, STATE = "training.safetensors", "training.json"

logger = logging.getLogger("lmppl")


def save(
    directory: Path,
    optimizer: Optimizer | Sequence[Optimizer],
    step: int,
    extra: dict[str, Any],
    own: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the optimisers, their parameters, ``step`` and an algorithm's ``own`` tensors, replacing older ones.

    On several processes all call it and the first one writes; sharded parameters are gathered.

    :raises FloatingPointError: where a parameter is not finite; the older checkpoint then stays.
    :raises ValueError: where an optimiser holds what no file can hold, or the directory has other files of these names.
    """
    tensors: dict[str, Tensor] = {}
    for i, p in enumerate(_parameters(optimizer)):
        tensors[f"parameter.{i}"] = _copy(p)
        if not bool(tensors[f"parameter.{i}"].isfinite().all()):
            raise FloatingPointError(f"checkpoint: parameter {i} is not finite; {directory} is unchanged")
    tensors |= {f"own.{name}": _copy(t) for name, t in (own or {}).items()}
    kept: dict[str, Tensor] = {}
    try:
        states = [pack(o.state_dict(), f"optimizer.{i}", kept) for i, o in enumerate(_several(optimizer))]
    except TypeError as error:
        raise ValueError(f"optimizer: it keeps {error}, which no checkpoint can hold") from error
    tensors |= {name: _copy(t) for name, t in kept.items()}
    state = {"format": FORMAT, "step": step, "optimizers": _kinds(optimizer), "options": _options(optimizer)}
    state |= {"states": states, **extra}

    def write() -> None:
        with files.writing(directory, KIND) as fresh:
            save_file(tensors, fresh / TENSORS)
            (fresh / STATE).write_text(json.dumps(state))

    first_alone(write)  # no process continues before it is written


def exists(directory: Path) -> bool:
    """Whether there is a checkpoint, or a part of one."""
    files.settle(directory)
    return any((directory / name).exists() for name in (TENSORS, STATE))


def identity(directory: Path) -> dict[str, Any]:
    """The identity of the run that wrote a checkpoint, see `loop.identity`; empty where there is none.

    :raises ValueError: where the checkpoint is damaged or another kind of file.
    """
    if not exists(directory):
        return {}
    found: dict[str, Any] = files.read(directory, lambda: _read(directory))[0].get("of", {})
    return found


def load(
    directory: Path, optimizer: Optimizer | Sequence[Optimizer], of: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restores the optimisers and their parameters in place; returns what else was saved, and an algorithm's tensors.

    :param of: the identity of this run, see `loop.identity`; None: it is not compared.
    :raises ValueError: where the checkpoint is damaged or another kind of file, or belongs to other optimisers or
        another run; the message says what differs, and nothing is changed.
    """
    state, tensors = files.read(directory, lambda: _read(directory))
    if different := _differences(state, optimizer, of):
        raise ValueError(
            f"checkpoint: {directory} is of another run: {'; '.join(different)}. Name another directory for this one"
        )
    try:
        parameters = _parameters(optimizer)
        saved = [like(p, tensors[f"parameter.{i}"]) for i, p in enumerate(parameters)]
        unpacked = [unpack(s, tensors) for s in state["states"]]
        for p, value in zip(parameters, saved, strict=True):
            if p.shape != value.shape:
                raise ValueError(f"a parameter has the shape {tuple(value.shape)}")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"checkpoint: {directory / STATE} does not fit its tensors ({first_line(error)})") from error
    _tell(directory, state.get("options", []), _options(optimizer))
    with torch.no_grad():
        for p, value in zip(parameters, saved, strict=True):
            p.copy_(value)
    for owner, found in zip(_several(optimizer), unpacked, strict=True):
        _restore(owner, found)
    return state, {n.removeprefix("own."): t for n, t in tensors.items() if n.startswith("own.")}


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both files as they were saved; a ValueError names the one that is not readable."""
    try:
        files.verify(directory, KIND)
        name = STATE
        state = json.loads((directory / name).read_bytes())
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"it is not a training checkpoint of the format {FORMAT!r}")
        if not isinstance(state.get("step"), int) or not isinstance(state.get("states"), list):
            raise ValueError("it lacks its step or its optimisers")
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint: {directory / STATE} cannot be read ({first_line(error)})") from error
    try:
        return state, load_file(directory / TENSORS)
    except Exception as error:  # safetensors' own kinds of error
        raise ValueError(f"checkpoint: {directory / TENSORS} cannot be read ({first_line(error)})") from error


def _differences(
    state: dict[str, Any], optimizer: Optimizer | Sequence[Optimizer], of: Mapping[str, Any] | None
) -> list[str]:
    """The differences between the saved run and this one, in words."""
    found = []
    before: Mapping[str, Any] = state.get("of", {})
    now_of: Mapping[str, Any] = before if of is None else of
    for key in dict.fromkeys([*before, *now_of]):
        was, now = before.get(key), now_of.get(key)
        if was != now and (was is None or now is None or not str(was).startswith("sha256:")):
            found.append(f"{key} is {now!r} here and {was!r} there")
        elif was != now:
            found.append(f"{key} differs")
    kinds = _kinds(optimizer)
    for was, now in zip(state.get("optimizers", []), kinds, strict=False):
        if was != now and was["class"] != now["class"]:
            found.append(f"the optimizer is {now['class']} here and {was['class']} there")
        elif was != now:
            found.append(f"the optimizer holds parameters {_short(now)} here and {_short(was)} there")
    if len(state.get("optimizers", [])) != len(kinds):
        found.append(f"{len(kinds)} optimizers here and {len(state.get('optimizers', []))} there")
    return found


def _short(kind: dict[str, Any]) -> str:
    shapes = [shape for group in kind["parameters"] for shape, _ in group]
    return f"{len(shapes)} of the shapes {str(shapes)[:60]}"


def _kinds(optimizer: Optimizer | Sequence[Optimizer]) -> list[dict[str, Any]]:
    """The class of each optimiser, and the shapes and types of its parameters."""
    return [
        {
            "class": type(o).__qualname__,
            "parameters": [[[[*p.shape], str(p.dtype)] for p in group["params"]] for group in o.param_groups],
        }
        for o in _several(optimizer)
    ]


def _options(optimizer: Optimizer | Sequence[Optimizer]) -> list[dict[str, str]]:
    """The options with which each optimiser was made, as strings."""
    found = []
    for o in _several(optimizer):
        rates = [group.get("initial_lr", group["lr"]) for group in o.param_groups]
        rates = [float(rate) for rate in rates[: len(rates) if len(set(map(float, rates))) > 1 else 1]]
        found.append({name: str(x) for name, x in o.defaults.items()} | {"lr": ", ".join(map(str, rates))})
    return found


def _tell(directory: Path, before: Sequence[dict[str, str]], now: Sequence[dict[str, str]]) -> None:
    """Warns where optimisers were made with other options here: the options of the checkpoint count."""
    for was, own in zip(before, now, strict=False):
        if other := [name for name in own if was.get(name, own[name]) != own[name]]:
            there, here = (", ".join(f"{name} {x[name]}" for name in other) for x in (was, own))
            logger.warning(
                "checkpoint: the optimizer continues as in %s, with %s, and not with %s", directory, there, here
            )


def _restore(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restores the optimiser's whole state, its numbers in the precision in which they were saved."""
    parameters = _parameters(optimizer)
    for i, own in state["state"].items():
        state["state"][i] = {k: like(parameters[i], v) if isinstance(v, Tensor) else v for k, v in own.items()}
    optimizer.load_state_dict(state)
    for i, p in enumerate(parameters):
        for key, saved in state["state"].get(i, {}).items():  # torch may have changed their types
            now = optimizer.state[p][key]
            optimizer.state[p][key] = _at(now.device if isinstance(now, Tensor) else p.device, saved)


def _at(device: torch.device, x: Any) -> Any:
    """``x`` with the tensors in it on a device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, Mapping):
        return {key: _at(device, value) for key, value in x.items()}
    return type(x)(_at(device, value) for value in x) if isinstance(x, list | tuple) else x


def _copy(x: Tensor) -> Tensor:
    return whole(x.detach()).cpu().clone().contiguous()


def _several(optimizer: Optimizer | Sequence[Optimizer]) -> Sequence[Optimizer]:
    return [optimizer] if isinstance(optimizer, Optimizer) else optimizer


def _parameters(optimizer: Optimizer | Sequence[Optimizer]) -> list[Tensor]:
    """The tensors that the optimisers hold, in their order."""
    return [p for o in _several(optimizer) for group in o.param_groups for p in group["params"]]
