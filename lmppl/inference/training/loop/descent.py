r"""One step of an optimiser that lowers the mean of the losses of k batches.

.. math:: g = \tfrac1k \sum_{j=1}^k \nabla \mathcal L_j

Each batch adds its part of the gradient; the last one clips it and steps.  If every batch has equally many
observations, g is the gradient of one batch k times as large.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...processes import distributed


class Descent:
    """Counts the batches whose gradients are added up."""

    def __init__(self) -> None:
        self.batches = 1  # in an update
        self.done = 0  # of these batches

    @contextmanager
    def over(self, batches: int) -> Iterator[None]:
        """A context in which an update has this many batches; an unfinished update is discarded at its end."""
        self.batches, self.done = batches, 0
        try:
            yield
        finally:
            self.batches, self.done = 1, 0

    def down(self, loss: Tensor, optimizer: Optimizer, parameters: Sequence[Tensor], clip: float) -> float:
        """Adds this loss's gradient; after the last one steps and returns the norm before clipping, else returns NaN.

        :raises FloatingPointError: where the loss or the gradient is not finite; the parameters are then unchanged.
        """
        if self.done == 0:
            optimizer.zero_grad(set_to_none=True)
        loss = distributed.share() * loss
        if not math.isfinite(value := distributed.total(loss.item())):
            self._forget(optimizer)
            raise FloatingPointError(f"the loss is {value}; nothing was updated")
        (loss / self.batches if self.batches > 1 else loss).backward()
        self.done += 1
        if self.done < self.batches:
            return math.nan
        self.done = 0
        distributed.sum_gradients(list(parameters))
        norm = distributed.whole(torch.nn.utils.clip_grad_norm_(parameters, clip)).item()
        if not math.isfinite(norm):
            self._forget(optimizer)
            raise FloatingPointError(f"the loss is {value}, its gradient's norm {norm}; nothing was updated")
        optimizer.step()
        return norm

    def _forget(self, optimizer: Optimizer) -> None:
        self.done = 0
        optimizer.zero_grad(set_to_none=True)


def mean(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the batches of an update that have it and where it is not NaN."""
    if len(metrics) == 1:
        return metrics[0]
    found = {}
    for name in dict.fromkeys(name for one in metrics for name in one):
        values = [one[name] for one in metrics if name in one]
        numbers = [x for x in values if not math.isnan(x)]
        found[name] = sum(numbers) / len(numbers) if numbers else math.nan
    return found
