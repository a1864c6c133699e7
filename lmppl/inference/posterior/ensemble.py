r"""Where the uncertainty of an answer comes from: chance, latents (chains of thought), parameters.

An answer y among C candidates, a latent z (a chain) that leads to it, parameters theta of which there are J sets, the
members of an ensemble with weights :math:`\pi_j`:

.. math:: p(y \mid x) = \sum_j \pi_j \sum_z p_j(z \mid x) \, p_j(y \mid x, z)

.. math::
    \underbrace{H[p(y \mid x)]}_{entropy} =
    \underbrace{E_{\theta, z} H[p(y \mid x, z, \theta)]}_{expected\ entropy} +
    \underbrace{E_\theta I(y; z \mid x, \theta)}_{chain\ information} +
    \underbrace{I(y; \theta \mid x)}_{parameter\ information}

The first part stays when chain and parameters are known.  The second is what a chain would tell of the answer, the
third what the parameters would: the part that more training data take away (Houlsby et al. 2011; Depeweg et al. 2018).

Shapes: C candidates, N particles in all, S of them a member's, (\*plates) questions.  Everything here is a function of
two averages over a member's particles, whose weights w are normalised within the member,

.. math:: a_j(c) = \sum_n w_{jn} \, p(y_c \mid z_n) \quad (C, J, *plates), \qquad
          e_j = \sum_n w_{jn} \, g(p(\cdot \mid z_n)) \quad (J, *plates)

with :math:`g(a) = m \log m - \sum_c a_c \log a_c`, m the sum of a: m times the entropy of a / m.  With
:math:`T = \sum_j \pi_j a_j` and M its sum, entropy, the members' mean entropy and the expected entropy are

.. math:: \frac{g(T)}{M}, \qquad \frac{\sum_j \pi_j \, g(a_j)}{M}, \qquad \frac{\sum_j \pi_j e_j}{M}

and the informations are their differences.  Where candidates leave mass to other answers (m < 1), everything is given
that the answer is one of them, as in `Prediction`.

With S draws of z a member in place of the sum, expected entropy is unbiased, but entropy is concave: the entropy of an
average is too small, of one member by

.. math:: \frac1{2S} \sum_c \frac{\mathrm{Var}_z \, p_j(c \mid z)}{p_j(c)} + O(S^{-2})

((C - 1) / 2S of chains that are certain of their answers: Miller 1955).  So chain information is too small by this, 0
at S = 1; and parameter information is too large, by the mean of this over members less what entropy loses, which is
1 / J of it where members agree: the noise of few chains looks like members that disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .log_weights import normalised
from .predictive import Prediction


class Uncertainty(NamedTuple):
    """Entropy in nats, each (*plates), and the three parts that it is the sum of."""

    entropy: Tensor
    expected_entropy: Tensor
    chain_information: Tensor
    parameter_information: Tensor


@dataclass(frozen=True, repr=False)
class Ensemble(Prediction):
    r"""The predictions of several members: one `Prediction`, whose particles are pairs of parameters and latent.

    .. math:: p(y \mid x) = \sum_j \pi_j \sum_n w_{jn} \, p_j(y \mid x, z_{jn})

    Members are adapters, EM runs from several seeds, samples of the parameters (`SGLD`), or models of any kind that
    answer the same questions.  ``member`` (N,) says whose particle each is, 0 to J - 1.

    `probabilities`, `vote` and `entropy` are the mixture's, `mutual_information` that of answer and pair,
    :math:`I(y; z, \theta)`; `split` tells the two apart, `jackknife` without the bias of few draws.

    Example::

        members = [Subjectivity(p).predict(x, num_particles=32) for p in adapters]
        found = Ensemble.of(members)
        found.probabilities  # (labels, sentences)
        found.jackknife().parameter_information  # (sentences,), nats: what more labelled sentences could tell
    """

    member: Tensor

    @classmethod
    def of(cls, predictions: Sequence[Prediction], weights: Tensor | None = None) -> Ensemble:
        r"""The ensemble of these members, which share candidates and plates.

        :param weights: :math:`\pi` (J,), positive; None: equal.

        :raises ValueError: where there are none, where candidates or plates differ, and for weights that are not J
            positive numbers.  ZeroEvidence where all particles of a member have weight zero.
        """
        if not predictions:
            raise ValueError("predictions: there are none")
        first = predictions[0]
        for p in predictions[1:]:
            if p.names != first.names:
                raise ValueError(f"predictions: candidates differ, {first.names} and {p.names}")
            if p.log_probs.shape[2:] != first.log_probs.shape[2:]:
                plates = tuple(first.log_probs.shape[2:]), tuple(p.log_probs.shape[2:])
                raise ValueError(f"predictions: plates differ, {plates[0]} and {plates[1]}")
        count, device = len(predictions), first.log_probs.device
        pi = torch.ones(count) if weights is None else torch.as_tensor(weights)
        pi = pi.double()
        if pi.shape != (count,) or not bool((pi > 0).all() & pi.isfinite().all()):
            raise ValueError(f"weights: expected {count} positive numbers, got {weights}")
        log_pi = (pi / pi.sum()).log().to(first.log_weights)
        return cls(
            first.names,
            torch.cat([p.log_probs for p in predictions], 1),
            torch.cat([w + normalised(p.log_weights).log() for w, p in zip(log_pi, predictions, strict=True)]),
            torch.arange(count, device=device).repeat_interleave(
                torch.tensor([p.log_probs.shape[1] for p in predictions], device=device)
            ),
        )

    def __repr__(self) -> str:
        """One line: the candidates, and how many particles of how many members."""
        return f"{super().__repr__().replace('Prediction', 'Ensemble', 1)[:-1]} of {self._count} members)"

    @property
    def members(self) -> list[Prediction]:
        """Each one's own prediction."""
        return [
            Prediction(self.names, self.log_probs[:, own], self.log_weights[own].log_softmax(0))
            for own in (self.member == j for j in range(self._count))
        ]

    def split(self) -> Uncertainty:
        """Entropy and its parts, each (*plates), in nats: exact where the particles are every latent there is.

        Of draws they are the plug-in estimates, with the bias that the head of this module tells; see `jackknife`.
        Raises ZeroEvidence where every candidate is impossible.
        """
        a = self._averages
        return self._parts(a.mass, a.of_members, a.of_particles, a.total)

    def jackknife(self) -> Uncertainty:
        r"""The same from independent draws of z, less the first order of their bias: what is left is O(S^-2).

        .. math:: \hat T - \sum_j \frac{S_j - 1}{S_j} \sum_{i \in j} (\hat T_{-i} - \hat T)

        with :math:`\hat T_{-i}` the estimate without particle i of the :math:`S_j` of its member.  An information may
        come out slightly negative.  The J members are taken for all there are; for a sample of the parameters they are
        few by the same law, and parameter information is too small by about 1 / J of itself.  Draws may be weighted
        (self-normalised importance sampling).  Sums over all latents, resampled particles and Markov chains are no
        independent draws.  Sources: Quenouille 1956; Efron 1982.

        :raises ValueError: where a member has fewer than two particles with weight.
        """
        a = self._averages
        whole = self._parts(a.mass, a.of_members, a.of_particles, a.total)
        size = torch.bincount(self.member)
        if bool((a.weights > 1 - 1e-9).any()):
            raise ValueError(f"jackknife: a member needs two particles with weight; its members have {size.tolist()}")
        w, pi, of = a.weights, a.pi[self.member], self.member
        without = ((a.averages[:, of] - w * a.p) / (1 - w)).clamp(min=0.0)  # its member's average without a particle
        change = pi * (without - a.averages[:, of])
        total = a.total[:, None] + change  # (C, N, *plates), as all that follow
        members = a.of_members + pi * (_g(without) - _g(a.averages)[of])
        expected = (a.e[of] - w * _g(a.p)) / (1 - w)
        particles = a.of_particles + pi * (expected - a.e[of])
        left_out = self._parts(total.sum(0), members, particles, total)
        share = ((size - 1) / size)[of].reshape(-1, *[1] * (w.dim() - 1))  # (N, 1..)
        return Uncertainty(*(t - (share * (t_i - t)).sum(0) for t, t_i in zip(whole, left_out, strict=True)))

    @staticmethod
    def _parts(mass: Tensor, of_members: Tensor, of_particles: Tensor, total: Tensor) -> Uncertainty:
        """The four of (C, ...) totals, in order of the sum."""
        entropy, members, particles = _g(total) / mass, of_members / mass, of_particles / mass
        return Uncertainty(entropy, particles, members - particles, entropy - members)

    @property
    def _averages(self) -> _Averages:
        """In double precision, up to a factor for each plate element, which cancels."""
        normalised(self.log_weights + self.log_probs.amax(0))  # else there is nothing to speak of
        log_w = self.log_weights.double()
        members = [self.member == j for j in range(self._count)]
        log_pi = torch.stack([log_w[own].logsumexp(0) for own in members])  # (J, *plates)
        w = (log_w - log_pi[self.member]).exp()
        p = (self.log_probs - self.log_probs.amax((0, 1))).double().exp()  # (C, N, *plates)
        averages = torch.stack([(w * p)[:, own].sum(1) for own in members], 1)
        e = torch.stack([(w * _g(p))[own].sum(0) for own in members])
        pi = log_pi.exp()
        total = (pi * averages).sum(1)
        return _Averages(w, p, pi, averages, e, total, total.sum(0), (pi * _g(averages)).sum(0), (pi * e).sum(0))

    @property
    def _count(self) -> int:
        return int(self.member.max()) + 1


class _Averages(NamedTuple):
    """What the parts are made of: J members, N particles."""

    weights: Tensor  # (N, *plates), normalised within members
    p: Tensor  # (C, N, *plates)
    pi: Tensor  # (J, *plates)
    averages: Tensor  # (C, J, *plates)
    e: Tensor  # (J, *plates)
    total: Tensor  # (C, *plates)
    mass: Tensor  # (*plates), as what follows
    of_members: Tensor
    of_particles: Tensor


def _g(a: Tensor) -> Tensor:
    """m log m - sum of a log a over axis 0, m the sum of a: m times the entropy of a / m."""
    m = a.sum(0)
    return torch.xlogy(m, m) - torch.xlogy(a, a).sum(0)
