"""A small task for trainers: a text between two others, inferred by an adapter of the language model."""

from __future__ import annotations

from collections.abc import Sequence

import peft
import pyro
import torch
from tiny import tiny_lm
from torch import Tensor

from lmppl.distributions import Completion
from lmppl.inference import GFlowNet


class Task:
    """z ~ LM(x), y ~ LM(x z): at most two tokens of z, two observations; the guide reads both ends."""

    def __init__(
        self,
        seed: int = 3,
        dtype: torch.dtype = torch.float64,
        vocab: int = 8,
        x: Sequence[str] = ("abc", "d"),
        y: Sequence[str] = ("cab", "ed"),
        layers: int = 1,
    ):
        self.lm = tiny_lm(seed=seed, dtype=dtype, vocab=vocab, layers=layers)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.q = self.lm.with_adapter(peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        self.args = self.encode(x, y)

    def encode(self, x: Sequence[str], y: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.lm.encode(list(x)), self.lm.encode(list(y), stop="eos")

    def model(self, x, y):
        with pyro.plate("stories", len(x)):
            z = pyro.sample("z", Completion(self.lm, x, max_tokens=2))
            pyro.sample("y", Completion(self.lm, self.lm.join(x, z), max_tokens=4), obs=y)

    def q_of(self, x, y) -> Completion:
        return Completion(self.q, self.q.join(y, x), max_tokens=2)

    def guide(self, x, y):
        with pyro.plate("stories", len(x)):
            pyro.sample("z", self.q_of(x, y))

    def trainer(self, kind, lr: float = 1e-2, **kwargs):
        optimizer = torch.optim.AdamW(self.q.trainable_parameters(), lr=lr)
        return kind(self.model, self.guide, optimizer=optimizer, **kwargs)

    def gflownet(self, lr: float = 1e-2, **kwargs) -> GFlowNet:
        return self.trainer(GFlowNet, lr, **kwargs)

    def values(self) -> list[Tensor]:
        """The guide's parameters as they are."""
        return [p.detach().clone() for p in self.q.trainable_parameters()]
