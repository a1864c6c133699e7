"""Explains the errors of programs that use a latent value as one Python number, though it has a particle axis."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import pyro
import torch

_FORMAT = "unsupported format string passed to Tensor"
_MESSAGES = (
    "cannot be converted to Scalar",
    "only one element tensors can be converted",
    "only integer tensors of a single element",
    "Boolean value of Tensor with more than one value",
    _FORMAT,
    "Tensor doesn't define __round__",
    "for divmod(): 'Tensor'",
    "only 0-dimensional arrays can be converted",  # numpy, of k.numpy()
    "only length-1 arrays can be converted",
    "truth value of an array with more than one element",
)
_LIBRARIES = tuple(str(Path(str(module.__file__)).parent) for module in (torch, pyro))


class PythonValueError(ValueError):
    """Raised where a program uses a tensor with a value for each particle as one Python number."""


@contextmanager
def no_python_values() -> Iterator[None]:
    """Where a program needs one Python value of a latent tensor, raises an error that says what to write instead.

    :raises PythonValueError: for ``int(k)``, ``range(k)``, ``float(k)``, ``k.item()``, ``if k:`` and the like.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if _FORMAT in str(error):  # raised by torch, called by the program
            frames = traceback.StackSummary.from_list(f for f in frames if not f.filename.startswith(_LIBRARIES))
        at = frames[-1]
        looked_up = isinstance(error, KeyError) and any(isinstance(x, torch.Tensor) for x in error.args)
        known = looked_up or any(m in str(error) for m in _MESSAGES)
        if not known or at.filename.startswith(_LIBRARIES):
            raise
        raise PythonValueError(
            f"model or guide: {written(at)} needs one Python value, but "
            f"a latent value here is a tensor with one value for each particle: {_advice(at.line or '')}"
        ) from error


def written(at: traceback.FrameSummary) -> str:
    """A line of a program with its number and file."""
    return f"`{shorten(at.line or '', 100)}` (line {at.lineno} of {Path(at.filename).name})"


def of_user(error: BaseException) -> str:
    """The last line of the traceback that is not in torch, Pyro or this package."""
    own = (*_LIBRARIES, str(Path(__file__).parents[1]))
    lines = [at for at in traceback.extract_tb(error.__traceback__) if not at.filename.startswith(own)]
    return written(lines[-1]) if lines else "a line that is not known"


def _advice(line: str) -> str:
    if "range(" in line:
        return (
            "instead of `for i in range(int(k))` loop over all possible steps, `for i in range(most)`, and put the "
            "sites of step i under `with pyro.poutine.mask(mask=i < k)`, so that they count only where i < k"
        )
    return (
        "instead of a Python `if`, `int`, `float` or `.item()` compute with tensors: `torch.where(k == 1, a, b)` "
        "for a choice, `table[k]` for a look-up, `with pyro.poutine.mask(mask=k == 1)` around sites that only some "
        "particles have"
    )
