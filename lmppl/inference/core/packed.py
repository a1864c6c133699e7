"""Nested lists, dicts, numbers and tensors in a form that a file can hold: JSON, and tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def pack(x: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``x`` as JSON values; its tensors are put into ``tensors``, under names that begin with ``name``.

    :raises TypeError: for a value of another type; the message names it.
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
    """The inverse of `pack`."""
    if not isinstance(x, dict):
        return x
    ((kind, content),) = x.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {unpack(key, tensors): unpack(value, tensors) for key, value in content}
    parts = [unpack(part, tensors) for part in content]
    return tuple(parts) if kind == "tuple" else parts
