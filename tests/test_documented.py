"""Every public name has a docstring that is enough to use it: `complaints` says what it must contain."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from typing import Any

import public_names
import pytest
from test_docstrings import blocks

MODULES = [*public_names.MODULES, "lmppl.tools", "lmppl.testing"]
FULL_STOP = re.compile(r".+?[.](\s|$)", re.DOTALL)
PARAM = re.compile(r":param (?:[^:\s]+ )?\\?\*{0,2}(\w+):")


def public() -> dict[str, Any]:
    """Public classes and functions by module and name, and what the public classes define: methods and properties."""
    found: dict[str, Any] = {}
    for name in MODULES:
        module = import_module(name)
        for value in (getattr(module, n) for n in getattr(module, "__all__", own(module))):
            for f in [getattr(value, n) for n in own(value)] if inspect.ismodule(value) else [value]:
                if inspect.isclass(f) or inspect.isfunction(f):
                    found[f"{f.__module__}.{f.__qualname__}"] = f
                    found |= dict(members(f)) if inspect.isclass(f) else {}
    return found


def own(module: Any) -> list[str]:
    """The public names that a module without ``__all__`` defines."""
    return [n for n, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__ and n[0] != "_"]


def homes(cls: type) -> list[type]:
    """A class and its bases within the package."""
    return [c for c in cls.__mro__ if c.__module__.startswith("lmppl")]


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Methods and properties of a class, each with the class that defines it; no tests of a `TextContract`."""
    for home in homes(cls):
        for name, member in vars(home).items():
            member = member.__func__ if isinstance(member, staticmethod | classmethod) else member
            method = inspect.isfunction(member) or isinstance(member, property | cached_property)
            if method and not name.startswith(("_", "test_")):
                yield f"{home.__module__}.{home.__qualname__}.{name}", (home, name, member)


def parameters(function: Any) -> set[str]:
    """The names of a signature, without those that start with an underscore."""
    found = inspect.signature(function).parameters.values()
    return {p.name for p in found if not p.name.startswith("_")} - {"self", "cls"}


def constructed(cls: type) -> set[str]:
    """The parameters of a class whose constructor is the package's own; none for a protocol."""
    first = next(c for c in cls.__mro__ if {"__init__", "__new__"} & set(vars(c)))
    return parameters(cls) if first in homes(cls) and not getattr(cls, "_is_protocol", False) else set()


def documented(doc: str | None) -> set[str]:
    return set(PARAM.findall(doc or ""))


def complaints(value: Any) -> list[str]:
    """What the docstring of a class, a function, or a member (class, name, method or property) lacks."""
    if isinstance(value, tuple):
        return of_member(*value)
    doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    if not doc or doc.startswith(f"{value.__name__}("):  # what @dataclass writes
        return ["no docstring"]
    doc = inspect.cleandoc(doc)
    if inspect.isclass(value):
        expected, here = constructed(value), documented(doc) | documented(value.__init__.__doc__)
        inherited = {name for c in homes(value)[1:] for name in documented(vars(c).get("__doc__"))}
    else:
        expected, here, inherited = parameters(value), documented(doc), set()
    missing = sorted(expected - here - inherited)
    return [
        *of_text(doc),
        *([f"no :param {name}:" for name in missing]),
        *([f":param {name}: is no parameter" for name in sorted(here - expected)]),
        *([] if ">>>" in doc or blocks(doc) else ["no example"]),
    ]


def of_member(home: type, name: str, member: Any) -> list[str]:
    """A member may inherit its docstring within the package.  Every parameter is named there or by the class.

    Either ``:param x:`` or an x in double backticks does.
    """
    members = [vars(c).get(name) for c in homes(home)]
    docs = [d for m in members if (d := getattr(getattr(m, "__func__", m), "__doc__", None))]
    if not docs:
        return ["no docstring"]
    of_classes = [d for c in homes(home) if (d := vars(c).get("__doc__"))]
    expected = set() if isinstance(member, property | cached_property) else parameters(member)
    missing = sorted(n for n in expected - {"args", "kwargs"} if not any(mentions(d, n) for d in [*docs, *of_classes]))
    return [
        *of_text(inspect.cleandoc(docs[0])),
        *(f"{n} is not documented" for n in missing),
        *(f":param {n}: is no parameter" for n in sorted(documented(member.__doc__) - expected)),
    ]


def mentions(doc: str, name: str) -> bool:
    return name in documented(doc) or re.search(rf"``[^`]*\b{name}\b[^`]*``", doc) is not None


def of_text(doc: str) -> list[str]:
    return [] if FULL_STOP.match(doc.split("\n\n")[0]) else ["the first paragraph has no sentence that ends"]


PUBLIC = public()


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_documented(name):
    assert complaints(PUBLIC[name]) == []
