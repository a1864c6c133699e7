"""`SGLD`: an optimiser whose parameters, after it has burned in, are samples of their posterior."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


class SGLD(Optimizer):
    r"""Stochastic gradient Langevin dynamics: gradient steps with noise, samples of p(theta | data).

    .. math:: \theta \leftarrow \theta - \frac\eta2 \nabla U(\theta) + \sqrt{\eta T} \, \epsilon,
        \quad \epsilon \sim N(0, 1), \qquad
        U(\theta) = loss(\theta) + \frac{|\theta|^2}{2 \sigma^2}

    The loss must be -log p(data | theta) in nats, summed over *all* data (a batch's, times how many batches there are),
    not clipped and not a mean.  As eta goes to zero samples are the posterior's under the prior
    :math:`N(0, \sigma^2)` of every parameter; at a fixed eta their variance is too large in the directions that the
    data tell most of, by 1 / (1 - eta a / 4) in one of curvature a, and where eta a > 4 they diverge.

    :param params: usually ``lm.trainable_parameters()``, an adapter's.
    :param lr: eta.  With N(0, sigma^2) alone it takes about :math:`4 \sigma^2 / \eta` steps to forget a sample.
    :param prior_scale: sigma.
    :param temperature: T.  1: the posterior.  Below, its power 1 / T, a *cold* posterior: ten thousands of parameters
        that ten labels say nothing of keep the posterior itself near its prior (Wenzel et al. 2020).
    :raises ValueError: where one of them is not positive.

    Source: Welling and Teh 2011.

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
        """One step of every parameter; one without a gradient follows its prior."""
        for group in self.param_groups:
            eta, sigma, noise = group["lr"], group["prior_scale"], math.sqrt(group["lr"] * group["temperature"])
            for theta in group["params"]:
                slope = theta / sigma**2
                if theta.grad is not None:
                    slope = slope + theta.grad
                theta.add_(slope, alpha=-eta / 2).add_(torch.randn_like(theta), alpha=noise)
