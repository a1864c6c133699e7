r"""Tests of calibration that are exact for any number of data sets: whether the truth is a random member of its pool.

The pool of a data set is the truth and the posterior's draws.  If the posterior is correct, every member is the truth
with the same probability.  So for every function g of a pool's members that does not depend on which is the truth,

.. math:: Z = \frac{\sum_i g(z^*_i) - \sum_i E_i g}{\sqrt{\sum_i V_i g}}

has mean 0 and variance 1, where :math:`E_i` and :math:`V_i` are mean and variance over the pool of data set i.  Many
functions are tested together: their largest abs(Z) is compared with that of truths drawn again from the pools.  This
keeps the error of all tests together at the chosen level, for any dependence between them (Westfall and Young 1993).

With the rank as g this is simulation-based calibration without bins.  The square distance of the rank from the middle
finds a posterior that is too narrow or too wide.  Further functions, of texts, are counts of tokens, and the share of a
pool that has the same value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ... import text

MEMBERS = 128  # draws of a pool
REDRAWN = 2000  # truths drawn again from each pool
TOKENS = 24  # the most frequent tokens of each text, which are counted
CLIP = 10.0  # log-densities further below the best, in nats, count as this


@dataclass
class Pool:
    """The draws of one run and the truth, which is last: one pool for each of the C plate elements."""

    weights: Tensor  # (n + 1, C), summing to one
    statistics: dict[str, Tensor]  # (n + 1, C) each
    log_densities: frozenset[str]  # the statistics that are log-probabilities, whose differences in nats matter
    texts: dict[str, Tensor] = field(default_factory=dict)  # (n + 1, C, L) each
    kinds: Tensor | None = None  # (n + 1, C), a number for each distinct joint value of all sites


@dataclass(frozen=True)
class Verdict:
    """The most extreme function of one row, its Z, and its p-value among the functions of all rows together."""

    p: float
    z: float
    function: str  # "rank", "spread", "share", or the token


def member_weights(log_weights: Tensor, n: Tensor) -> Tensor:
    """The weights of draws (N, C), which are worth n (C) independent ones, and of the truth: (N + 1, C).

    If no draw is possible, the truth is the only member of its pool, which then has no effect.
    """
    weights = log_weights.double().softmax(0)
    own = 1 / (n.double() + 1)  # 0 where the draws are the whole posterior
    none = (log_weights.amax(0) == -torch.inf) | own.isnan()
    weights = torch.cat([weights * (1 - own), own[None]]).masked_fill(none, 0.0)
    weights[-1] = weights[-1].masked_fill(none, 1.0)
    return weights


def ranks(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted mid-ranks in (0, 1) of members (n + 1, C) in their pools; values equal up to rounding are ties."""
    a, b = x[:, None].double(), x[None].double()
    tied = alike(a, b)
    below = (b < a) & ~tied
    return ((below + 0.5 * tied) * weights).sum(1)


def alike(a: Tensor, b: Tensor) -> Tensor:
    """Whether values are equal up to rounding; the same text can have a slightly different score in another row."""
    return (a == b) | a.isfinite() & ((a - b).abs() <= 1e-4 * (1 + a.abs()))


def judge(pools: list[Pool]) -> dict[str, Verdict]:
    """A verdict for each statistic, for the tokens of each text, and for the shares of equal values."""
    if not pools:
        return {}
    counted = {site: _frequent([pool.texts[site] for pool in pools]) for site in pools[0].texts}
    names: list[tuple[str, str]] = []
    totals = []
    for pool in pools:
        functions = _functions(pool, counted)
        names = list(functions)
        totals.append(_total(torch.stack(list(functions.values())), pool.weights))
    truth, mean, variance, redrawn = (torch.stack(x).sum(0) for x in zip(*totals, strict=True))
    # A token that few pools have would stand out at its first occurrence, so one text more or less is tolerated.
    slack = torch.tensor([0.0 if function in ("rank", "spread", "share") else 1.0 for _, function in names])
    varies = variance > 1e-9
    sd = (variance + slack).sqrt().masked_fill(~varies, torch.inf)
    z = (truth - mean) / sd  # (K)
    largest = ((redrawn - mean[:, None]) / sd[:, None]).abs().amax(0)  # (R)
    found: dict[str, Verdict] = {}
    for (row, function), value in zip(names, z.tolist(), strict=True):
        if row not in found or abs(value) > abs(found[row].z):
            p = (1 + int((largest >= abs(value) - 1e-9).sum())) / (1 + len(largest))
            found[row] = Verdict(p, value, function)
    return found


def _functions(pool: Pool, counted: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """The functions of a pool's members, (n + 1, C) each, by row and name."""
    found = {}
    for name, x in pool.statistics.items():
        rank = ranks(x, pool.weights)
        found[name, "spread"] = (rank - 0.5) ** 2
        if name in pool.log_densities:  # ranks of values that differ little count less
            near = x.double().clamp(min=x.amax(0).clamp(min=-1e30) - CLIP)
            deviation = (pool.weights * (near - (pool.weights * near).sum(0)) ** 2).sum(0).sqrt()
            rank = rank * deviation.clamp(max=1.0)
        found[name, "rank"] = rank
    for site, tokens in counted.items():
        for token in tokens.tolist():
            found[f"tokens of {site}", str(token)] = (pool.texts[site] == token).sum(-1).double()
    if pool.kinds is not None:
        mass = pool.weights.new_zeros(int(pool.kinds.max()) + 1, pool.weights.shape[1])
        found["equal values", "share"] = mass.scatter_add(0, pool.kinds, pool.weights).gather(0, pool.kinds)
    return found


def _total(g: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over plate elements of functions (K, n + 1, C): at the truth, of means and of variances, (K) each, and at
    truths drawn again, (K, R).
    """
    mean = (weights * g).sum(1)  # (K, C)
    variance = (weights * (g - mean[:, None]) ** 2).sum(1)
    chosen = torch.multinomial(weights.T, REDRAWN, replacement=True)  # (C, R)
    redrawn = torch.stack([f.T.gather(1, chosen).sum(0) for f in g])
    return g[:, -1].sum(-1), mean.sum(-1), variance.sum(-1), redrawn


def _frequent(texts: list[Tensor]) -> Tensor:
    """The tokens that occur in the most texts of all pools, regardless of which text is the truth."""
    found = []
    for x in texts:
        x, _ = x.sort(-1)
        again = torch.cat([torch.zeros_like(x[..., :1], dtype=torch.bool), x[..., 1:] == x[..., :-1]], -1)
        found.append(x[~again & (x != text.PAD)])
    tokens, counts = torch.cat(found).unique(return_counts=True)
    return tokens[counts.argsort(descending=True)[:TOKENS]]
