"""A latent text and an observation after it, and the posterior with every text listed."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from hypothesis import strategies as st
from pyro import poutine
from tiny import flat_lm
from torch import Tensor

from lmppl import text
from lmppl.distributions import Completion

LMS = [flat_lm(vocab=5, seed=s, dtype=torch.float64) for s in range(3)]
SEED = st.integers(0, 2)
Y = "ab"


def infilling(lm, x, y, *, scale=1.0, **rules):
    """z ~ lm(x), y ~ lm(x z), under the rules given for z."""
    rules.setdefault("max_tokens", 3)

    def model():
        with poutine.scale(scale=scale):
            z = pyro.sample("z", Completion(lm, x, **rules))
        pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=4), obs=y)

    return model


def brute(lm, x, y, *, scale=1.0, **rules) -> tuple[Tensor, Tensor]:
    """Every z with log p(z) * scale + log p(y | x z)."""
    rules.setdefault("max_tokens", 3)
    fn = Completion(lm, x, **rules)
    support = fn.enumerate_support()
    with torch.no_grad():
        prior = fn.log_prob(support)
        rest = Completion(lm, lm.join(x, support), max_tokens=4).log_prob(y)
    return support, torch.where(prior == -torch.inf, prior, scale * prior) + rest


def as_dict(values: Tensor, log_weights: Tensor) -> dict[tuple[int, ...], float]:
    rows = {}
    for v, w in zip(values.tolist(), log_weights.tolist(), strict=True):
        if w > -math.inf:
            key = tuple(i for i in v if i != text.PAD)
            assert key not in rows, "a value occurs twice"
            rows[key] = w
    return rows


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-9)
