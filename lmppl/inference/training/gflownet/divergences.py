r"""Divergences: how an objective compares two values of u, each by a convex function g of their difference.

An f-divergence is :math:`D_f(p, q) = E_q f(p/q)`, f convex with f(1) = 0.  Its loss is the convex g with g(0) = g'(0) =
0 and, at :math:`r = e^\delta`,

.. math:: g'(\delta) = r f'(r) - f(r) + f(1) - f'(1), \qquad g''(\delta) = r^2 f''(r) \ge 0

Let :math:`u(z) = \log p(z, y) - \log q(z)`, so that :math:`e^{u - c}` is p(z | y) / q(z) at c = log Z.  On-policy, with
samples that carry no gradient,

.. math:: \nabla E_q\, g(u - \log Z) = E_q [ -g'(u - \log Z) \nabla \log q ] = E_q [ (f(r) - r f'(r)) \nabla \log q ]
          = \nabla D_f(p(\cdot \mid y), q)

because constants times :math:`\nabla \log q` vanish in expectation.  On samples from any other distribution g is still
a loss, zero where u = c.

If log Z is unknown, c is the number that fits the samples best, and the loss is :math:`\min_c \sum_n w_n g(u_n - c) /
\sum_n w_n`.  It does not change when a constant is added to u.  At the minimum :math:`\sum_n w_n g'(u_n - c) = 0`, so
that no gradient through c is needed.  On-policy, as the number of samples grows, this loss still minimises :math:`D_f`,
up to a positive factor, if g is squared or of the alpha family.  For the others c is log Z near balance only, and far
from it the loss minimises no :math:`D_f`.

Every g but :math:`|x|` has g''(0) = 2: near balance all of them are the squared loss.

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

HALVINGS = 50  # of the interval that contains the best c


class Divergence(ABC):
    r"""How an objective compares two values of u: a convex loss g of their difference.  A subclass defines `f` and `g`.

    .. math:: D_f(p, q) = E_q f(p/q), \qquad g'(\delta) = r f'(r) - f(r) + f(1) - f'(1) \text{ at } r = e^\delta

    The class attribute ``at_most`` tells how a reward of zero counts.  True: q should be at most at the floor, and less
    costs nothing; False: q should be at the floor exactly.

    Source: Fawkes and Hartford 2026, "f-trajectory balance"; docs/objectives.md.

    Example::

        class Huber(Divergence):  # the squared loss up to a nat, linear beyond
            def f(self, r):
                left, right = 2 - 3.437 * r, 1.264 * r - 2
                return torch.where(r < 0.368, left, torch.where(r > 2.718, right, 2 * (r - 1 - r.log())))

            def g(self, delta):
                near = delta.clamp(-1, 1)
                return near**2 + 2 * (delta - near).abs()

        GFlowNet(model, guide, VarGrad(divergence=Huber()), optimizer=optimizer).fit(batches, steps=100)
    """

    at_most = True

    @abstractmethod
    def f(self, r: Tensor) -> Tensor:
        """The function of the f-divergence; on-policy the objective minimises E_q f(p/q).

        :param r: ratios p/q, of any shape.
        :returns: f(r), of the same shape, with f(1) = 0.
        """

    @abstractmethod
    def g(self, delta: Tensor) -> Tensor:
        """The loss at a difference of u.

        :param delta: differences, nats, of any shape.
        :returns: g(delta), of the same shape; it and its gradient must be finite at any finite difference.
        """

    def slope(self, delta: Tensor) -> Tensor:
        """The derivative g', without gradient; by autograd where a subclass does not define it.

        :param delta: differences, nats, of any shape.
        :returns: g'(delta), of the same shape.
        """
        with torch.enable_grad():
            delta = delta.detach().requires_grad_()
            return torch.autograd.grad(self.g(delta).sum(), delta)[0]

    def fit(self, u: Tensor, weight: Tensor) -> Tensor:
        """The c that fits best: where the weighted mean of g'(u - c) is zero, found by bisection.

        :param u: (n, ...), nats.
        :param weight: (n, ...), not negative.
        :returns: c, (...).
        """
        u, there = u.detach(), weight > 0
        low = u.masked_fill(~there, torch.inf).amin(0)
        low, high = low.nan_to_num(posinf=0.0), u.masked_fill(~there, -torch.inf).amax(0).nan_to_num(neginf=0.0)
        for _ in range(HALVINGS):
            c = (low + high) / 2
            below = (weight * self.slope(u - c)).sum(0) > 0
            low, high = torch.where(below, c, low), torch.where(below, high, c)
        return (low + high) / 2

    def spread(self, u: Tensor, weight: Tensor) -> Tensor:
        """The weighted mean of g(u - c) at the best c.

        :param u: (n, ...), nats.
        :param weight: (n, ...), not negative.
        :returns: (...).
        """
        return mean(self.g(u - self.fit(u, weight)), weight)

    def pair(self, delta: Tensor) -> Tensor:
        """The loss at a difference of two u of which neither is the reference, (g(x) + g(-x)) / 2.

        :param delta: differences, nats, of any shape.
        :returns: of the same shape.
        """
        return (self.g(delta) + self.g(-delta)) / 2

    def pairs(self, u: Tensor, valid: Tensor) -> Tensor:
        """The mean of `pair` over all pairs.

        :param u: (n, ...), nats.
        :param valid: (n, ...), which u count.
        :returns: (...); 0 where there is no pair.
        """
        i, j = torch.triu_indices(len(u), len(u), 1, device=u.device)
        both = valid[i] & valid[j]
        return (self.pair(u[i] - u[j]) * both).sum(0) / both.sum(0).clamp(min=1)


class Squared(Divergence):
    """g = x^2, from f = 2 (r - 1 - log r): twice KL(q, p).  The best c is the mean of u, the spread its variance.

    A reward of zero asks q for the floor exactly.
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
        """Twice the unbiased variance, which needs no double loop."""
        count = valid.sum(0)
        average = (u * valid).sum(0) / count.clamp(min=1)
        return 2 * ((u - average) ** 2 * valid).sum(0) / (count - 1).clamp(min=1)


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    r"""An alpha-divergence: alpha = 1 is KL(p, q), whose g is Linex; 2 is chi-square, 1/2 Hellinger's.

    .. math:: f = 2 \frac{r^\alpha - \alpha r + \alpha - 1}{\alpha (\alpha - 1)}, \qquad
              g = \frac{2}{\alpha^2} (e^{\alpha x} - \alpha x - 1), \qquad
              \min_c \overline{g(u - c)} = \frac2\alpha \Big(\frac1\alpha \log \overline{e^{\alpha u}} - \bar u\Big)

    At alpha = 1, f is 2 (r log r - r + 1); the limit alpha = 0 is the squared divergence.  The best c is the log of a
    mean, :math:`\frac1\alpha \log \overline{e^{\alpha u}}`.  The slope of the minimum in u_n is :math:`2/\alpha` times
    a softmax less 1/N, so it is bounded whatever u is.  Where c is not fitted, g continues as its tangent beyond
    :math:`\alpha x = 20`, where its slope is 1e9 / alpha.

    :param alpha: at least 0.01.
    :raises ValueError: for a smaller alpha, or an infinite one.

    >>> AlphaDivergence(1.0).g(torch.tensor([-1.0, 0.0, 1.0]))  # 2 (e^x - x - 1)
    tensor([0.7358, 0.0000, 1.4366])
    >>> DIVERGENCES["forward_kl"] == AlphaDivergence(1.0)
    True
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
    r"""g' = 4 log((1 + e^x) / 2), from eight times the Jensen-Shannon divergence.

    .. math:: f = 4 \Big(r \log \frac{2r}{1 + r} + \log \frac{2}{1 + r}\Big), \qquad
              g = 4 \Big(-\mathrm{Li}_2(-e^x) - \frac{\pi^2}{12} - x \log 2\Big)

    g is linear for x << 0 and squared for x >> 0.
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
    w = torch.where(x > 0, -x, x).exp().log1p()  # not -|x|: torch has slope 0 for it at 0
    square, value = w**2, torch.zeros_like(w)
    for b in reversed(BERNOULLI):
        value = value * square + b
    left = w + w**2 / 4 + w**3 * value
    return torch.where(x > 0, math.pi**2 / 6 + x**2 / 2 - left, left)


BERNOULLI = [  # B_n / (n + 1)! for n = 2, 4, .., 14
    1 / 36, -1 / 3600, 1 / 211680, -1 / 10886400, 1 / 526901760, -691 / 16999766784000, 1 / 1120863744000,
]  # fmt: skip


class TotalVariation(Divergence):
    r"""g = abs(x), from twice the total variation, :math:`\sum_z |p(z) - q(z)|`; the best c is the median of u.

    The slope depends on the sign of x only.  The loss is zero at the posterior, but steps of constant size do not
    converge.
    """

    def f(self, r: Tensor) -> Tensor:
        return (r - 1).abs()

    def g(self, delta: Tensor) -> Tensor:
        return delta.abs()

    def fit(self, u: Tensor, weight: Tensor) -> Tensor:
        """The weighted median, one of the u, *with* its gradient, which balances the slopes of the other u."""
        order = u.detach().argsort(0)
        below = weight.gather(0, order).cumsum(0)
        middle = (below >= below[-1:] / 2).int().argmax(0, keepdim=True)
        return u.gather(0, order.gather(0, middle))[0]


class LogCosh(Divergence):
    r"""g = 2 log cosh x, a smooth total variation: squared near 0, 2 abs(x) - 2 log 2 far from it.

    .. math:: f = 2 (1 - r) + 4 r (\arctan r - \pi/4), \qquad g' = 2 \tanh x
    """

    def f(self, r: Tensor) -> Tensor:
        return 2 * (1 - r) + 4 * r * (r.atan() - math.pi / 4)

    def g(self, delta: Tensor) -> Tensor:
        return 2 * (torch.logaddexp(delta, -delta) - math.log(2))

    def slope(self, delta: Tensor) -> Tensor:
        return 2 * delta.tanh()


def mean(x: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean over the first axis; 0 where all weights are zero."""
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
    """The divergence itself, or the one of this name in `DIVERGENCES`."""
    if isinstance(divergence, str) and divergence in DIVERGENCES:
        return DIVERGENCES[divergence]
    if not isinstance(divergence, Divergence):
        raise ValueError(f"divergence: expected a Divergence or one of {list(DIVERGENCES)}, got {divergence!r}")
    return divergence
