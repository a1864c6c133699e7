"""Problems with an exact posterior: a Pyro model, and the guide that is its posterior, written down as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pyro
import pyro.distributions as dist
import torch
from peft import LoraConfig
from tables import Table
from torch import Tensor

from lmppl import LanguageModel, text
from lmppl.distributions import Completion
from lmppl.text import PAD

VOCAB = 4  # eos, ".", a, b
EOS, DOT, A, B = range(VOCAB)
X = torch.tensor([[A, PAD], [B, A]])  # two observations: prompts ...
Y = torch.tensor([[B, EOS], [DOT, EOS]])  # ... and what was seen after the latent text
PRIOR = {"max_tokens": 2}
SEEN = {"max_tokens": 2}


@dataclass
class Problem:
    """A Pyro model, the guide that is its posterior, and the exact posterior's support and log joint."""

    model: Callable
    posterior: Callable[[float], Callable]  # reward temperature -> guide


def texts_of(lm: LanguageModel, min_tokens: int = 0) -> Tensor:
    return Completion(lm, X[0], min_tokens=min_tokens, **PRIOR).enumerate_support()  # (K, E)


def one_text(lm: LanguageModel, min_tokens: int = 0, factor: Callable[[Tensor], Tensor] | None = None) -> Problem:
    """z ~ LM(x); y ~ LM(x z), for two observations in a plate; perhaps a factor on z."""

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(lm, X, min_tokens=min_tokens, **PRIOR))
            pyro.sample("y", Completion(lm, lm.join(X, z), **SEEN), obs=Y)
            if factor is not None:
                pyro.factor("f", factor(z))

    z = texts_of(lm, min_tokens)[:, None]
    joint = Completion(lm, X, min_tokens=min_tokens, **PRIOR).log_prob(z)
    joint = joint + Completion(lm, lm.join(X, z), **SEEN).log_prob(Y) + (0.0 if factor is None else factor(z))
    joint = joint.detach().T  # (2, K)

    def posterior(T: float = 1.0):
        def guide():
            with pyro.plate("data", 2):
                pyro.sample("z", Table(lm, texts_of(lm, min_tokens), joint / T))

        return guide

    return Problem(model, posterior)


def no_a_first(z: Tensor) -> Tensor:
    return torch.where(z[..., 0] == A, -torch.inf, 0.0).double()


def not_empty(z: Tensor) -> Tensor:
    return torch.where(z[..., 0] == EOS, -torch.inf, 0.0).double()


def far_apart(z: Tensor) -> Tensor:
    """Rewards over a range of hundreds of nats, none of them zero; a sample's prefixes lie far below it."""
    return 150.0 * text.length(z).double()


def two_plates(lm: LanguageModel) -> Problem:
    """Four observations in a 2 x 2 grid, each with its own latent text."""
    x = X[:, None].expand(2, 2, 2)
    y = torch.stack([Y, Y.flip(0)], 1)

    def model():
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 2, dim=-1):
            z = pyro.sample("z", Completion(lm, x, **PRIOR))
            pyro.sample("y", Completion(lm, lm.join(x, z), **SEEN), obs=y)

    z = texts_of(lm)[:, None, None]
    joint = (Completion(lm, x, **PRIOR).log_prob(z) + Completion(lm, lm.join(x, z), **SEEN).log_prob(y)).detach()

    def posterior(T: float = 1.0):
        def guide():
            with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 2, dim=-1):
                pyro.sample("z", Table(lm, texts_of(lm), joint.permute(1, 2, 0) / T))

        return guide

    return Problem(model, posterior)


def two_texts(lm: LanguageModel) -> Problem:
    """z ~ LM(x); w ~ LM(x z); y ~ LM(x z w): two latent texts, for two observations."""

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(lm, X, **PRIOR))
            w = pyro.sample("w", Completion(lm, lm.join(X, z), **PRIOR))
            pyro.sample("y", Completion(lm, lm.join(X, z, w), **SEEN), obs=Y)

    support = texts_of(lm)
    z, w = support[:, None, None], support[None, :, None]  # (K, K, 2, E)
    joint = Completion(lm, X, **PRIOR).log_prob(z) + Completion(lm, lm.join(X, z), **PRIOR).log_prob(w)
    joint = (joint + Completion(lm, lm.join(X, z, w), **SEEN).log_prob(Y)).detach()  # (K, K, 2)

    def posterior(T: float = 1.0):
        def guide():
            with pyro.plate("data", 2):
                z = pyro.sample("z", Table(lm, support, (joint / T).logsumexp(1).T))
                row = (z[..., None, :] == support).all(-1).int().argmax(-1)  # (..., 2)
                rest = (joint / T).permute(2, 0, 1)[torch.arange(2), row]  # (..., 2, K)
                pyro.sample("w", Table(lm, support, rest))

        return guide

    return Problem(model, posterior)


def category_first(lm: LanguageModel) -> Problem:
    """c ~ Categorical; z ~ LM(x_c); y ~ LM(z): an ordinary latent before the text."""
    prior = torch.tensor([0.8, 0.2], dtype=torch.float64)
    y = Y[0]

    def model():
        c = pyro.sample("c", dist.Categorical(prior))
        z = pyro.sample("z", Completion(lm, X[c], **PRIOR))
        pyro.sample("y", Completion(lm, lm.join(X[c], z), **SEEN), obs=y)

    z = texts_of(lm)[:, None]
    joint = Completion(lm, X, **PRIOR).log_prob(z) + Completion(lm, lm.join(X, z), **SEEN).log_prob(y) + prior.log()
    joint = joint.detach().T  # (2, K)

    def posterior(T: float = 1.0):
        def guide():
            c = pyro.sample("c", dist.Categorical(logits=(joint / T).logsumexp(-1)))
            pyro.sample("z", Table(lm, texts_of(lm), (joint / T)[c]))

        return guide

    return Problem(model, posterior)


def category_above_a_plate(lm: LanguageModel) -> Problem:
    """c ~ Categorical; z_i ~ LM(x_c), y_i ~ LM(z_i) in a plate: the plate does not enclose c, so u is joint over it."""
    prior = torch.tensor([0.8, 0.2], dtype=torch.float64)

    def model():
        c = pyro.sample("c", dist.Categorical(prior))
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(lm, X[c], **PRIOR))
            pyro.sample("y", Completion(lm, lm.join(X[c], z), **SEEN), obs=Y)

    z, x = texts_of(lm)[:, None, None], X[:, None]  # (K, c, data)
    joint = Completion(lm, x, **PRIOR).log_prob(z) + Completion(lm, lm.join(x, z), **SEEN).log_prob(Y)
    joint = joint.detach().permute(1, 2, 0)  # (c, data, K)

    def posterior(T: float = 1.0):
        def guide():
            c = pyro.sample("c", dist.Categorical(logits=(joint / T).logsumexp(-1).sum(-1) + prior.log() / T))
            with pyro.plate("data", 2):
                pyro.sample("z", Table(lm, texts_of(lm), (joint / T)[c, torch.arange(2)]))

        return guide

    return Problem(model, posterior)


MAKE = {
    "a category above a plate": category_above_a_plate,
    "one text": one_text,
    "from one token": lambda lm: one_text(lm, min_tokens=1),
    "a hard factor": lambda lm: one_text(lm, factor=no_a_first),
    "the empty text impossible": lambda lm: one_text(lm, factor=not_empty),
    "rewards far apart": lambda lm: one_text(lm, factor=far_apart),
    "two plates": two_plates,
    "two texts": two_texts,
    "a category first": category_first,
}
PROBLEMS = {name: cache(make) for name, make in MAKE.items()}


def adapted(lm: LanguageModel) -> LanguageModel:
    """A guide that is not its base model."""
    guide = lm.with_adapter(LoraConfig(r=2, target_modules="all-linear"))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(4)
        for p in guide.trainable_parameters():
            p.normal_(std=0.2)
    return guide


def lm_guide(guide_lm: LanguageModel) -> Callable:
    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", Completion(guide_lm, X, **PRIOR))

    return guide
