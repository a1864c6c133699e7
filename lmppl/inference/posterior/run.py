"""What a posterior is of: a program and the arguments of its run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..programs import Program


@dataclass(frozen=True)
class Run:
    """What a posterior is of: a program (None: not known, as of one that was saved) and its arguments."""

    model: Program | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def packed(self) -> tuple[Any, dict[str, Tensor]]:
        """The arguments as JSON and tensors, for a file; None where they are of other kinds."""
        tensors: dict[str, Tensor] = {}
        try:
            return _packed([list(self.args), self.kwargs], tensors), tensors
        except TypeError:
            return None, {}

    @classmethod
    def unpacked(cls, packed: Any, tensors: Mapping[str, Tensor]) -> Run | None:
        """What `packed` made of a run, its program not known; None of None."""
        if packed is None:
            return None
        args, kwargs = _unpacked(packed, tensors)
        return cls(None, tuple(args), dict(kwargs))


def _packed(x: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(x, Tensor):
        name = f"arguments.{len(tensors)}"
        tensors[name] = x
        return {"tensor": name}
    if isinstance(x, list | tuple):
        return {type(x).__name__: [_packed(each, tensors) for each in x]}
    if isinstance(x, dict) and all(isinstance(key, str) for key in x):
        return {"dict": {key: _packed(each, tensors) for key, each in x.items()}}
    if x is None or type(x) in (bool, int, float, str):
        return x
    raise TypeError(f"{type(x).__name__} is not saved")


def _unpacked(x: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(x, dict):
        return x
    ((kind, inner),) = x.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {key: _unpacked(each, tensors) for key, each in inner.items()}
    found = [_unpacked(each, tensors) for each in inner]
    return tuple(found) if kind == "tuple" else found


def arguments(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a call, defaults included where the program tells them."""
    try:
        bound = inspect.signature(program).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return [*args, *kwargs.values()]
    bound.apply_defaults()
    return [*bound.args, *bound.kwargs.values()]


def fits(program: Program, run: Run) -> bool:
    """Whether a program takes the arguments of a run, as far as it tells."""
    try:
        inspect.signature(program).bind(*run.args, **run.kwargs)
    except TypeError:
        return False
    except ValueError:  # one that tells no signature
        pass
    return True


def equal(a: Any, b: Any) -> bool:
    """Whether two arguments are the same in value."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and bool((a.cpu() == b.cpu()).all()))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a is b or (type(a) is type(b) and isinstance(a, bool | int | float | str) and a == b)
