"""z ~ LM(x), y ~ LM(x z) for three observations in a plate: a model, a guide, and its posteriors as fixtures."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from tiny import tiny_lm

from lmppl.distributions import Completion
from lmppl.inference import Enumerated, Enumeration, Importance, Posterior

P = tiny_lm(vocab=5, seed=0, dtype=torch.float64)  # <eos> . a b c
Q = tiny_lm(vocab=5, seed=1, dtype=torch.float64)
X, Y = P.encode(["a", "", "ba"]), P.encode(["ab", "b", ""], stop="eos")
LABELS = ["a", "b", "cc"]


def prior(x, lm=P, **rules) -> Completion:
    return Completion(lm, x, **{"max_tokens": 2, **rules})


def answer(x, z) -> Completion:
    return Completion(P, P.join(x, z), max_tokens=2)


def model(x=X, y=None):
    with pyro.plate("data", 3):
        z = pyro.sample("z", prior(x))
        pyro.sample("y", answer(x, z), obs=y)


def guide(x=X, y=None):
    with pyro.plate("data", 3):
        pyro.sample("z", prior(x, Q, temperature=1.5))


def joint(y=Y[0]):
    """A category, a text that depends on it, an observation."""
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)))
    z = pyro.sample("z", prior(X[0], temperature=1.0 + k))
    pyro.sample("y", answer(X[0], z), obs=y)


@pytest.fixture(scope="module")
def exact() -> Enumerated:
    return Enumeration(model).run(X, Y)


@pytest.fixture(scope="module")
def particles() -> Posterior:
    pyro.set_rng_seed(1)
    return Importance(model, guide, num_particles=60).run(X, Y)
