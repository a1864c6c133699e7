"""Nested lists, dicts, numbers and tensors as what a file can hold: JSON, and the tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def pack(x: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold of ``x``; its tensors go to ``tensors``, under names that begin with ``name``.

    :raises TypeError: naming what is of another kind.
    """
    if isinstance(x, Tensor):
        name = f"{name}.{len(tensors)}"
        tensors[name] = x
        return {"tensor": name}
    if isinstance(x, Mapping):
        return {"dict": [[pack(key, name, tensors), pack(value, f"{name}.{key}", tensors)] for key, value in x.items()]}
    if isinstance(x, list | tuple):
        parts = [pack(part, f"{name}.{i}", tensors) for i, part in enumerate(x)]
        return {"tuple" if isinstance(x, tuple) else "list": parts}
    if x is None or isinstance(x, bool | int | float | str):
        return x
    raise TypeError(f"{name}, a {type(x).__name__}")


def unpack(x: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given."""
    if not isinstance(x, dict):
        return x
    ((kind, content),) = x.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {unpack(key, tensors): unpack(value, tensors) for key, value in content}
    parts = [unpack(part, tensors) for part in content]
    return tuple(parts) if kind == "tuple" else parts
