"""Programs that make a Python number or a Python decision of a latent value, which has a particle axis."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyro
import torch

_MESSAGES = (
    "cannot be converted to Scalar",
    "only one element tensors can be converted",
    "only integer tensors of a single element",
    "Boolean value of Tensor with more than one value",
    "only 0-dimensional arrays can be converted",  # numpy, of k.numpy()
    "only length-1 arrays can be converted",
    "truth value of an array with more than one element",
)
_LIBRARIES = tuple(str(Path(str(module.__file__)).parent) for module in (torch, pyro))


class PythonValueError(ValueError):
    """A program makes one Python number of a tensor that has a value for each particle."""


@contextmanager
def no_python_values() -> Iterator[None]:
    """Where a program fails because a latent value is one for each particle, say what to write instead.

    :raises PythonValueError: for ``int(k)``, ``range(k)``, ``float(k)``, ``k.item()``, ``if k:`` and their kin.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        if not any(m in str(error) for m in _MESSAGES) or at.filename.startswith(_LIBRARIES):
            raise
        raise PythonValueError(
            f"model or guide: `{at.line}` (line {at.lineno} of {Path(at.filename).name}) needs one Python value, but "
            f"a latent value here is a tensor, with one for each particle: {_advice(at.line or '')}"
        ) from error


def _advice(line: str) -> str:
    if "range(" in line:
        return (
            "in place of `for i in range(int(k))` go over all that there can be, `for i in range(most)`, and put the "
            "sites of step i under `with pyro.poutine.mask(mask=i < k)`, so that they count where i < k"
        )
    return (
        "in place of a Python `if`, `int`, `float` or `.item()` compute with tensors: `torch.where(k == 1, a, b)` "
        "for a choice, `table[k]` for a look-up, `with pyro.poutine.mask(mask=k == 1)` around sites that only some "
        "particles have"
    )
