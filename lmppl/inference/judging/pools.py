r"""Whether the truth is a random member of its pool: tests of calibration that are exact at any number of data sets.

Of each data set the truth and the draws make a pool.  If the draws are the posterior's, the truth is any one of them
with the same probability, so that for every function g of a pool's members that does not know which is the truth

.. math:: Z = \frac{\sum_i g(z^*_i) - \sum_i E_i g}{\sqrt{\sum_i V_i g}}

has mean 0 and variance 1, with mean and variance over the pool of data set i.  Many functions are tested together:
their largest abs(Z) is held against that of truths drawn anew from the pools, which keeps the error of all together at
the level asked for, however they depend on each other (Westfall and Young 1993).

With g the rank this is simulation-based calibration without bins; its square distance from the middle finds a posterior
that is too narrow or too wide; counts of tokens, and how much of a pool a value takes, are functions of texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ... import text

MEMBERS = 128  # draws of a pool
REDRAWN = 2000  # truths drawn anew
TOKENS = 24  # that occur in most pools are counted, of each text
CLIP = 10.0  # nats below the best that are all the same


@dataclass
class Pool:
    """Draws and the truth, which comes last, of one run: one pool for each of the C plate elements."""

    weights: Tensor  # (n + 1, C), summing to one
    statistics: dict[str, Tensor]  # (n + 1, C) each
    log_densities: frozenset[str]  # the statistics that are log-probabilities, whose size in nats says something
    texts: dict[str, Tensor] = field(default_factory=dict)  # (n + 1, C, L) each
    kinds: Tensor | None = None  # (n + 1, C), a number for each distinct value of all sites together


@dataclass(frozen=True)
class Verdict:
    """Of one row of functions: the most extreme one, its Z, and the p-value of all rows' functions together."""

    p: float
    z: float
    function: str  # "rank", "spread", "share", or the token


def member_weights(log_weights: Tensor, n: Tensor) -> Tensor:
    """Weights of draws (N, C), worth n (C) independent ones, and of the truth beside them: (N + 1, C).

    Where no draw is possible the truth is alone in its pool, which then says nothing.
    """
    weights = log_weights.double().softmax(0)
    own = 1 / (n.double() + 1)  # 0 where the draws are the whole posterior
    none = (log_weights.amax(0) == -torch.inf) | own.isnan()
    weights = torch.cat([weights * (1 - own), own[None]]).masked_fill(none, 0.0)
    weights[-1] = weights[-1].masked_fill(none, 1.0)
    return weights


def ranks(x: Tensor, weights: Tensor) -> Tensor:
    """Mid-ranks in (0, 1) of members (n + 1, C) among their pools, by weight; ties up to rounding."""
    a, b = x[:, None].double(), x[None].double()
    tied = alike(a, b)
    below = (b < a) & ~tied
    return ((below + 0.5 * tied) * weights).sum(1)


def alike(a: Tensor, b: Tensor) -> Tensor:
    """Equal up to rounding: the same text may score a little differently in another row."""
    return (a == b) | a.isfinite() & ((a - b).abs() <= 1e-4 * (1 + a.abs()))


def judge(pools: list[Pool]) -> dict[str, Verdict]:
    """The verdict on every row of functions: each statistic, the tokens of each text, and shares of equal values."""
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
    # A token that hardly any pool has would be conspicuous at its first occurrence: one text more or less is nothing.
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
    """Functions of a pool's members, (n + 1, C) each, by row and name."""
    found = {}
    for name, x in pool.statistics.items():
        rank = ranks(x, pool.weights)
        found[name, "spread"] = (rank - 0.5) ** 2
        if name in pool.log_densities:  # where it hardly varies, its ranks say little
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
    """Sums over plate elements of functions (K, n + 1, C): at the truth, mean, variance, (K) each, and at truths drawn
    anew, (K, R).
    """
    mean = (weights * g).sum(1)  # (K, C)
    variance = (weights * (g - mean[:, None]) ** 2).sum(1)
    chosen = torch.multinomial(weights.T, REDRAWN, replacement=True)  # (C, R)
    redrawn = torch.stack([f.T.gather(1, chosen).sum(0) for f in g])
    return g[:, -1].sum(-1), mean.sum(-1), variance.sum(-1), redrawn


def _frequent(texts: list[Tensor]) -> Tensor:
    """The tokens that most texts of all pools have; which of them is the truth does not matter."""
    found = []
    for x in texts:
        x, _ = x.sort(-1)
        again = torch.cat([torch.zeros_like(x[..., :1], dtype=torch.bool), x[..., 1:] == x[..., :-1]], -1)
        found.append(x[~again & (x != text.PAD)])
    tokens, counts = torch.cat(found).unique(return_counts=True)
    return tokens[counts.argsort(descending=True)[:TOKENS]]
