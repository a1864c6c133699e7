"""A problem of four latent texts with a guide of one logit each, and steps whose gradient can be read."""

from __future__ import annotations

import math
from itertools import product

import pyro
import torch
from problems import SEEN, X, Y, texts_of
from tables import Table
from torch import Tensor

from lmppl import LanguageModel, text
from lmppl.distributions import Completion, TextTable


def still(parameters, **kwargs) -> dict:
    """An optimiser that leaves the parameters where they are, and no clipping: a step's gradient stays to be read."""
    return {"optimizer": torch.optim.SGD(parameters, lr=0.0), "clip": math.inf, **kwargs}


def gradient(trainer, parameters, *args) -> list[Tensor]:
    trainer.step(*args)
    return [p.grad.clone() for p in parameters]


def close(found: list[Tensor], expected: list[Tensor], within: float = 1e-10) -> bool:
    return all((a - b).abs().max() < within for a, b in zip(found, expected, strict=True))


class Rigged(TextTable):
    """A table of texts from which particle n draws row ``drawn[n]``."""

    def __init__(self, table: TextTable, drawn: Tensor):
        self.__dict__.update(table.__dict__)
        self.drawn = drawn

    def sample_and_log_prob(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        shape = torch.Size(sample_shape) + self.batch_shape
        z = self.values[self.drawn.view(-1, *[1] * (len(shape) - 1)).expand(shape)]
        return z, self.log_prob(z)


class One:
    """z ~ LM(a) of at most one token, y ~ LM(a z): four texts z, 13 texts y, and a guide with a logit for each pair."""

    def __init__(self, lm: LanguageModel, row: Tensor | None = None):
        self.lm, self.x, self.y = lm, X[0, :1], Y[:1]
        self.support = Completion(lm, self.x, max_tokens=1).enumerate_support()  # (4, 2)
        self.seen = texts_of(lm)  # (13, 3)
        with torch.no_grad():
            self.log_prior = Completion(lm, self.x, max_tokens=1).log_prob(self.support)
            follows = Completion(lm, lm.join(self.x, self.support), **SEEN)
            self.log_likelihoods = follows.log_prob(self.seen[:, None])  # (13, 4)
        self.log_likelihood = self.log_likelihoods[self.row(self.y)[0]]
        row = torch.tensor([0.3, -0.4, 0.1, 0.9], dtype=torch.float64) if row is None else row
        self.logits = row.repeat(13, 1).requires_grad_()
        self.args = (self.y,)
        self.drawn: Tensor | None = None  # the row of each particle, where the guide's draws are not left to chance

    def row(self, y: Tensor) -> Tensor:
        return (text.pad(y, 3)[..., None, :] == self.seen).all(-1).int().argmax(-1)

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", Completion(self.lm, self.x, max_tokens=1))
            pyro.sample("y", Completion(self.lm, self.lm.join(self.x, z), **SEEN), obs=y)

    def guide(self, y):
        with pyro.plate("data", len(y)):
            table = Table(self.lm, self.support, self.logits[self.row(y)])
            pyro.sample("z", table if self.drawn is None else Rigged(table, self.drawn))

    def reward(self, kind: str, T: float) -> Tensor:
        joint = (self.log_prior + self.log_likelihood) / T
        return joint - self.log_prior if kind == "likelihood" else joint

    @property
    def posteriors(self) -> Tensor:
        """(13, 4), given every y."""
        return (self.log_prior + self.log_likelihoods).softmax(-1)

    def total_variations(self) -> Tensor:
        """(13,), of the guide to the posterior, given every y."""
        return (self.logits.detach().softmax(-1) - self.posteriors).abs().sum(-1) / 2

    def trainer(self, kind, lr: float = 0.2, **kwargs):
        return kind(self.model, self.guide, optimizer=torch.optim.Adam([self.logits], lr=lr), clip=10.0, **kwargs)

    def still(self, kind, **kwargs):
        return kind(self.model, self.guide, **still([self.logits], **kwargs))

    def expected_gradient(self, trainer) -> Tensor:
        """Of the loss of two particles for one y, by enumerating all 16 pairs of draws."""
        at = self.row(self.y)[0]
        log_q = self.logits.detach()[at].log_softmax(-1)
        total = torch.zeros(4, dtype=torch.float64)
        for pair in product(range(4), repeat=2):
            rows = torch.tensor(pair)
            self.drawn = rows
            total += log_q[rows].sum().exp() * gradient(trainer, [self.logits], self.y)[0][at]
        return total
