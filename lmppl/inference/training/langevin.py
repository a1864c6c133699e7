"""`SGLD`: an optimiser whose parameters, after a burn-in, are samples of their posterior."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


class SGLD(Optimizer):
    r"""Stochastic gradient Langevin dynamics: gradient steps with noise, which sample p(theta | data).

    .. math:: \theta \leftarrow \theta - \frac\eta2 \nabla U(\theta) + \sqrt{\eta T} \, \epsilon,
        \quad \epsilon \sim N(0, 1), \qquad
        U(\theta) = loss(\theta) + \frac{|\theta|^2}{2 \sigma^2}

    The loss must be -log p(data | theta) in nats, summed over *all* data (the loss of a batch times the number of
    batches), neither clipped nor a mean.  As eta goes to zero, the samples are those of the posterior under the prior
    :math:`N(0, \sigma^2)` of every parameter.  At a fixed eta their variance is too large where the data determine the
    parameters best: by the factor 1 / (1 - eta a / 4) in a direction of curvature a.  Where eta a > 4 they diverge.

    :param params: the tensors to sample, usually ``lm.trainable_parameters()``, those of an adapter.
    :param lr: eta, the step size.  Under the prior alone it takes about :math:`4 \sigma^2 / \eta` steps until samples
        are nearly independent.
    :param prior_scale: sigma, the standard deviation of the prior.
    :param temperature: T.  1 gives the posterior.  Less gives its power 1 / T, a *cold* posterior: the posterior of
        tens of thousands of parameters given ten labels stays near the prior (Wenzel et al. 2020).
    :raises ValueError: where one of the three numbers is not positive and finite.

    Source: Welling and Teh 2011, "Bayesian learning via stochastic gradient Langevin dynamics".

    Example::

        sampler = SGLD(q.trainable_parameters(), lr=1e-6, prior_scale=0.05)
        for step in range(5):
            sampler.zero_grad()
            nll = -Completion(q, x, max_tokens=4).log_prob(y).sum()
            nll.backward()
            sampler.step()
    """

    def __init__(self, params: Iterable[Tensor], *, lr: float, prior_scale: float, temperature: float = 1.0):
        defaults = {"lr": lr, "prior_scale": prior_scale, "temperature": temperature}
        for name, value in defaults.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: must be positive and finite, got {value}")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Makes one step of every parameter; a parameter without a gradient follows the prior alone.

        :param closure: None; torch's interface has it.
        """
        for group in self.param_groups:
            eta, sigma, noise = group["lr"], group["prior_scale"], math.sqrt(group["lr"] * group["temperature"])
            for theta in group["params"]:
                slope = theta / sigma**2
                if theta.grad is not None:
                    slope = slope + theta.grad
                theta.add_(slope, alpha=-eta / 2).add_(torch.randn_like(theta), alpha=noise)
