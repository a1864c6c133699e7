"""A task for variational EM: p and q are adapters of one base, and the likelihood is enumerated."""

from __future__ import annotations

import pyro
import torch
from tiny import adapter, tiny_lm
from torch import Tensor

from lmppl.distributions import Completion
from lmppl.inference import GFlowNet, VariationalEM

SIZE = {"max_tokens": 2}
SGD, ADAM = torch.optim.SGD, torch.optim.Adam


class Task:
    """z ~ p(x), y ~ p(x z) for three observations, guided by q(y x); p and q are adapters of one base."""

    def __init__(self, x=("ab", "b", "ca"), y=("cb", "", "a"), layers: int = 1) -> None:
        self.lm = tiny_lm(vocab=5, seed=3, dtype=torch.float64, layers=layers)
        self.p, self.q = adapter(self.lm, 1), adapter(self.lm, 2)
        self.args = (self.lm.encode(list(x)), self.lm.encode(list(y), stop="eos"))

    def model(self, x, y, subsample=None, subsample_size=None):
        with pyro.plate("data", len(x), subsample=subsample, subsample_size=subsample_size) as i:
            z = pyro.sample("z", Completion(self.p, x[i], **SIZE))
            pyro.sample("y", Completion(self.p, self.p.join(x[i], z), **SIZE), obs=y[i])

    def guide(self, x, y, subsample=None, subsample_size=None):
        with pyro.plate("data", len(x), subsample=subsample, subsample_size=subsample_size) as i:
            pyro.sample("z", Completion(self.q, self.q.join(y[i], x[i]), **SIZE))

    @property
    def theta(self) -> list[Tensor]:
        return self.p.trainable_parameters()

    @property
    def phi(self) -> list[Tensor]:
        return self.q.trainable_parameters()

    def gflownet(self, lr: float = 1e-2, **kwargs) -> GFlowNet:
        return GFlowNet(self.model, self.guide, optimizer=torch.optim.AdamW(self.phi, lr=lr), **kwargs)

    def log_joint(self) -> Tensor:
        """log p(z, y) (K, data) over the support, with gradient."""
        x, y = self.args
        z = Completion(self.p, x, **SIZE).enumerate_support()
        return Completion(self.p, x, **SIZE).log_prob(z) + Completion(self.p, self.p.join(x, z), **SIZE).log_prob(y)

    def log_likelihood(self) -> float:
        with torch.no_grad():
            return self.log_joint().logsumexp(0).sum().item()

    def gradient(self, value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, self.theta)])

    def still(self, e_step, **kwargs) -> VariationalEM:
        """An M-step that finds its gradient and does not move."""
        guide = getattr(e_step, "guide", None)
        return VariationalEM(self.model, guide, e_step, SGD(self.theta, lr=0.0), **kwargs)

    def ascent(self, em: VariationalEM, *args, **kwargs) -> Tensor:
        """The gradient of Q that a round finds."""
        em.step(*(args or self.args), **kwargs)
        return -torch.cat([p.grad.flatten() for p in self.theta])
