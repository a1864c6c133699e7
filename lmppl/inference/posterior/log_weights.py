"""Pure functions of log weights (N, *plates): normalisation, effective sample size, Pareto k-hat."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

NAMED = 5  # plate elements in a message


class ZeroEvidence(ValueError):
    """Raised where every particle has weight zero, so that no posterior is defined.

    It is a ValueError.  ``run`` itself does not raise it: it returns ``log_evidence`` -inf, and `Posterior.table`,
    `Posterior.resample` and `Posterior.predictive` raise it.

    Example::

        impossible = lm.encode([" ", " "])  # without a stop token: no text of this site
        posterior = Importance(model, num_particles=8).run(x, impossible)
        try:
            posterior.table("z", index=0)
        except ZeroEvidence:
            print("no particle explains the observation")
    """


def no_particle(where: Sequence[str] = (), why: Sequence[str] = ()) -> str:
    """The message of `ZeroEvidence`: at which plate elements, and why observed texts are impossible, if they are."""
    named = [f" at {', '.join(where[:NAMED])}"] if any(where) else []
    named += [f" and {len(where) - NAMED} more elements"] if len(where) > NAMED else []
    reason = "; ".join(why) or (
        "the observation or a factor rules all of them out; use more particles, a better guide, or check that observed "
        "texts end with their stop token"
    )
    return f"every particle has probability zero under the model{''.join(named)}: {reason}"


def normalised(log_weights: Tensor) -> Tensor:
    """Weights that sum to one over axis 0.

    :raises ZeroEvidence: if all weights of a plate element are zero.
    """
    if bool((log_weights.amax(0) == -torch.inf).any()):
        raise ZeroEvidence(no_particle())
    return log_weights.softmax(0)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over axis 0; 0 where all weights are zero."""
    ess = 1 / log_weights.softmax(0).square().sum(0)
    return torch.where(log_weights.amax(0) == -torch.inf, 0.0, ess)


def pareto_khat(log_weights: Tensor) -> float:
    r"""The shape k of a generalised Pareto distribution fitted to the largest min(N/5, 3 sqrt N) weights.

    Weights have about :math:`1/k` finite moments.  Below 0.5 their variance is finite and averages are good.  Up to 0.7
    averages are usable.  Above 0.7 the proposal misses mass of the posterior: an average needs about `smallest_sample`
    :math:`= 10^{1/(1 - \max(0, k))}` particles, which is 10 at k = 0, 100 at 0.5 and 2,200 at 0.7.  For k >= 1 the mean
    of the weights is infinite, and no N bounds the error.

    Equal texts have equal weights: weights tied with the smallest of the tail are left out of the tail.  The result is
    NaN for N < 50, or with fewer than 10 distinct weights left, to which no tail can be fitted; -inf with none left.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry 2024, Sections 2.4 and 3.  The fit is Pyro's; it agrees with
    ``arviz.psislw``.
    """
    n = len(log_weights)
    tail = math.ceil(min(0.2 * n, 3 * n**0.5))
    if n < 50 or not bool(log_weights.isfinite().any()):
        return float("nan")
    weights, _ = (log_weights - log_weights.max()).double().exp().sort()
    threshold = weights[-tail - 1]
    excess = weights[-tail:] - threshold
    tied = excess <= 1e-5 * threshold  # equal up to rounding: few distinct texts, or equal weights
    if int(tied.sum()) >= 3 or bool(excess[0] == 0):
        excess = excess[~tied]
        if not len(excess):
            return float("-inf")
    if int((excess.diff() > 1e-5 * threshold).sum()) < 9:
        return float("nan")
    k, _ = fit_generalized_pareto(excess)
    return float(k)


def smallest_sample(khat: float) -> float:
    """The number of particles that a reliable average needs at this k-hat: 10^(1 / (1 - max(0, k))), inf for k >= 1."""
    return 10 ** (1 / (1 - max(0.0, khat))) if khat < 1 else float("inf")
