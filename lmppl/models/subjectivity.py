"""Subjectivity: what a sentence is called follows from a reason that nobody wrote down.

z ~ LM("{x} because of"),    y ~ LM("{x} because of{z}") among the labels, observed;    wanted: p(z | x, y), p(y | x)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.distributions import Categorical
from torch import Tensor

from .. import text
from ..constraints import Constraint
from ..distributions import Completion, NextToken
from ..embedded import Sentence
from ..embedded.subjectivity import LABELS, PLAINLY, REASONS, STOP, WHY
from ..inference import Enumeration, Prediction
from ..language_model import LanguageModel
from .data_files import parsed, read_lines
from .experiment import TEST_OBSERVATIONS, Experiment, Recipe, embedded_splits, paper_setting, split

SEEN = "{y}.\n" + WHY  # the prompt of a guide that reads the label too
READS = "xy", "x"
PENALTY = 50.0  # nats, of the paper's released setting
LONGEST_REASON = 5  # tokens, as in the paper


class Subjectivity:
    r"""The model and guide of subjectivity, for any language model.

    .. math:: p(z, y \mid x) = p(z \mid x) \, p(y \mid x, z)

    :param lm: the language model of p(z | x).
    :param guide_lm: the guide's, usually ``lm.with_adapter(...)``; None: no guide.
    :param likelihood_lm: that of p(y | x, z), by default ``lm``.  With an adapter of its own, EM moves p(y | x, z)
        alone; with ``lm=p, likelihood_lm=p`` it moves both factors.
    :param labels: the texts that y may be; y is an index into them.
    :param reads: "xy", a guide q(z | x, y); or "x", a guide q(z | x) as in the paper, which can predict.
    :param min_tokens: the fewest tokens of a reason before its stop, ``max_tokens`` the most.
    :param allowed: a constraint on the reason's tokens; "reasons": the embedded LM's twelve.
    :param normalised: p(y | x, z) is shared among the labels.  False: it is the language model's own, and what is left
        is a further outcome, index ``len(labels)``.
    :param penalty: nats taken off where another label has a higher p(y | x, z) than the observed one.

    `model(x, y)` and `guide(x, y)` are Pyro programs over texts x (B, L) and labels y (B,), with one plate of
    sentences.  y may be None where it is to be predicted.

    :raises ValueError: for ``reads`` of neither kind, and for another word as ``allowed``.

    Example::

        q, p = (lm.with_adapter(LoraConfig(r=16, target_modules="all-linear")) for _ in range(2))
        task = Subjectivity(lm, q, likelihood_lm=p, allowed="reasons", max_tokens=2)
        x, y = task.encode(embedded.data("subjectivity", "train")[:10])
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
    ):
        if reads not in READS:
            raise ValueError(f"reads: expected one of {', '.join(map(repr, READS))}, got {reads!r}")
        self.lm, self.guide_lm, self.likelihood_lm = lm, guide_lm, likelihood_lm or lm
        self.labels, self.reads, self.normalised, self.penalty = tuple(labels), reads, normalised, penalty
        self.label_texts = lm.encode([f" {label}" for label in labels])  # (C, L)
        if isinstance(allowed, str):
            if allowed != "reasons":
                raise ValueError(f"allowed: expected a constraint or 'reasons', got {allowed!r}")
            allowed = allowed_words(lm)
        self.reason: dict[str, Any] = {
            "min_tokens": min_tokens,
            "max_tokens": max_tokens,
            "stop": STOP,
            "allowed": allowed,
        }

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """z ~ p(z | x); y ~ p(y | x, z)."""
        with pyro.plate("sentences", len(x)):
            z = pyro.sample("z", self.prior(x))
            log_p = self.log_labels(x, z)
            said = pyro.sample("y", Categorical(logits=log_p), obs=y)
            if self.penalty:
                pyro.factor("wrong label", -self.penalty * (_at(log_p, said) < log_p[..., : len(self.labels)].amax(-1)))
            return z

    def guide(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """z ~ q(z | x, y), or q(z | x)."""
        with pyro.plate("sentences", len(x)):
            return pyro.sample("z", self.proposal(x, y))

    def direct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """y ~ LM("{x} is") among the labels: no reason."""
        with pyro.plate("sentences", len(x)):
            return pyro.sample("y", Categorical(logits=self.log_direct(x)), obs=y)

    # -- the parts -----------------------------------------------------------------------------------------------------

    def prior(self, x: Tensor) -> Completion:
        """p(z | x)."""
        return Completion(self.lm, self.lm.fill(WHY, x=x), **self.reason)

    def proposal(self, x: Tensor, y: Tensor | None = None) -> Completion:
        """q(z | x, y), or q(z | x)."""
        if self.guide_lm is None:
            raise ValueError("guide_lm: this Subjectivity was made without a guide")
        if self.reads == "x":
            prompt = self.guide_lm.fill(WHY, x=x)
        elif y is None:
            raise ValueError("y: this guide reads it; predict by the prior, or by a guide with reads='x'")
        else:
            prompt = self.guide_lm.fill(SEEN, x=x, y=self.label_texts[y])
        return Completion(self.guide_lm, prompt, **self.reason)

    def log_labels(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(y | x, z) for reasons (..., B, L): (..., B, C), with one more outcome where it is not normalised."""
        lm = self.likelihood_lm
        return self._outcomes(_scores(lm, lm.join(lm.fill(WHY, x=x), z), self.label_texts))

    def log_direct(self, x: Tensor, before: Tensor | str = "") -> Tensor:
        """log p(y | x) (B, C) without a reason; ``before`` it, perhaps examples."""
        lm = self.likelihood_lm
        return self._outcomes(_scores(lm, lm.join(before, lm.fill(PLAINLY, x=x)), self.label_texts))

    def _outcomes(self, log_p: Tensor) -> Tensor:
        if self.normalised:
            return log_p.log_softmax(-1)
        rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(log_p.dtype).tiny)
        return torch.cat([log_p, rest.log()], -1)

    # -- the truth and predictions -------------------------------------------------------------------------------------

    def log_joint(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(z, y | x) of every reason z there can be, (K, B), by one pass over all of them; with gradient.

        :raises ValueError: where there are more than a million.
        """
        prior = self.prior(x)
        z = prior.enumerate_support()  # (K, B, L)
        log_p = self.log_labels(x, z)
        own = _at(log_p, y)
        return prior.log_prob(z) + own - self.penalty * (own < log_p[..., : len(self.labels)].amax(-1))

    def log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        r"""log p(y | x) :math:`= \log \sum_z p(z, y | x)`, (B,), exactly."""
        return self.log_joint(x, y).logsumexp(0)

    @torch.no_grad()
    def predict(self, x: Tensor, sampler: str = "prior", num_particles: int | None = None) -> Prediction:
        r"""The labels' probabilities :math:`\sum_n w_n p(y \mid x, z_n)` and the vote, without y.

        :param sampler: whose reasons: "prior", p(z | x), or "guide", q(z | x), which must read x alone.
        :param num_particles: so many draws; None: the sum over every reason.
        """
        if sampler not in ("prior", "guide"):
            raise ValueError(f"sampler: expected 'prior' or 'guide', got {sampler!r}")
        fn = self.prior(x) if sampler == "prior" else self.proposal(x)
        if num_particles is None:
            z = fn.enumerate_support()
            log_weights = fn.log_prob(z)
        else:
            z = fn.sample(torch.Size([num_particles]))
            log_weights = torch.full(z.shape[:-1], -math.log(num_particles))
        log_p = self.log_labels(x, z)[..., : len(self.labels)]
        return Prediction(list(self.labels), log_p.movedim(-1, 0), log_weights)

    def encode(self, sentences: Sequence[Sentence]) -> tuple[Tensor, Tensor]:
        """The arguments (x, y) of model and guide for these sentences."""
        y = torch.tensor([self.labels.index(s.label) for s in sentences], device=self.lm.device)
        return self.lm.encode([s.text for s in sentences]), y

    def examples(self, sentences: Sequence[Sentence], tokens: int) -> str:
        """As many labelled sentences as have room in so many tokens, a line each: what few-shot prompting shows."""
        shown = ""
        for s in sentences:
            longer = f"{shown}{PLAINLY.format(x=s.text)} {s.label}.\n"
            if int(text.length(self.lm.encode(longer))) > tokens:
                break
            shown = longer
        return shown


def allowed_words(lm: LanguageModel, words: Sequence[str] = REASONS) -> Tensor:
    """These words and the stop, as the only tokens of a reason: BoolTensor (V,)."""
    mask = torch.zeros(lm.vocab_size, dtype=torch.bool, device=lm.device)
    mask[[lm.token_id(w) for w in (*words, STOP)]] = True
    return mask


def _at(log_p: Tensor, y: Tensor) -> Tensor:
    """What the outcome y (..., B) has, of (..., B, C)."""
    batch = torch.broadcast_shapes(log_p.shape[:-1], y.shape)
    return log_p.expand(*batch, -1).gather(-1, y.expand(batch)[..., None])[..., 0]


def _scores(lm: LanguageModel, context: Tensor, labels: Tensor) -> Tensor:
    """log p of each label (C, L) after a context (..., L'): (..., C)."""
    if labels.shape[-1] == 1:  # one pass for all of them
        return NextToken(lm, context).logits[..., labels[:, 0]]
    return Completion(lm, context[..., None, :], max_tokens=text.length(labels), stop=None).log_prob(labels)


# -- data --------------------------------------------------------------------------------------------------------------


def read_sentences(path: str | Path) -> list[Sentence]:
    """Sentences from a JSONL file, an object with "text" and "label_text" a line; empty lines are passed over.

    :raises ValueError: naming the file and line, where a line is no such object or the file has none.
    """
    found = []
    for number, line in read_lines(path):
        item = parsed(line, path, number)
        try:
            x, label = item["text"].strip(), item["label_text"].strip()
        except (KeyError, TypeError, AttributeError):
            x = label = ""
        if not x or not label:
            raise ValueError(f'data: {path}, line {number} is no object with the strings "text" and "label_text"')
        found.append(Sentence(x, label, ""))
    if not found:
        raise ValueError(f"data: {path} has no sentence in it")
    return found


def read_data(path: str | Path, count: int) -> tuple[list[Sentence], list[Sentence], list[Sentence]]:
    """Sentences to train on, to validate on and to test on.

    Of a directory: train.{count}.jsonl, or the first ``count`` of train.jsonl; others of train.jsonl, where there is
    one; test.jsonl.  A file is split.
    """
    path = Path(path)
    if not path.is_dir():
        return split(read_sentences(path))
    few, many = path / f"train.{count}.jsonl", path / "train.jsonl"
    pool = read_sentences(many) if many.is_file() else []
    train = read_sentences(few) if few.is_file() or not pool else pool[:count]
    seen = {s.text for s in train}
    held_out = [s for s in pool if s.text not in seen][:TEST_OBSERVATIONS]
    return train, held_out or train, read_sentences(path / "test.jsonl")


def experiment(
    lm: LanguageModel | None = None,
    data: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    setting: str = "posterior",
    device: str | None = None,
    reads: str = "xy",
    count: int = 0,
) -> Experiment:
    """The reason why a sentence is called objective or subjective.

    On the embedded LM, where the posterior is known, or on ``lm`` with the sentences of ``data``: a JSONL file, or a
    directory with train.10.jsonl and the like.  ``reads``: what the guide reads, "xy" or "x".  ``count``: so many
    labelled sentences to train on (0: all that the embedded LM has, 10 of a directory).

    :raises ValueError: for another language model without ``data``: the embedded sentences are in its vocabulary.
    """
    if lm is not None and data is None:
        raise ValueError("data: another language model needs sentences of its own, a JSONL file or a directory of them")
    if count < 0:
        raise ValueError(f"count: must not be negative, got {count}")
    recipe = recipe or Recipe()
    options: dict[str, Any] = {"reads": reads, "penalty": PENALTY if paper_setting(setting) else 0.0}
    own = lm is None
    lm = lm or LanguageModel.embedded("subjectivity", device=device)
    if data is None:
        train, held_out, test = embedded_splits("subjectivity")
        train = train[: count or len(train)]
    else:
        train, held_out, test = read_data(data, count or 10)
        options["labels"] = sorted({s.label for s in (*train, *held_out, *test)})
    test = test[:TEST_OBSERVATIONS]
    if own:
        options |= {"allowed": "reasons", "max_tokens": 2}
    guide_lm = recipe.guide_lm(lm, seed, checkpoint)
    task = Subjectivity(lm, guide_lm, **options)
    return Experiment(
        name="subjectivity",
        lm=lm,
        guide_lm=guide_lm,
        model=task.model,
        guide=task.guide,
        batches=recipe.batches(*task.encode(train), seed=seed),
        held_out=task.encode(held_out),
        test=task.encode(test),
        describe=lambda i: f"{test[i].text}    ({test[i].label})",
        exact=Enumeration(task.model) if own else None,
        recipe=recipe,
        target="p(z|x, y), less 50 nats where another label is likelier: the paper's setting"
        if task.penalty
        else "the posterior",
    )
