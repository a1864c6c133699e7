"""`Labelling`: what follows from the two factors p(z | x) and p(y | x, z) of labels y with a reason z."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..distributions import Completion, NextToken
from ..embedded import Sentence
from ..inference import Prediction
from ..language_model import LanguageModel
from ..shapes import broadcast_shapes
from ..text import length


class Labelling:
    r"""The base class of programs with these two factors and a proposal: sums over all reasons, and predictions.

    .. math:: p(z, y \mid x) = p(z \mid x) \, p(y \mid x, z), \qquad p(y \mid x) = \sum_z p(z, y \mid x)
    """

    lm: LanguageModel
    labels: tuple[str, ...]
    penalty: float  # nats, where another label is more probable
    plainly: str  # the prompt without a reason
    prior: Callable[[Tensor], Completion]  # p(z | x)
    proposal: Callable[[Tensor], Completion]  # q(z | x)
    log_labels: Callable[[Tensor, Tensor], Tensor]  # log p(y | x, z) for reasons (..., B, L): (..., B, C)

    def log_joint(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(z, y | x) of every possible reason z, by one pass over all of them; with gradient.

        :param x: sentences, (B, L).
        :param y: labels, (B,).
        :returns: (K, B).
        :raises ValueError: where there are more than a million reasons.
        """
        prior = self.prior(x)
        z = prior.enumerate_support()  # (K, B, L)
        log_p = self.log_labels(x, z)
        own = at(log_p, y)
        return prior.log_prob(z) + own - self.penalty * (own < log_p[..., : len(self.labels)].amax(-1))

    def log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        r"""log p(y | x) :math:`= \log \sum_z p(z, y | x)`, exactly; with gradient.

        :param x: sentences, (B, L).
        :param y: labels, (B,).
        :returns: (B,), nats.
        """
        return self.log_joint(x, y).logsumexp(0)

    @torch.no_grad()
    def predict(self, x: Tensor, sampler: str = "prior", num_particles: int | None = None) -> Prediction:
        r"""Predicts the labels' probabilities :math:`\sum_n w_n p(y \mid x, z_n)` and the vote, without y.

        :param x: sentences, (B, L).
        :param sampler: who draws the reasons: "prior", p(z | x), or "guide", q(z | x), which must read x alone.
        :param num_particles: how many draws; None: the sum over every reason.
        :returns: a `Prediction`.
        :raises ValueError: for another ``sampler``.
        """
        if sampler not in ("prior", "guide"):
            raise ValueError(f"sampler: expected 'prior' or 'guide', got {sampler!r}")
        fn = self.prior(x) if sampler == "prior" else self.proposal(x)
        if num_particles is None:
            z = fn.enumerate_support()
            log_weights = fn.log_prob(z)
        else:
            z = fn.sample(torch.Size([num_particles]))
            log_weights = torch.full(z.shape[:-1], -math.log(num_particles), device=z.device)
        log_p = self.log_labels(x, z)[..., : len(self.labels)]
        return Prediction(list(self.labels), log_p.movedim(-1, 0), log_weights)

    def examples(self, sentences: Sequence[Sentence], tokens: int) -> str:
        """Labelled sentences for few-shot prompting, a line each: as many as fit into ``tokens``.

        :param sentences: the sentences, taken in their order.
        :param tokens: the most tokens of all lines.
        :returns: a string.
        """
        shown = ""
        for s in sentences:
            longer = f"{shown}{self.plainly.format(x=s.text)} {s.label}.\n"
            if int(length(self.lm.encode(longer))) > tokens:
                break
            shown = longer
        return shown


def at(log_p: Tensor, y: Tensor) -> Tensor:
    """The entry of the outcome y (..., B) in log_p (..., B, C)."""
    batch = broadcast_shapes(log_p.shape[:-1], y.shape)
    return log_p.expand(*batch, -1).gather(-1, y.expand(batch)[..., None])[..., 0]


def scores(lm: LanguageModel, context: Tensor, labels: Tensor) -> Tensor:
    """log p of each label (C, L) after a context (..., L'): (..., C)."""
    if labels.shape[-1] == 1:  # one pass for all of them
        return NextToken(lm, context).logits[..., labels[:, 0]]
    return Completion(lm, context[..., None, :], max_tokens=length(labels), stop=None).log_prob(labels)
