r"""Divergences: how an objective compares two values of u, each a convex g of their difference.

A divergence is a convex f with f(1) = 0, :math:`D_f(p, q) = E_q f(p/q)`; its loss is the convex g with g(0) = g'(0) = 0
and, at :math:`r = e^\delta`,

.. math:: g'(\delta) = r f'(r) - f(r) + f(1) - f'(1), \qquad g''(\delta) = r^2 f''(r) \ge 0

Let :math:`u(z) = \log p(z, y) - \log q(z)`, so that :math:`e^{u - c}` is p(z | y) / q(z) at c = log Z.  With the
samples not differentiated, on-policy,

.. math:: \nabla E_q\, g(u - \log Z) = E_q [ -g'(u - \log Z) \nabla \log q ] = E_q [ (f(r) - r f'(r)) \nabla \log q ]
          = \nabla D_f(p(\cdot \mid y), q)

since constants times :math:`\nabla \log q` vanish in expectation.  On samples from anywhere else g is a loss still,
zero where u = c.  Without log Z there is the c that fits the samples best: the loss is then
:math:`\min_c \sum_n w_n g(u_n - c) / \sum_n w_n`, which does not change where u does by a constant.  At the minimum
:math:`\sum_n w_n g'(u_n - c) = 0`, so that no gradient through c is needed.  On-policy, with ever more samples, that
descends :math:`D_f` still, but for a positive factor, if g is squared or of the alpha family; of the others c is log Z
only near balance, and far from it what is descended is no :math:`D_f`.

Every g but |x| has g''(0) = 2: near balance all of them are the squared loss.

Source: Fawkes and Hartford 2026, "f-trajectory balance", arXiv 2605.15417.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

HALVINGS = 50  # of the interval in which the best c lies


class Divergence(ABC):
    r"""A convex g; a subclass says g, and the f it comes from.

    ``at_most``: a reward of zero asks q for its floor *at most*, less is as good; else for just that.

    docs/extending.md writes a new one.
    """

    at_most = True

    @abstractmethod
    def f(self, r: Tensor) -> Tensor:
        """f of the ratio p/q, f(1) = 0; on-policy, the objective descends E_q f."""

    @abstractmethod
    def g(self, delta: Tensor) -> Tensor:
        """The loss at a difference of u, of the same shape: finite, with its gradient, at any finite difference."""

    def slope(self, delta: Tensor) -> Tensor:
        """g', without gradient."""
        with torch.enable_grad():
            delta = delta.detach().requires_grad_()
            return torch.autograd.grad(self.g(delta).sum(), delta)[0]

    def fit(self, u: Tensor, weight: Tensor) -> Tensor:
        """The c that fits best, (n, ...) -> (...); by bisection, where the weighted mean of g'(u - c) changes sign."""
        u, there = u.detach(), weight > 0
        low = u.masked_fill(~there, torch.inf).amin(0)
        low, high = low.nan_to_num(posinf=0.0), u.masked_fill(~there, -torch.inf).amax(0).nan_to_num(neginf=0.0)
        for _ in range(HALVINGS):
            c = (low + high) / 2
            below = (weight * self.slope(u - c)).sum(0) > 0
            low, high = torch.where(below, c, low), torch.where(below, high, c)
        return (low + high) / 2

    def spread(self, u: Tensor, weight: Tensor) -> Tensor:
        """The weighted mean of g(u - c) at the c that fits best: (n, ...) -> (...)."""
        return mean(self.g(u - self.fit(u, weight)), weight)

    def pair(self, delta: Tensor) -> Tensor:
        """The loss at a difference of which no side is the reference: (g(x) + g(-x)) / 2."""
        return (self.g(delta) + self.g(-delta)) / 2

    def pairs(self, u: Tensor, valid: Tensor) -> Tensor:
        """The mean of `pair` over all pairs, (n, ...) -> (...); 0 where there is none."""
        i, j = torch.triu_indices(len(u), len(u), 1, device=u.device)
        both = valid[i] & valid[j]
        return (self.pair(u[i] - u[j]) * both).sum(0) / both.sum(0).clamp(min=1)


class Squared(Divergence):
    r"""g = x^2, which is twice KL(q, p); the best c is the mean, the spread the variance.

    A reward of zero asks for its floor exactly.
    """

    at_most = False

    def f(self, r: Tensor) -> Tensor:
        return 2 * (r - 1 - r.log())

    def g(self, delta: Tensor) -> Tensor:
        return delta**2

    def fit(self, u: Tensor, weight: Tensor) -> Tensor:
        return mean(u, weight)

    def spread(self, u: Tensor, weight: Tensor) -> Tensor:
        return mean((u - mean(u, weight)) ** 2, weight)

    def pair(self, delta: Tensor) -> Tensor:
        return delta**2

    def pairs(self, u: Tensor, valid: Tensor) -> Tensor:
        """Twice the unbiased variance: no double loop."""
        count = valid.sum(0)
        average = (u * valid).sum(0) / count.clamp(min=1)
        return 2 * ((u - average) ** 2 * valid).sum(0) / (count - 1).clamp(min=1)


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    r"""The alpha-divergences: 1 is KL(p, q), whose g is Linex; 2 is chi-square; 1/2 is Hellinger's; 0 would be squared.

    .. math:: f = 2 \frac{r^\alpha - \alpha r + \alpha - 1}{\alpha (\alpha - 1)}, \qquad
              g = \frac{2}{\alpha^2} (e^{\alpha x} - \alpha x - 1), \qquad
              \min_c \overline{g(u - c)} = \frac2\alpha \Big(\frac1\alpha \log \overline{e^{\alpha u}} - \bar u\Big)

    At alpha = 1, f is 2 (r log r - r + 1).  The best c is the log of a mean, :math:`\frac1\alpha \log
    \overline{e^{\alpha u}}`; the slope of the minimum in u_n, a softmax less 1/N, is bounded whatever u is.  Where c is
    not fitted, g goes on as its tangent beyond :math:`\alpha x = 20`, where its slope is 1e9 / alpha.

    :param alpha: at least 0.01.
    """

    alpha: float

    def __post_init__(self) -> None:
        if not 0.01 <= self.alpha < math.inf:
            raise ValueError(f"alpha: expected a number >= 0.01, got {self.alpha}")

    def f(self, r: Tensor) -> Tensor:
        a = self.alpha
        if a == 1.0:
            return 2 * (r * r.log() - r + 1)
        return 2 * (r**a - a * r + a - 1) / (a * (a - 1))

    def g(self, delta: Tensor) -> Tensor:
        x = self.alpha * delta
        near, beyond = x.clamp(max=LARGEST_EXPONENT), (x - LARGEST_EXPONENT).relu()
        return 2 / self.alpha**2 * (near.expm1() - near + math.expm1(LARGEST_EXPONENT) * beyond)

    def fit(self, u: Tensor, weight: Tensor) -> Tensor:
        log_weight = weight.log().masked_fill(weight <= 0, -torch.inf)
        total = weight.sum(0).clamp(min=1e-30).log()
        return ((self.alpha * u + log_weight).logsumexp(0) - total) / self.alpha

    def spread(self, u: Tensor, weight: Tensor) -> Tensor:
        some = (weight > 0).any(0)
        u, weight = u.where(some, 0.0), weight.where(some, 1.0)
        return 2 / self.alpha * (self.fit(u, weight) - mean(u, weight))


LARGEST_EXPONENT = 20.0


class JensenShannon(Divergence):
    r"""g' = 4 log((1 + e^x) / 2), eight times the Jensen-Shannon divergence: g is linear on the left, squared right.

    .. math:: f = 4 \Big(r \log \frac{2r}{1 + r} + \log \frac{2}{1 + r}\Big), \qquad
              g = 4 \Big(-\mathrm{Li}_2(-e^x) - \frac{\pi^2}{12} - x \log 2\Big)
    """

    def f(self, r: Tensor) -> Tensor:
        return 4 * (r * (2 * r / (1 + r)).log() + (2 / (1 + r)).log())

    def g(self, delta: Tensor) -> Tensor:
        return 4 * (softplus_integral(delta) - math.pi**2 / 12 - delta * math.log(2))

    def slope(self, delta: Tensor) -> Tensor:
        return 4 * (torch.logaddexp(delta, torch.zeros_like(delta)) - math.log(2))


def softplus_integral(x: Tensor) -> Tensor:
    r"""The integral of log(1 + e^t) for t up to x, :math:`-\mathrm{Li}_2(-e^x)`.

    For x <= 0, with w = log(1 + e^x) <= log 2 and Bernoulli's numbers B,
    :math:`\sum_n B_n w^{n+1} / (n+1)! + w^2/2`; for x > 0 by inversion, :math:`\pi^2/6 + x^2/2` less that at -x.
    """
    w = torch.where(x > 0, -x, x).exp().log1p()  # not -|x|, whose slope at 0 is none
    square, value = w**2, torch.zeros_like(w)
    for b in reversed(BERNOULLI):
        value = value * square + b
    left = w + w**2 / 4 + w**3 * value
    return torch.where(x > 0, math.pi**2 / 6 + x**2 / 2 - left, left)


BERNOULLI = [  # B_n / (n + 1)! for n = 2, 4, .., 14
    1 / 36, -1 / 3600, 1 / 211680, -1 / 10886400, 1 / 526901760, -691 / 16999766784000, 1 / 1120863744000,
]  # fmt: skip


class TotalVariation(Divergence):
    r"""g = |x|, which is twice the total variation, :math:`\sum_z |p(z) - q(z)|`; the best c is the median.

    Its slope knows the sign of x alone: the loss vanishes at the posterior, but steps of one size do not settle there.
    """

    def f(self, r: Tensor) -> Tensor:
        return (r - 1).abs()

    def g(self, delta: Tensor) -> Tensor:
        return delta.abs()

    def fit(self, u: Tensor, weight: Tensor) -> Tensor:
        """The median under the weights, one of the u, *with* gradient: its share is what balances the other slopes."""
        order = u.detach().argsort(0)
        below = weight.gather(0, order).cumsum(0)
        middle = (below >= below[-1:] / 2).int().argmax(0, keepdim=True)
        return u.gather(0, order.gather(0, middle))[0]


class LogCosh(Divergence):
    r"""g = 2 log cosh x, a smooth total variation: squared near 0, 2|x| - 2 log 2 far from it.

    .. math:: f = 2 (1 - r) + 4 r (\arctan r - \pi/4), \qquad g' = 2 \tanh x
    """

    def f(self, r: Tensor) -> Tensor:
        return 2 * (1 - r) + 4 * r * (r.atan() - math.pi / 4)

    def g(self, delta: Tensor) -> Tensor:
        return 2 * (torch.logaddexp(delta, -delta) - math.log(2))

    def slope(self, delta: Tensor) -> Tensor:
        return 2 * delta.tanh()


def mean(x: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean over the first axis; 0 where there is no weight."""
    return (weight * x).sum(0) / weight.sum(0).clamp(min=1e-30)


SQUARED, LINEX = Squared(), AlphaDivergence(1.0)

#: The divergences by the names that an objective's ``divergence=`` takes.
DIVERGENCES: Mapping[str, Divergence] = MappingProxyType(
    {
        "squared": SQUARED,
        "reverse_kl": SQUARED,
        "forward_kl": LINEX,
        "linex": LINEX,
        "chi_square": AlphaDivergence(2.0),
        "hellinger": AlphaDivergence(0.5),
        "jensen_shannon": JensenShannon(),
        "total_variation": TotalVariation(),
        "log_cosh": LogCosh(),
    }
)


def named(divergence: Divergence | str) -> Divergence:
    """A divergence as it is, or by its name in `DIVERGENCES`."""
    if isinstance(divergence, str) and divergence in DIVERGENCES:
        return DIVERGENCES[divergence]
    if not isinstance(divergence, Divergence):
        raise ValueError(f"divergence: expected a Divergence or one of {list(DIVERGENCES)}, got {divergence!r}")
    return divergence
