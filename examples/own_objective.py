"""An objective of one's own: a divergence (how u are compared) and a balance (which u), trained to the posterior."""

import math

import pyro
import pyro.distributions as dist
import torch

from lmppl.inference import Divergence, GFlowNet, Objective, VarGrad


class Huber(Divergence):
    """The squared loss up to a nat, linear beyond: g = x^2 for |x| <= 1, else 2|x| - 1."""

    def f(self, r):  # r f'(r) - f(r) is g'(log r): 2 log r, held between -2 and 2
        left, right = 2 + 2 * (1 - math.e) * r, (2 - 2 / math.e) * r - 2
        return torch.where(r < 1 / math.e, left, torch.where(r > math.e, right, 2 * (r - 1 - r.log())))

    def g(self, delta):
        near = delta.clamp(-1, 1)
        return near**2 + 2 * (delta - near).abs()


class Ring(Objective):
    """Each whole sample against the next, the last against the first: as many pairs as samples."""

    uses_prefixes = False  # u comes as (1, particle, *kept plates)
    least_particles = 2

    def reduce(self, u, balance):
        both = balance.valid & balance.valid.roll(1, dims=1)
        losses = self.divergence.pair(u - u.roll(1, dims=1)) * both
        return losses.sum((0, 1)) / both.sum((0, 1)).clamp(min=1)  # (*kept plates)


prior, rates, seen = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor(4.0)
truth = (prior.log() + dist.Poisson(rates).log_prob(seen)).softmax(0)


def model():
    z = pyro.sample("z", dist.Categorical(prior))
    pyro.sample("y", dist.Poisson(rates[z]), obs=seen)


def test(objective):
    """The loss is zero at the posterior; a guide that starts elsewhere is trained to it."""
    assert abs(objective.loss(model, lambda: pyro.sample("z", dist.Categorical(truth)))) < 1e-9
    logits = torch.zeros(4, requires_grad=True)

    def guide():
        pyro.sample("z", dist.Categorical(logits=logits))

    GFlowNet(model, guide, objective, optimizer=torch.optim.Adam([logits], lr=0.1)).fit([()], 150, progress=False)
    distance = (logits.softmax(0) - truth).abs().sum().item() / 2
    print(f"{type(objective).__name__} with {type(objective.divergence).__name__}: total variation {distance:.4f}")
    assert distance < 0.02


pyro.set_rng_seed(0)
test(VarGrad(divergence=Huber()))
test(Ring())
test(Ring(divergence="jensen_shannon"))
