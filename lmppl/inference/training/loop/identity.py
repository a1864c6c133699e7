"""The identity of a training run (settings, data, networks), so that no other run resumes its checkpoint."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...processes.distributed import whole

SAMPLED = 256  # numbers of a weight that are compared
PROGRAMS = {"model", "guide", "optimizer", "m_optimizer"}
DEPTH = 4


def name_of(program: Any) -> str:
    """The name of a program, or of its class."""
    while isinstance(program, partial):
        program = program.func
    found = getattr(program, "__qualname__", None)
    return str(found) if found is not None else type(program).__qualname__


def settings(thing: Any, prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """The settings of an object: the attributes named like the parameters of its class and its base classes."""
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
    """A hash of tensors, numbers and strings in lists and dicts, the same on every device."""
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
        elif hasattr(x, "tobytes"):  # a numpy array
            sha.update(x.tobytes())
        elif hasattr(x, "__dataclass_fields__"):
            add(vars(x))
        else:
            sha.update(type(x).__qualname__.encode())

    add(data)
    return f"sha256:{sha.hexdigest()}"


def fingerprint(networks: Iterable[Any], trained: Iterable[Tensor]) -> str:
    """A hash of the base weights that no optimiser holds: some numbers of each, and the shapes of all."""
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
