"""Double precision throughout, so that no comparison rests on how one processor rounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def double() -> Iterator[None]:
    """Where single precision is asked for by name, double precision is given.

    Many networks compute norms, rotary angles, softmaxes or recurrences in float32, whatever their weights are.  Two
    passes that sum in another order then differ by float32 roundings, as many and as large as processor and shapes
    make them, although the weights are float64.
    """
    default = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("float32", "float"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def single(magnitude: float = 1.0, roundings: int = 64) -> float:
    """What this many roundings to single precision of a number of this magnitude come to, all in one direction.

    For what the package itself computes in single precision (experiments on the checkpoints that it ships, scores of
    float32 encoders).  Roundings of either sign partly cancel, so that 64 in one direction stand for many more; a
    mistake in the mathematics moves the number by far more.
    """
    return roundings * magnitude * torch.finfo(torch.float32).eps / 2
