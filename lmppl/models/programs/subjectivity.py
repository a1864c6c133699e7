"""Subjectivity: the label of a sentence follows from a reason that is not observed.

z ~ LM("{x} because of"),    y ~ LM("{x} because of{z}") among the labels, observed;    wanted: p(z | x, y), p(y | x)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.distributions import Categorical
from torch import Tensor

from ...constraints import Constraint
from ...distributions import Completion
from ...embedded import Sentence
from ...embedded.subjectivity import LABELS, PLAINLY, REASONS, STOP, WHY
from ...language_model import LanguageModel
from ..labels import Labelling, at, scores

SEEN = "{y}.\n"  # before the prompt of a guide that reads the label too
READS = "xy", "x"
LONGEST_REASON = 5  # tokens, as in the paper


class Subjectivity(Labelling):
    r"""The model and guide of subjectivity: a reason z between a sentence x and its label y.

    .. math:: p(z, y \mid x) = p(z \mid x) \, p(y \mid x, z)

    :param lm: the language model of p(z | x).
    :param guide_lm: the guide's language model, usually ``lm.with_adapter(...)``; None: there is no guide.
    :param likelihood_lm: the language model of p(y | x, z); None: ``lm``.  With an adapter of its own, EM changes p(y |
        x, z) alone; with ``lm=p, likelihood_lm=p`` it changes both factors.
    :param labels: the texts that y may be; y is an index into them.
    :param reads: "xy": a guide q(z | x, y); "x": a guide q(z | x) as in the paper, which can predict.
    :param min_tokens: the fewest tokens of a reason before its stop.
    :param max_tokens: the most tokens of a reason before its stop.
    :param allowed: a constraint on the reason's tokens; "reasons": the twelve reasons of the embedded language model;
        None: there is none.
    :param normalised: True: p(y | x, z) is normalised over the labels.  False: it is the language model's own, and the
        rest is one more outcome, the index ``len(labels)``.
    :param penalty: nats subtracted where another label has a higher p(y | x, z) than the observed one.
    :param why: the prompt of a reason, with the field x.
    :param then: the text between the reason and the label.
    :param stop: the reason's stop.
    :param plainly: the prompt of a label without a reason, with the field x.
    :raises ValueError: for other values of ``reads``, and for another string as ``allowed``.

    `model(x, y)` and `guide(x, y)` are Pyro programs over texts x (B, L) and labels y (B,), with one plate of
    sentences.  y may be None, to predict it.  The latent site is "z", (B, max_tokens + 1).

    Source: Hu et al. 2024, "Amortizing intractable inference in large language models", section 4.3.

    Example::

        q, p = (lm.with_adapter(LoraConfig(r=16, target_modules="all-linear")) for _ in range(2))
        task = Subjectivity(lm, q, likelihood_lm=p, allowed="reasons", max_tokens=2)
        x, y = task.encode(embedded.data("subjectivity", "train")[:10])
        posterior = Importance(task.model, task.guide, num_particles=64).run(x, y)
    """

    def __init__(
        self,
        lm: LanguageModel,
        guide_lm: LanguageModel | None = None,
        *,
        likelihood_lm: LanguageModel | None = None,
        labels: Sequence[str] = LABELS,
        reads: str = "xy",
        min_tokens: int = 1,
        max_tokens: int = LONGEST_REASON,
        allowed: Constraint | str | None = None,
        normalised: bool = True,
        penalty: float = 0.0,
        why: str = WHY,
        then: str = "",
        stop: str = STOP,
        plainly: str = PLAINLY,
    ):
        if reads not in READS:
            raise ValueError(f"reads: expected one of {', '.join(map(repr, READS))}, got {reads!r}")
        self.lm, self.guide_lm, self.likelihood_lm = lm, guide_lm, likelihood_lm or lm
        self.labels, self.reads, self.normalised, self.penalty = tuple(labels), reads, normalised, penalty
        self.why, self.then, self.plainly = why, then, plainly
        self.label_texts = lm.encode([f" {label}" for label in labels])  # (C, L)
        if isinstance(allowed, str):
            if allowed != "reasons":
                raise ValueError(f"allowed: expected a constraint or 'reasons', got {allowed!r}")
            allowed = allowed_words(lm)
        self.reason: dict[str, Any] = dict(min_tokens=min_tokens, max_tokens=max_tokens, stop=stop, allowed=allowed)

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """z ~ p(z | x); y ~ p(y | x, z).

        :param x: sentences, (B, L).
        :param y: labels, (B,); None: they are drawn.
        :returns: z, (..., B, max_tokens + 1).
        """
        with pyro.plate("sentences", len(x)):
            z = pyro.sample("z", self.prior(x))
            log_p = self.log_labels(x, z)
            said = pyro.sample("y", Categorical(logits=log_p), obs=y)
            if self.penalty:
                pyro.factor("wrong label", -self.penalty * (at(log_p, said) < log_p[..., : len(self.labels)].amax(-1)))
            return z

    def guide(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """z ~ q(z | x, y), or q(z | x).

        :param x: sentences, (B, L).
        :param y: labels, (B,); None is possible where the guide reads x alone.
        :returns: z, (..., B, max_tokens + 1).
        """
        with pyro.plate("sentences", len(x)):
            return pyro.sample("z", self.proposal(x, y))

    def direct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """y ~ LM("{x} is") among the labels, without a reason: a Pyro program.

        :param x: sentences, (B, L).
        :param y: labels, (B,); None: they are drawn.
        :returns: y, (..., B).
        """
        with pyro.plate("sentences", len(x)):
            return pyro.sample("y", Categorical(logits=self.log_direct(x)), obs=y)

    def prior(self, x: Tensor) -> Completion:
        """p(z | x).

        :param x: sentences, (B, L).
        :returns: a `Completion`.
        """
        return Completion(self.lm, self.lm.fill(self.why, x=x), **self.reason)

    def proposal(self, x: Tensor, y: Tensor | None = None) -> Completion:
        """q(z | x, y), or q(z | x).

        :param x: sentences, (B, L).
        :param y: labels, (B,); None is possible where the guide reads x alone.
        :returns: a `Completion`.
        :raises ValueError: where there is no guide, or it needs y.
        """
        if self.guide_lm is None:
            raise ValueError("guide_lm: this Subjectivity was made without a guide")
        if self.reads == "x":
            prompt = self.guide_lm.fill(self.why, x=x)
        elif y is None:
            raise ValueError("y: this guide reads it; predict by the prior, or by a guide with reads='x'")
        else:
            prompt = self.guide_lm.fill(SEEN + self.why, x=x, y=self.label_texts[y])
        return Completion(self.guide_lm, prompt, **self.reason)

    def log_labels(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(y | x, z) of every label.

        :param x: sentences, (B, L).
        :param z: reasons, (..., B, L').
        :returns: (..., B, C), with one more outcome where p(y | x, z) is not normalised.
        """
        lm = self.likelihood_lm
        return self._outcomes(scores(lm, lm.join(lm.fill(self.why, x=x), z, self.then), self.label_texts))

    def log_direct(self, x: Tensor, before: Tensor | str = "") -> Tensor:
        """log p(y | x) of every label, without a reason.

        :param x: sentences, (B, L).
        :param before: a text before each sentence, e.g. labelled examples.
        :returns: (B, C), with one more outcome where p(y | x) is not normalised.
        """
        lm = self.likelihood_lm
        return self._outcomes(scores(lm, lm.join(before, lm.fill(self.plainly, x=x)), self.label_texts))

    def _outcomes(self, log_p: Tensor) -> Tensor:
        if self.normalised:
            return log_p.log_softmax(-1)
        rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(log_p.dtype).tiny)
        return torch.cat([log_p, rest.log()], -1)

    def encode(self, sentences: Sequence[Sentence]) -> tuple[Tensor, Tensor]:
        """The arguments of model and guide for these sentences.

        :param sentences: B of them.
        :returns: (x, y).
        """
        y = torch.tensor([self.labels.index(s.label) for s in sentences], device=self.lm.device)
        return self.lm.encode([s.text for s in sentences]), y


def allowed_words(lm: LanguageModel, words: Sequence[str] = REASONS) -> Tensor:
    """A mask (V,) that allows these words and the stop as the only tokens of a reason."""
    mask = torch.zeros(lm.vocab_size, dtype=torch.bool, device=lm.device)
    mask[[lm.token_id(w) for w in (*words, STOP)]] = True
    return mask
