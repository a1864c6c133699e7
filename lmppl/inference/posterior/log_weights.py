"""Pure functions of log weights (N, *plates): normalisation, effective sample size, Pareto k-hat."""

from __future__ import annotations

import math

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor


class ZeroEvidence(ValueError):
    """Every particle has weight zero: there is no posterior to speak of."""


def normalised(log_weights: Tensor) -> Tensor:
    """Weights that sum to one over axis 0. Raises ZeroEvidence where all are zero."""
    if bool((log_weights.amax(0) == -torch.inf).any()):
        raise ZeroEvidence(
            "every particle has probability zero under the model: the observation or a factor rules all of them out; "
            "use more particles, a better guide, or check that observed texts end with their stop token"
        )
    return log_weights.softmax(0)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over axis 0; 0 where all weights are zero."""
    ess = 1 / log_weights.softmax(0).square().sum(0)
    return torch.where(log_weights.amax(0) == -torch.inf, 0.0, ess)


def pareto_khat(log_weights: Tensor) -> float:
    r"""The shape k of a generalised Pareto distribution fitted to the largest min(N/5, 3 sqrt N) weights.

    Weights have about :math:`1/k` finite moments.  Below 0.5 their variance is finite and averages are good; up to 0.7
    they are usable; above, the proposal misses mass of the posterior and no affordable N helps: an average needs
    about `smallest_sample` :math:`= 10^{1/(1 - \max(0, k))}` particles, 10 at k = 0, 100 at 0.5, 2,200 at 0.7, and at
    k >= 1 it has no error that any N would bound.

    Equal texts have equal weights: those tied with the smallest of the tail are left out of it.  NaN for N < 50 or with
    fewer than 10 distinct weights left, to which no tail can be fitted; -inf with none.  Source: Vehtari, Simpson,
    Gelman, Yao and Gabry 2024, Sections 2.4 and 3; the fit is Pyro's and agrees with ``arviz.psislw``.
    """
    n = len(log_weights)
    tail = math.ceil(min(0.2 * n, 3 * n**0.5))
    if n < 50 or not bool(log_weights.isfinite().any()):
        return float("nan")
    weights, _ = (log_weights - log_weights.max()).double().exp().sort()
    threshold = weights[-tail - 1]
    excess = weights[-tail:] - threshold
    tied = excess <= 1e-5 * threshold  # up to rounding: few distinct texts, or weights all alike
    if int(tied.sum()) >= 3 or bool(excess[0] == 0):
        excess = excess[~tied]
        if not len(excess):
            return float("-inf")
    if int((excess.diff() > 1e-5 * threshold).sum()) < 9:
        return float("nan")
    k, _ = fit_generalized_pareto(excess)
    return float(k)


def smallest_sample(khat: float) -> float:
    """How many particles a reliable average needs at this k-hat, 10^(1 / (1 - max(0, k))); inf from k = 1 on."""
    return 10 ** (1 / (1 - max(0.0, khat))) if khat < 1 else float("inf")
