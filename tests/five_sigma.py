"""Statistical assertions: within 5 standard errors of the exact value, and sharp enough to say something."""

from __future__ import annotations

import torch
from torch import Tensor


def within(estimates: Tensor, exact: float | Tensor, sharp: float = 0.2) -> None:
    """The mean over axis 0 lies within 5 standard errors of the exact value, these less than ``sharp`` times it."""
    assert bool(estimates.isfinite().all())
    mean, error = estimates.double().mean(0), estimates.double().std(0) / len(estimates) ** 0.5
    exact = torch.as_tensor(exact, dtype=torch.float64)
    assert bool(((mean - exact).abs() <= 5 * error + 1e-5 * exact).all()), (mean, exact, error)
    assert bool((error < sharp * exact).all()), "the test says little: more runs"


def evidence_within(log_evidence: Tensor, exact: Tensor, sharp: float = 0.2, slack: float = 0.0) -> None:
    """Mean evidence, relative to the exact one, within 5 standard errors of 1, these less than ``sharp``."""
    ratio = (log_evidence.double() - exact).exp()
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert abs(float(ratio.mean()) - 1) <= 5 * error + slack, (float(ratio.mean()), error)
    assert error < sharp, "the test says little: more runs"


def assert_counts(count: Tensor, p: Tensor, n: int, rare: int = 10, cells: int = 1) -> None:
    """Counts of n draws within 5 standard deviations of n p.

    Cells that expect fewer than ``rare`` are taken together, so that at least ``cells`` of them are compared.
    """
    count, p = count.flatten().double(), p.flatten().double()
    assert int(count.sum()) == n and bool((count[p == 0] == 0).all())
    few = p * n < rare
    count = torch.cat([count[~few], count[few].sum()[None]])
    p = torch.cat([p[~few], p[few].sum()[None]])
    assert len(p) >= cells, "the test says little: more draws"
    slack = torch.where(p * n < 10, 5.0, 0.0)  # a Poisson tail is longer than a normal one
    assert bool(((count - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + slack + 1e-9).all()), (count, n * p)
