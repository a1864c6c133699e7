"""Training checkpoints: parameters and optimiser state in safetensors, the rest in JSON; written whole or not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from ..distributed import agree, like, whole, world
from ..files import fresh_directory

TENSORS, STATE = "training.safetensors", "training.json"


def save(
    directory: Path,
    optimizer: Optimizer | Sequence[Optimizer],
    step: int,
    extra: dict[str, Any],
    own: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the optimisers, their parameters, ``step`` and an algorithm's ``own`` tensors, replacing what was there.

    On several processes all call it and the first one writes: parameters sharded over them are gathered.
    """
    owned = _owned(optimizer)
    tensors = {f"parameter.{i}": whole(p.detach()).clone().contiguous() for i, (_, p) in enumerate(owned)}
    tensors |= {f"own.{name}": t.detach().clone().contiguous() for name, t in (own or {}).items()}
    numbers: dict[str, Any] = {}
    for i, (owner, p) in enumerate(owned):
        for key, value in owner.state.get(p, {}).items():
            if isinstance(value, Tensor):
                tensors[f"state.{i}.{key}"] = whole(value.detach()).clone().contiguous()
            else:
                numbers[f"{i}.{key}"] = value
    if world().rank == 0:
        with fresh_directory(directory) as fresh:
            save_file(tensors, fresh / TENSORS)
            (fresh / STATE).write_text(json.dumps({"step": step, "numbers": numbers, **extra}))
    agree(step)  # nobody goes on before it is written


def load(directory: Path, optimizer: Optimizer | Sequence[Optimizer]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore the optimisers and their parameters in place; what was saved beside them, and an algorithm's own tensors.

    :raises ValueError: where the checkpoint's parameters are not these optimisers'.
    """
    tensors = load_file(directory / TENSORS)
    state: dict[str, Any] = json.loads((directory / STATE).read_text())
    owned = _owned(optimizer)
    saved = [tensors[f"parameter.{i}"] for i in range(sum(name.startswith("parameter.") for name in tensors))]
    shapes = [tuple(t.shape) for t in saved]
    if shapes != [tuple(p.shape) for _, p in owned]:
        raise ValueError(f"checkpoint: {directory} was written by another optimizer: its parameters differ in shape")
    with torch.no_grad():
        for i, (owner, p) in enumerate(owned):
            p.copy_(like(p, tensors[f"parameter.{i}"]))
            prefix = f"state.{i}."
            restored: dict[str, Any] = {
                n.removeprefix(prefix): like(p, t) for n, t in tensors.items() if n.startswith(prefix)
            }
            restored |= {n.split(".", 1)[1]: v for n, v in state["numbers"].items() if n.split(".", 1)[0] == str(i)}
            if restored:
                owner.state[p] = restored
    return state, {n.removeprefix("own."): t for n, t in tensors.items() if n.startswith("own.")}


def _owned(optimizer: Optimizer | Sequence[Optimizer]) -> list[tuple[Optimizer, Tensor]]:
    """Every parameter with the optimiser that holds it."""
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    return [(owner, p) for owner in optimizers for group in owner.param_groups for p in group["params"]]
