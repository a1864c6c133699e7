"""Everything public with its signature, one a line; run as a program, it writes public_names.txt anew."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

WRITTEN = Path(__file__).with_suffix(".txt")
MODULES = ["lmppl", "lmppl.constraints", "lmppl.distributions", "lmppl.inference", "lmppl.models"]


def lines() -> list[str]:
    return [line for name in MODULES for line in of_module(name)]


def of_module(module: str) -> Iterator[str]:
    package = import_module(module)
    for name in sorted(package.__all__):
        found, path = getattr(package, name), f"{module}.{name}"
        if inspect.ismodule(found):
            public = sorted(
                n for n, f in vars(found).items() if inspect.isfunction(f) and f.__module__ == found.__name__
            )
            yield from (f"{path}.{n}{signature(getattr(found, n))}" for n in public if not n.startswith("_"))
        elif inspect.isclass(found):
            yield f"{path}{signature(found)}"
            yield from (f"{path}.{line}" for line in of_class(found))
        else:
            yield f"{path}{signature(found)}" if inspect.isfunction(found) else path


def of_class(cls: type) -> Iterator[str]:
    """Its public methods and attributes, those of its bases within the package too."""
    own = [c for c in cls.__mro__ if c.__module__.startswith("lmppl")]
    for name in sorted({n for c in own for n in [*vars(c), *vars(c).get("__annotations__", {})]}):
        if name.startswith("_"):
            continue
        found = inspect.getattr_static(cls, name, None)
        found = found.__func__ if isinstance(found, staticmethod | classmethod) else found
        yield f"{name}{signature(found)}" if inspect.isfunction(found) else name


def signature(function: Any) -> str:
    """Names, kinds and defaults of the parameters, without annotations."""
    try:
        found = inspect.signature(function)
    except ValueError:
        return ""
    bare = [
        p.replace(annotation=p.empty, default=p.default if p.default is p.empty else Default(p.default))
        for p in found.parameters.values()
    ]
    return str(found.replace(parameters=bare, return_annotation=found.empty))


class Default:
    """A default as it is written: objects by their class, because their addresses change."""

    def __init__(self, value: Any):
        plain = isinstance(value, str | int | float | bool | tuple | frozenset | dict | list | None)
        self.shown = repr(value) if plain else f"<{getattr(value, '__qualname__', type(value).__qualname__)}>"

    def __repr__(self) -> str:
        return self.shown


if __name__ == "__main__":
    WRITTEN.write_text("\n".join(lines()) + "\n")
