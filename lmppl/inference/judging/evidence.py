r"""Whether an algorithm's evidence agrees with bounds from draws of its proposal.

Let A be the algorithm's estimate of the evidence, L that of M draws of the proposal, and U that of conditional
importance sampling, with the truth among the draws.  Then

.. math:: E[\log A] \le \log Z, \qquad E[\log L] \le \log Z \le E[\log U], \qquad E[A / U] = 1.

The last holds because A is unbiased, E[1/U] = 1/Z, and both are independent.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .calibration import Calibration

CONSPICUOUS = 1000.0  # with an unbiased evidence, `winnings` exceed this with a probability below 1 / 1000
LOOSE = 1.0  # a larger gap between A and U, in nats, is suspect
CUT = 5.0  # larger differences, in nats, count as this


def judge_evidence(found: Calibration) -> list[tuple[Any, ...]]:
    """The finding of the evidence bounds: name, figure, meaning, suspect, value, checked; none without an estimate."""
    name, own, below, above = "evidence sandwich", found.lowers, found.proposed, found.uppers
    if bool(above.isnan().any()):
        return [(name, "-", "the guide has auxiliary sites, for which the truth has no values", None, None, False)]
    if bool((missed := above == torch.inf).any()):
        share = float(missed.double().mean())
        return [
            (name, "inf", f"in {share:.0%} of the simulated data the proposal cannot draw the truth", True, math.inf)
        ]
    if bool(own.isnan().all()):
        return []
    gap, error = _mean(above - own)
    lack, lack_error = _mean(below - own)
    figure = f"{gap:.3f} +- {error:.3f}"
    if winnings((own - above).exp()) > CONSPICUOUS or gap < -4 * error:
        return [(name, figure, "above the upper bound: the evidence is too high, the weights are wrong", True, gap)]
    if lack > max(0.5, 4 * lack_error):
        meaning = f"the evidence is too low by at least {lack:.2g} nats: draws of the proposal find more"
        return [(name, figure, meaning, True, gap)]
    if gap > LOOSE and -lack < gap / 4:
        return [(name, figure, "nats up to the upper bound: the proposal misses posterior mass", True, gap)]
    meaning = "nats between the bounds of log Z"
    return [(name, figure, meaning if gap <= LOOSE else f"{meaning}: wide, because the proposal is poor", False, gap)]


def winnings(ratios: Tensor) -> float:
    r"""The capital won by bets that ratios (D) exceed their mean 1, :math:`\mathrm{mean}_b \prod_d (1 + b (r_d - 1))`.

    For independent ratios of mean at most 1, with any tails, it exceeds c with a probability below 1 / c.
    """
    bets = torch.tensor([0.02, 0.1, 0.3, 0.6, 1.0], dtype=torch.float64)
    total = torch.log1p(bets[:, None] * (ratios.double() - 1)).sum(1)
    return float((total.logsumexp(0) - math.log(len(bets))).clamp(max=700.0).exp())


def _mean(x: Tensor) -> tuple[float, float]:
    """The mean of differences, clipped at `CUT`, and its standard error."""
    x = x.double()[~x.isnan()].clamp(-CUT, CUT)  # NaN: both infinite
    return float(x.mean()), float(x.std() / len(x) ** 0.5) if len(x) > 1 else math.inf
