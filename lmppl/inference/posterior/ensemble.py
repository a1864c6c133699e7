r"""The uncertainty of an answer in three parts: from chance, from latents (chains of thought), and from parameters.

There are C candidate answers y, a latent z (a chain) that leads to the answer, and J sets of parameters theta, the
members of an ensemble, with weights :math:`\pi_j`:

.. math:: p(y \mid x) = \sum_j \pi_j \sum_z p_j(z \mid x) \, p_j(y \mid x, z)

.. math::
    \underbrace{H[p(y \mid x)]}_{entropy} =
    \underbrace{E_{\theta, z} H[p(y \mid x, z, \theta)]}_{expected\ entropy} +
    \underbrace{E_\theta I(y; z \mid x, \theta)}_{chain\ information} +
    \underbrace{I(y; \theta \mid x)}_{parameter\ information}

The first part remains when chain and parameters are known.  The second is the information of the chain about the
answer, the third that of the parameters, which more training data reduce (Houlsby et al. 2011; Depeweg et al. 2018).

Shapes: C candidates, N particles in all, S of each member, (\*plates) questions.  Everything here is a function of two
averages over a member's particles, whose weights w are normalised within the member,

.. math:: a_j(c) = \sum_n w_{jn} \, p(y_c \mid z_n) \quad (C, J, *plates), \qquad
          e_j = \sum_n w_{jn} \, g(p(\cdot \mid z_n)) \quad (J, *plates)

with :math:`g(a) = m \log m - \sum_c a_c \log a_c`, m the sum of a: m times the entropy of a / m.  With
:math:`T = \sum_j \pi_j a_j` and M its sum, entropy, the members' mean entropy and the expected entropy are

.. math:: \frac{g(T)}{M}, \qquad \frac{\sum_j \pi_j \, g(a_j)}{M}, \qquad \frac{\sum_j \pi_j e_j}{M}

and the two informations are their differences.  If the candidates do not cover all answers (m < 1), everything is
conditional on the answer being one of them, as in `Prediction`.

With S draws of z per member in place of the sum, the estimate of the expected entropy is unbiased.  But entropy is
concave, so the entropy of an average of draws is too small; for one member by

.. math:: \frac1{2S} \sum_c \frac{\mathrm{Var}_z \, p_j(c \mid z)}{p_j(c)} + O(S^{-2})

which is (C - 1) / 2S if each chain is certain of its answer (Miller 1955).  So chain information is too small by this
amount, and 0 at S = 1.  Parameter information is too large, by the mean of this amount over members minus the bias of
the total entropy, which is 1 / J of it if the members agree: few chains per member look like members that disagree.
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
    r"""The entropy of an answer and the three parts that it is the sum of, in nats, (*plates) each.

    .. math:: entropy = expected\ entropy + chain\ information + parameter\ information

    `Ensemble.split` and `Ensemble.jackknife` return it.

    :param entropy: :math:`H[p(y \mid x)]`, of the average of all members.
    :param expected_entropy: :math:`E_{\theta, z} H[p(y \mid x, z, \theta)]`, which remains when chain and parameters
        are known.
    :param chain_information: :math:`E_\theta I(y; z \mid x, \theta)`, the information of the chain about the answer.
    :param parameter_information: :math:`I(y; \theta \mid x)`, that of the parameters, which more training data reduce.

    Source: Houlsby et al. 2011; Depeweg et al. 2018.

    Example::

        prediction = Importance(model).run(x, y).predict(model, ["ab", "c"], x, y)
        parts = Ensemble.of([prediction, prediction]).split()
        parts.parameter_information  # 0: the two members agree
    """

    entropy: Tensor
    expected_entropy: Tensor
    chain_information: Tensor
    parameter_information: Tensor


@dataclass(frozen=True, repr=False)
class Ensemble(Prediction):
    r"""The predictions of several members as one `Prediction`, whose particles are pairs of parameters and latent.

    .. math:: p(y \mid x) = \sum_j \pi_j \sum_n w_{jn} \, p_j(y \mid x, z_{jn})

    Members are adapters, EM runs from several seeds, samples of the parameters (`SGLD`), or any models that answer the
    same questions.  `Ensemble.of` builds it from their predictions.  `probabilities`, `vote` and `entropy` are those of
    the mixture; `mutual_information` is :math:`I(y; z, \theta)`.  `split` separates it into the parts of z and theta,
    and `jackknife` does so without the bias of few draws.

    :param names: the candidates as strings.
    :param log_probs: log p of each candidate under each particle, (C, N, *plates).
    :param log_weights: normalised log weights of all particles, (N, *plates).
    :param member: the member of each particle, (N,), from 0 to J - 1.

    Example::

        members = [Subjectivity(p).predict(x, num_particles=32) for p in adapters]
        found = Ensemble.of(members)
        found.probabilities  # (labels, sentences)
        found.jackknife().parameter_information  # (sentences,), nats: what more labelled sentences could reduce
    """

    member: Tensor

    @classmethod
    def of(cls, predictions: Sequence[Prediction], weights: Tensor | None = None) -> Ensemble:
        r"""Builds the ensemble of J members, whose predictions have the same candidates and plates.

        :param predictions: one `Prediction` of each member.
        :param weights: :math:`\pi`, (J,), positive; None: equal.
        :raises ValueError: for no predictions, for candidates or plates that differ, and for weights that are not J
            positive numbers.
        :raises ZeroEvidence: if all particles of a member have weight zero.
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
        """One line: the candidates, the shape (N, *plates), and the number of members."""
        return f"{super().__repr__().replace('Prediction', 'Ensemble', 1)[:-1]} of {self._count} members)"

    @property
    def members(self) -> list[Prediction]:
        """The prediction of each member."""
        return [
            Prediction(self.names, self.log_probs[:, own], self.log_weights[own].log_softmax(0))
            for own in (self.member == j for j in range(self._count))
        ]

    def split(self) -> Uncertainty:
        """The entropy and its three parts, in nats, (*plates) each.

        They are exact if the particles are all possible latents (`Enumeration`).  If the particles are draws, chain
        information is too small and parameter information too large, by O(1 / S) for S draws per member; see
        `jackknife`.

        :raises ZeroEvidence: if every candidate is impossible.
        """
        a = self._averages
        return self._parts(a.mass, a.of_members, a.of_particles, a.total)

    def jackknife(self) -> Uncertainty:
        r"""The entropy and its parts from independent draws of z, corrected for their bias to O(S^-2).

        .. math:: \hat T - \sum_j \frac{S_j - 1}{S_j} \sum_{i \in j} (\hat T_{-i} - \hat T)

        :math:`\hat T_{-i}` is the estimate without particle i, one of the :math:`S_j` of its member.  An information
        can be slightly negative.  Draws may be weighted (self-normalised importance sampling), but must be independent:
        enumerated latents, resampled particles and Markov chains are not.  The J members count as all there are; if
        they are a sample of the parameters, parameter information is too small by about 1 / J of itself.

        :raises ValueError: if a member has fewer than two particles with weight.

        Source: Quenouille 1956; Efron 1982.
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
        """The entropy and its parts from the averages, of which ``total`` is (C, ...)."""
        entropy, members, particles = _g(total) / mass, of_members / mass, of_particles / mass
        return Uncertainty(entropy, particles, members - particles, entropy - members)

    @property
    def _averages(self) -> _Averages:
        """The averages in double precision, up to a factor per plate element, which cancels."""
        normalised(self.log_weights + self.log_probs.amax(0))  # raises ZeroEvidence
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
    """The averages from which the parts are computed, of J members and N particles."""

    weights: Tensor  # (N, *plates), normalised within members
    p: Tensor  # (C, N, *plates)
    pi: Tensor  # (J, *plates)
    averages: Tensor  # (C, J, *plates)
    e: Tensor  # (J, *plates)
    total: Tensor  # (C, *plates)
    mass: Tensor  # (*plates), like the next two
    of_members: Tensor
    of_particles: Tensor


def _g(a: Tensor) -> Tensor:
    """m log m - sum of a log a over axis 0, with m the sum of a; this is m times the entropy of a / m."""
    m = a.sum(0)
    return torch.xlogy(m, m) - torch.xlogy(a, a).sum(0)
