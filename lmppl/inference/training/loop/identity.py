"""What a training run is of, so that a checkpoint is not taken up by another: its settings, its data, its networks."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...processes.distributed import whole

SAMPLED = 256  # numbers of a weight that tell language models apart
PROGRAMS = {"model", "guide", "optimizer", "m_optimizer"}
DEPTH = 4


def name_of(program: Any) -> str:
    """A program by its name, or by that of its class."""
    while isinstance(program, partial):
        program = program.func
    found = getattr(program, "__qualname__", None)
    return str(found) if found is not None else type(program).__qualname__


def settings(thing: Any, prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """What an object was built with: of each parameter of its class and of those above, the attribute of that name."""
    found: dict[str, Any] = {prefix or "trainer": type(thing).__qualname__}
    own = [cls for cls in type(thing).__mro__ if cls.__module__.startswith("lmppl.") and "__init__" in vars(cls)]
    for name in dict.fromkeys(name for cls in own for name in inspect.signature(cls).parameters):
        if name in PROGRAMS or name not in getattr(thing, "__dict__", {}):
            continue
        found |= _described(thing.__dict__[name], f"{prefix}.{name}" if prefix else name, depth)
    return found


def _described(value: Any, key: str, depth: int) -> dict[str, Any]:
    if value is None or isinstance(value, bool | int | float | str):
        return {key: value}
    if isinstance(value, list | tuple):
        return {k: v for i, part in enumerate(value) for k, v in _described(part, f"{key}.{i}", depth).items()}
    if isinstance(value, Tensor):
        return {key: digest(value)}
    if type(value).__module__.startswith("lmppl.inference") and depth < DEPTH:
        return settings(value, key, depth + 1)
    return {key: name_of(value)}


def digest(data: Any) -> str:
    """Of tensors, numbers and strings in lists and dicts, whatever device they are on."""
    sha = hashlib.sha256()

    def add(x: Any) -> None:
        if isinstance(x, Tensor):
            sha.update(f"tensor {tuple(x.shape)} {x.dtype}".encode() + _bytes(whole(x.detach())))
        elif isinstance(x, Mapping):
            add([[key, x[key]] for key in x])
        elif isinstance(x, Sequence) and not isinstance(x, str | bytes):
            sha.update(f"list {len(x)}".encode())
            for part in x:
                add(part)
        elif x is None or isinstance(x, bool | int | float | str | bytes):
            sha.update(repr(x).encode())
        elif hasattr(x, "tobytes"):  # an array of numpy
            sha.update(x.tobytes())
        elif hasattr(x, "__dataclass_fields__"):
            add(vars(x))
        else:
            sha.update(type(x).__qualname__.encode())

    add(data)
    return f"sha256:{sha.hexdigest()}"


def fingerprint(networks: Iterable[Any], trained: Iterable[Tensor]) -> str:
    """Of the base weights that no optimiser holds: a few numbers of each, and the shapes of all."""
    known = {id(p) for p in trained}
    found: list[Any] = []
    for network in networks:
        for p in network.base_parameters:
            found.append((str(p.dtype), tuple(p.shape)))
            if id(p) not in known:
                flat = whole(p.detach()).flatten()
                found.append(flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED])
    return digest(found)


def _bytes(x: Tensor) -> bytes:
    return x.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
