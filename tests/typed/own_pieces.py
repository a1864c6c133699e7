"""A user's own text distribution, algorithm, objective, constraint and tool."""

import math
from typing import Any, assert_type

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from lmppl import LanguageModel
from lmppl.distributions import AutoregressiveText, Completion
from lmppl.inference import Divergence, GFlowNet, Importance, Objective, Posterior, Query, Sampler, VarGrad, weigh
from lmppl.inference import compare as compare_algorithms
from lmppl.testing import TextContract
from lmppl.tools import Calculator


class Letters(AutoregressiveText):
    def __init__(self) -> None:
        super().__init__(["", "a", "b"], max_tokens=5, stop=0)

    def next_logits(self, prefix: Tensor, element: Tensor) -> Tensor:
        return torch.tensor([0.5, 1 / 3, 1 / 6]).log().expand(len(prefix), 3)


class TestLetters(TextContract):
    def distribution(self) -> Letters:
        return Letters()


def model() -> None:
    z = pyro.sample("z", Letters())
    pyro.factor("likes b", 1.0 * (z == 2).sum(-1))


class Rejection(Sampler):
    def __init__(self, model: Any, num_particles: int = 1000):
        self.model, self.num_particles = model, num_particles

    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        query = Query(self.model, None, args, kwargs)
        drawn = weigh(query, self.num_particles)
        kept = torch.rand_like(drawn.u).log() < drawn.u
        log_weights = torch.where(kept, -math.log(self.num_particles), -torch.inf)
        return Posterior.of(drawn.guide, drawn.plates, log_weights, query)


class Huber(Divergence):
    def f(self, r: Tensor) -> Tensor:
        return r - 1 - r.log()

    def g(self, delta: Tensor) -> Tensor:
        return delta**2


class Ring(Objective):
    uses_prefixes = False
    least_particles = 2

    def reduce(self, u: Tensor, balance: Any) -> Tensor:
        return self.divergence.pair(u - u.roll(1, dims=1)).sum((0, 1))


def odd(prefix: Tensor) -> Tensor:
    return torch.arange(100).expand(*prefix.shape[:-1], 100) % 2 == 1


def answer(lm: LanguageModel, x: Tensor) -> Tensor:
    found = Completion(lm, x, max_tokens=3, allowed=odd, tools=(Calculator(),))
    assert_type(found.log_prob(found.sample()), Tensor)
    return found.sample()


logits = torch.zeros(4, requires_grad=True)


def guide() -> None:
    pyro.sample("z", dist.Categorical(logits=logits))


letters = Letters()
assert_type(letters.log_prob(letters.sample()), Tensor)
objective = VarGrad(divergence=Huber())
GFlowNet(model, guide, objective, optimizer=torch.optim.Adam([logits], lr=0.1)).fit([()], 150, progress=False)
GFlowNet(model, guide, Ring(divergence="jensen_shannon"), optimizer=torch.optim.Adam([logits]))
assert_type(Rejection(model).run(), Posterior)
assert_type(Rejection(model).sized(8), Rejection)
compare_algorithms(model, {"rejection": Rejection(model), "importance": Importance(model)})
