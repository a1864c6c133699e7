"""Errors of a user's program: which site has it, what is wrong, and what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.distributions import Unit
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ...distributions.arguments import no_text
from ...shapes import broadcast_shapes
from .python_values import of_user
from .sites import text_of

PARTICLES, PREFIXES = "lmppl_particles", "lmppl_prefixes"

_INVALID = r"Expected parameter (\w+) .* of distribution (\w+)\(.* the constraint (.*?), but"
_AXES = (
    "Write the program for axes on the left: the particle axis is on the left of the program's plates. Sum over a "
    "plate with .sum(-1, keepdim=True), and over a site's own axes with .sum(-1) or .to_event()"
)


@contextmanager
def explained() -> Iterator[None]:
    """Rewrites the errors that Pyro and torch raise in a vectorised run in terms of the program."""
    try:
        yield
    except ZeroDivisionError as error:
        if "size cannot be zero" in str(error):
            raise ValueError(f"model or guide: {of_user(error)} has no element; a plate needs one or more") from error
        raise
    except (ValueError, RuntimeError, TypeError) as error:
        if (refused := _factor(error)) is not None:
            raise ValueError(refused) from error
        said = str(error).split("\nTrace Shapes")[0]
        if wrong := re.match(_INVALID, said, re.S):
            parameter, kind, constraint = wrong.groups()
            expected = constraint.removesuffix("()")
            found = said.splitlines()[-1].strip()[:80]
            raise ValueError(
                f"model or guide: {of_user(error)}: {parameter} of a {kind} is {found}; expected {expected}"
            ) from error
        if again := re.search(r"Multiple sample sites named '(.*)'", said):
            raise ValueError(_twice(again[1])) from error
        if wrong := re.search(r"Shape mismatch inside plate\('(.*)'\) at site (.*) dim (-?\d+), (\d+) vs (\d+)", said):
            plate, site, dim, size, got = wrong.groups()
            own = {PARTICLES: f"there are {size} particles", PREFIXES: f"there are {size} prefixes of a text"}
            there = own.get(plate, f"the plate {plate!r} has {size}")
            raise ValueError(f"site {site!r}: its axis {dim} has {got} elements, but {there}. {_AXES}") from error
        if said != str(error) and type(error) in (ValueError, RuntimeError):  # without the trace that Pyro added
            raise type(error)(said) from error
        raise


def _factor(error: Exception) -> str | None:
    """Why `pyro.factor` failed; None if the error is not from a factor."""
    at = error.__traceback__
    while at is not None:
        if at.tb_frame.f_code is pyro.factor.__code__:
            name, given = (at.tb_frame.f_locals[key] for key in ("name", "log_factor"))
            if not isinstance(given, Tensor):
                given = repr(given)
            elif given.is_complex():
                given = f"a tensor of {given.dtype}"
            elif bool(given.isnan().any()):
                given = "NaN for some particles"
            else:  # the factor itself is valid
                return None
            return f"site {name!r}: a factor is a log-probability, a tensor of numbers or -inf, and this one is {given}"
        at = at.tb_next
    return None


def refuse_own_names(trace: Trace) -> None:
    """Raises ValueError if a site or plate has the name of a plate that the package opens around the program."""
    for name in (PARTICLES, PREFIXES):
        if name in trace.nodes:
            raise ValueError(f"site {name!r}: this name is reserved for an axis of the package; choose another name")


def check_shapes(trace: Trace, nesting: int, particles: int, prefixes: int | None) -> None:
    """Raises ValueError if a site's density has an axis that belongs to no plate, or a factor is no log-probability."""
    samples = [n for n in trace.nodes.values() if n["type"] == "sample" and not site_is_subsample(n)]
    nodes = [n for n in samples if not n["infer"].get("_deterministic", False)]
    plates = [f for node in nodes for f in node["cond_indep_stack"] if f.vectorized]
    allowed = {dim: {1} | {f.size for f in plates if f.dim == dim} for dim in range(-nesting, 0)}
    allowed[-1 - nesting] = {1, particles}
    allowed[-2 - nesting] = {1, prefixes or 1}
    for node in nodes:
        fn, value = node["fn"], node["value"]
        if not isinstance(value, Tensor) and (site := text_of(fn)) is not None:
            raise ValueError(f"site {node['name']!r}: {no_text(site.fn, value)}")
        if isinstance(fn, Unit) and fn.log_factor.is_complex():
            kind = fn.log_factor.dtype
            raise ValueError(f"site {node['name']!r}: a factor is a log-probability, and this one is of {kind}")
        if isinstance(fn, Unit) and fn.log_factor.dtype == torch.bool:
            raise ValueError(
                f"site {node['name']!r}: a factor is a log-probability, and this one is a BoolTensor; for a condition "
                "write torch.where(condition, 0.0, -torch.inf)"
            )
        shape = _batch(fn, value, node["name"])
        for i, size in enumerate(reversed(shape), 1):
            if size not in allowed.get(-i, {1}):
                raise ValueError(
                    f"site {node['name']!r}: its density has the shape {tuple(shape)}, with {particles} particles on "
                    f"the left of {nesting} plate axes; no plate has {size} elements at axis {-i}. Put the site into "
                    f"its plate, in the guide too. {_AXES}"
                )


def _batch(fn: Any, value: Any, name: str) -> torch.Size:
    """The shape of a site's log-probability."""
    shape: torch.Size = fn.batch_shape
    if not isinstance(value, Tensor):
        return shape
    right = value.dim() - fn.event_dim
    try:
        return broadcast_shapes(shape, value.shape[: max(0, right)])
    except RuntimeError:
        raise ValueError(
            f"site {name!r}: its value has the shape {tuple(value.shape)}, which does not fit a distribution of "
            f"the batch shape {tuple(shape)} and the event shape {tuple(fn.event_shape)}. {_AXES}"
        ) from None


def _twice(name: str) -> str:
    return (
        f"site {name!r}: the program has two sites of this name; give each its own name, in a loop for instance "
        f'pyro.sample(f"{name}_{{i}}", ...). A plate that is entered twice has to be one object, '
        f'plate = pyro.plate("{name}", ...)'
    )
