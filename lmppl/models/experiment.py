"""What a model file offers to the command line: programs, data, a recipe, and the truth where it can be had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch

from ..inference import Enumeration, GFlowNet, Objective, Replay, VarGrad
from ..inference.programs import Program
from ..language_model import LanguageModel


@dataclass(frozen=True)
class Recipe:
    """How a guide is trained; they won `benchmarks/recipes.py`, see docs/recipes.md."""

    steps: int = 1000
    quick_steps: int = 250
    observations: int = 8
    particles: int = 16
    learning_rate: float = 1e-3
    objective: Callable[[], Objective] = VarGrad
    replay: Callable[[], Replay] | None = None
    adapter: dict[str, Any] = field(default_factory=lambda: {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"})

    def length(self, quick: bool) -> int:
        """How many steps to train."""
        return self.quick_steps if quick else self.steps

    def guide_lm(self, lm: LanguageModel, seed: int = 0) -> LanguageModel:
        """``lm`` with a fresh adapter of this recipe."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return lm.with_adapter(peft.LoraConfig(**self.adapter))


@dataclass
class Experiment:
    """A latent-variable model ready to run."""

    name: str
    lm: LanguageModel
    guide_lm: LanguageModel
    model: Program
    guide: Program
    batches: Callable[[int], tuple[Any, ...]]  # the arguments of a training step
    held_out: tuple[Any, ...]  # validation observations
    test: tuple[Any, ...]  # unseen observations
    describe: Callable[[int], str]  # a test observation in words
    site: str = "z"
    exact: Enumeration | None = None  # None: the space cannot be enumerated
    recipe: Recipe = field(default_factory=Recipe)
    target: str = "the posterior"

    def gflownet(self) -> GFlowNet:
        """A trainer for the guide."""
        optimizer = torch.optim.AdamW(self.guide_lm.trainable_parameters(), lr=self.recipe.learning_rate)
        return GFlowNet(
            self.model,
            self.guide,
            self.recipe.objective(),
            optimizer=optimizer,
            num_particles=self.recipe.particles,
            replay=self.recipe.replay and self.recipe.replay(),
        )
