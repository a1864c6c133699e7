"""What a posterior is of: a program and the arguments of its run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..core.packed import pack, unpack
from ..core.programs import Program


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
            return pack([self.args, self.kwargs], "arguments", tensors), tensors
        except TypeError:
            return None, {}

    @classmethod
    def unpacked(cls, packed: Any, tensors: Mapping[str, Tensor]) -> Run | None:
        """What `packed` made of a run, its program not known; None of None."""
        if packed is None:
            return None
        args, kwargs = unpack(packed, tensors)
        return cls(None, args, kwargs)


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
