"""Short programs with exact evidence for SMC, and guides of another network that are broader than the model."""

from __future__ import annotations

import pyro
import torch
from programs_by_hand import contains
from tiny import flat_lm
from torch import Tensor

from lmppl.constraints import ban
from lmppl.distributions import Completion

RUNS = 600
LM = flat_lm(vocab=6)  # <eos> . a b c d
OTHER = flat_lm("llama", vocab=6, seed=1)
A, B, C, D = (LM.encode(s)[0] for s in "abcd")
Y = LM.encode("b", stop="eos")


def prior(prompt="ab", lm=LM, **kwargs):
    return Completion(lm, prompt, **{"max_tokens": 3, "temperature": 3.0, **kwargs})


def proposal(prompt="b", **kwargs):
    """Another network's opinion, broad enough that weights have no heavy tail."""
    return prior(prompt, OTHER, **{"temperature": 4.0, **kwargs})


def likelihood(z: Tensor, lm=LM) -> Completion:
    return Completion(lm, lm.join("b", z), max_tokens=2, temperature=3.0)


def hard(z: Tensor) -> Tensor:
    """A factor: no "c" anywhere, and a "d"."""
    return torch.where(contains(z, D) & ~contains(z, C), 0.0, -torch.inf)


def runs() -> pyro.plate:
    return pyro.plate("runs", RUNS, dim=-1)


def evidence(fn: Completion, following) -> float:
    """sum_z p(z) exp following(z)."""
    with torch.no_grad():
        z = fn.enumerate_support()
        return float((fn.log_prob(z) + following(z)).double().logsumexp(0).exp())


def masked_program():
    def model():
        with runs():
            z = pyro.sample("z", prior())
            pyro.factor("hard", hard(z))
            pyro.sample("y", likelihood(z), obs=Y)

    def guide():
        with runs():
            pyro.sample("z", proposal(allowed=ban(LM, "c"), min_tokens=1))

    return model, guide, evidence(prior(), lambda z: hard(z) + likelihood(z).log_prob(Y))
