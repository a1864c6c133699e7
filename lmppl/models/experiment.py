"""An experiment: programs, data, a recipe, and the truth where it can be had."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import peft
import torch
from pyro import poutine
from transformers.pytorch_utils import Conv1D

from .. import embedded
from ..catalogue import SETTINGS
from ..distributions.arguments import as_view
from ..inference import Enumeration, GFlowNet, Objective, Replay, VarGrad
from ..inference.core.programs import Program
from ..inference.training.trainer import Task
from ..language_model import LanguageModel
from ..text import length
from ..view import View

T = TypeVar("T")
V = TypeVar("V", bound=View)
TEST_OBSERVATIONS = 16


@dataclass(frozen=True)
class Recipe:
    """How a guide is trained; see docs/recipes.md.

    The defaults are for small networks, and won `benchmarks/recipes.py`; `PRETRAINED` is for large ones.

    :param upper_layers: which layers get an adapter: so many counted from the top (an integer), or such a share of
        them (a float, 1.0 are all); None: all.  The output layer is none of them, see ``output_layer``.
    """

    steps: int = 1000
    quick_steps: int = 250
    observations: int = 8
    particles: int = 16
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    objective: Callable[[], Objective] = VarGrad
    replay: Callable[[], Replay] | None = None
    adapter: dict[str, Any] = field(default_factory=lambda: {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"})
    output_layer: bool = False  # adapt it too: see `linear_layers`
    upper_layers: int | float | None = None

    def passes(self, count: int, seed: int = 0) -> Callable[[int], torch.Tensor]:
        """Which of ``count`` observations a step trains on: a pass in an order of its own, then another."""
        size = min(self.observations, count)

        def chosen(step: int) -> torch.Tensor:
            epoch, at = divmod(step, max(1, count // size))
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
            return order[at * size : (at + 1) * size]

        return chosen

    def batches(self, *observations: torch.Tensor, seed: int = 0) -> Callable[[int], tuple[torch.Tensor, ...]]:
        """The arguments of a training step: of each tensor the rows that `passes` chooses."""
        chosen = self.passes(len(observations[0]), seed)

        def batch(step: int) -> tuple[torch.Tensor, ...]:
            rows = chosen(step)
            return tuple(x[rows] for x in observations)

        return batch

    def length(self, quick: bool) -> int:
        """How many steps to train."""
        return self.quick_steps if quick else self.steps

    def guide_lm(self, lm: V, seed: int = 0, checkpoint: str | Path | None = None) -> V:
        """``lm`` with a fresh adapter of this recipe, or with the adapter saved at ``checkpoint``."""
        if checkpoint is not None:
            return lm.with_adapter(checkpoint)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: dict[str, Any] = {"target_modules": linear_layers(lm)} if self.output_layer else {}
            if self.upper_layers is not None:
                lower = decoder_layers(lm)[: -self.adapted(len(decoder_layers(lm)))]
                names, own = linear_layers(lm), self.adapter.get("exclude_modules") or []
                own = [name for name in names if re.fullmatch(own, name)] if isinstance(own, str) else own
                layers["exclude_modules"] = [*own, *(name for name in names if name.startswith(tuple(lower)))]
            return lm.with_adapter(peft.LoraConfig(**self.adapter | layers))

    def adapted(self, layers: int) -> int:
        """How many of so many layers, counted from the top, get an adapter.

        :raises ValueError: where ``upper_layers`` is no such number.
        """
        upper = self.upper_layers
        if upper is None:
            return layers
        most = 1.0 if isinstance(upper, float) else layers
        if isinstance(upper, bool) or not isinstance(upper, int | float) or not 0 < upper <= most:
            raise ValueError(f"upper_layers: expected an integer up to {layers}, or a share up to 1.0, got {upper!r}")
        return max(1, math.ceil(upper * layers - 1e-9)) if isinstance(upper, float) else upper


#: The recipe of networks of more than 20 million parameters, as `benchmarks/pretrained_recipes.py` measures it.
PRETRAINED = Recipe(observations=2, particles=8, learning_rate=1e-3)
LARGE = 20_000_000


def recipe_for(lm: View, own: Recipe, large: int = LARGE) -> Recipe:
    """An experiment's own recipe, and on a large network its batch, rate, adapter and objective those of `PRETRAINED`.

    A network of more than ``large`` parameters is: none of the embedded ones, most pretrained ones.  What is the
    experiment's own stays so: its steps, its replay buffer, and an objective other than the usual one.
    """
    if sum(p.numel() for p in lm.network.base_parameters) <= large:
        return own
    usual = own.objective is Recipe.objective
    return replace(
        own,
        observations=PRETRAINED.observations,
        particles=PRETRAINED.particles,
        learning_rate=PRETRAINED.learning_rate,
        adapter=PRETRAINED.adapter,
        upper_layers=PRETRAINED.upper_layers,
        objective=PRETRAINED.objective if usual else own.objective,
    )


def linear_layers(lm: View) -> list[str]:
    """The names of all linear layers, the output layer too, which PEFT's "all-linear" leaves out.

    A small language model has nearly equal embeddings for words that it has no reason to tell apart, and the norm
    before the output layer bounds what can be made of the difference: a guide that must tell them apart cannot.
    """
    names = (key.removesuffix(".weight") for key in lm.network.base_keys if key.endswith(".weight"))
    layers = {name: lm.model.get_submodule(name) for name in names}
    plain = {name: m.get_base_layer() if hasattr(m, "get_base_layer") else m for name, m in layers.items()}
    return sorted(name for name, m in plain.items() if isinstance(m, torch.nn.Linear | Conv1D))


def decoder_layers(lm: View) -> list[str]:
    """What the names of each decoder layer's modules begin with, from the bottom to the top.

    :raises ValueError: where the network keeps its layers in no list.
    """
    count = lm.model.config.get_text_config().num_hidden_layers
    for name, module in lm.model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return [f"{name}.{i}." for i in range(count)]
    raise ValueError(f"upper_layers: {type(lm.model).__name__} has no list of its {count} layers; leave it None")


@dataclass
class Experiment:
    """A latent-variable model ready to run."""

    name: str
    lm: View
    guide_lm: View
    model: Program
    guide: Program
    # The arguments of a training step, or a list of tasks: programs to train on, where they are not these.
    batches: Callable[[int], tuple[Any, ...]] | Sequence[Task]
    held_out: tuple[Any, ...]  # validation observations
    test: tuple[Any, ...]  # unseen observations
    describe: Callable[[int], str]  # a test observation in words
    site: str = "z"
    exact: Enumeration | None = None  # None: the space cannot be enumerated
    recipe: Recipe = field(default_factory=Recipe)
    target: str = "the posterior"
    demonstrations: tuple[Any, ...] = ()  # arguments, and values that a replay buffer starts with
    shows: Callable[[Path], str] | None = None  # what `compare` shows besides: says it, with pictures in a directory

    def optimizer(self, learning_rate: float | None = None) -> torch.optim.Optimizer:
        """AdamW over the guide's parameters, by the recipe unless told another learning rate."""
        rate = self.recipe.learning_rate if learning_rate is None else learning_rate
        return torch.optim.AdamW(self.guide_lm.trainable_parameters(), lr=rate, betas=self.recipe.betas)

    def sized(self, observations: int, particles: int) -> Experiment:
        """The same experiment, of whose batches a step takes so many observations at a time, of so many particles.

        What is left of a batch waits for another pass.
        """
        recipe = replace(self.recipe, observations=observations, particles=particles)
        if callable(self.batches):
            return replace(self, recipe=recipe, batches=_parts(self.batches, observations))
        tasks = [task._replace(batches=_parts(task.batch, observations)) for task in self.tasks]
        return replace(self, recipe=recipe, batches=tasks)

    @property
    def tasks(self) -> list[Task]:
        """The programs to train on, with their batches."""
        return [Task(self.model, self.guide, self.batches)] if callable(self.batches) else [*self.batches]

    def gflownet(self) -> GFlowNet:
        """A trainer for the guide."""
        trainer = GFlowNet(
            self.model,
            self.guide,
            self.recipe.objective(),
            optimizer=self.optimizer(),
            num_particles=self.recipe.particles,
            replay=self.recipe.replay and self.recipe.replay(),
        )
        if trainer.replay is not None and self.demonstrations:
            *args, values = self.demonstrations
            trainer.demonstrate(*args, values=values)
        return trainer


def _parts(batches: Callable[[int], tuple[Any, ...]], rows: int) -> Callable[[int], tuple[Any, ...]]:
    """Each batch so many observations at a time: a function of the step."""
    parts = max(1, len(batches(0)[0]) // rows)

    def part(step: int) -> tuple[Any, ...]:
        batch, at = divmod(step, parts)
        return tuple(x[at * rows : (at + 1) * rows] for x in batches(batch))

    return part


class Options(TypedDict, total=False):
    """What every experiment takes besides what is its own."""

    recipe: Recipe | None  # how the guide is trained; None: as is best for the experiment, see `recipe_for`
    seed: int  # of the guide's first weights and of the batches
    checkpoint: str | Path | None  # a trained adapter that the guide starts from
    setting: str  # the target: "posterior", or "paper", the paper's released one
    device: str | None  # where the embedded language model goes


@dataclass(frozen=True)
class Start:
    """What there is of an experiment before its programs: the language models, the recipe, and what is wanted."""

    name: str
    lm: Any  # a LanguageModel, or what the experiment asks for
    guide_lm: Any
    recipe: Recipe
    seed: int
    paper: bool  # the paper's setting

    @classmethod
    def of(
        cls,
        name: str,
        world: str,
        lm: View | None,
        data: str | Path | None,
        default: Recipe,
        needs: str | None = None,
        *,
        recipe: Recipe | None = None,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        setting: str = SETTINGS[0],
        device: str | None = None,
        kind: type[View] = LanguageModel,
        **unknown: Any,
    ) -> Start:
        """The start on ``lm``, or on the embedded language model ``world``, with the `Options` that were given.

        :param default: the recipe where none is given; on a large network, see `recipe_for`.
        :param needs: what another language model needs as ``data``; None: nothing.
        :param kind: of language model.
        :raises ValueError: for another language model without ``data``, what is none, and a setting that is none.
        :raises TypeError: for other options.
        """
        if unknown:
            raise TypeError(f"{name}: experiment() got an unexpected keyword argument {next(iter(unknown))!r}")
        if lm is not None:
            as_view(lm, kind)
        if setting not in SETTINGS:
            raise ValueError(f"setting: expected one of {', '.join(map(repr, SETTINGS))}, got {setting!r}")
        if lm is not None and data is None and needs is not None:
            raise ValueError(f"data: another language model needs {needs}")
        lm = lm or kind.embedded(world, device=device)
        recipe = recipe or recipe_for(lm, default)
        return cls(name, lm, recipe.guide_lm(lm, seed, checkpoint), recipe, seed, setting == "paper")

    def experiment(
        self,
        task: Any,
        splits: Sequence[Sequence[T]],
        describe: Callable[[T], str],
        encode: Callable[[Sequence[T]], tuple[torch.Tensor, ...]] | None = None,
        **fields: Any,
    ) -> Experiment:
        """The experiment with the programs ``task.model`` and ``task.guide``.

        :param splits: observations to train on, to validate on and to test on.
        :param describe: one of them in words.
        :param encode: them to the programs' arguments; None: ``task.encode``.
        :param fields: others of `Experiment`, or in place of what is made of these.
        """
        train, held_out, test = splits
        encode = encode or task.encode
        made = {
            "model": task.model,
            "guide": task.guide,
            "batches": self.recipe.batches(*encode(train), seed=self.seed),
            "held_out": encode(held_out),
            "test": encode(test),
            "describe": lambda i: describe(test[i]),
        }
        return Experiment(self.name, self.lm, self.guide_lm, recipe=self.recipe, **made | fields)

    def longest(self, texts: Sequence[str]) -> int:
        """The tokens of the longest of these texts."""
        return int(length(self.lm.encode(texts)).max())


def embedded_splits(name: str) -> tuple[list[Any], list[Any], list[Any]]:
    """Embedded observations to train on, and the first ones to validate on and to test on."""
    train, held_out, test = (embedded.data(name, s) for s in ("train", "validation", "test"))
    return train, held_out[:TEST_OBSERVATIONS], test[:TEST_OBSERVATIONS]


def split(observations: list[T]) -> tuple[list[T], list[T], list[T]]:
    """The last eighth to validate on and the eighth before it to test on; one or two observations serve all three."""
    n = max(1, min(TEST_OBSERVATIONS, len(observations) // 8))
    if len(observations) < 3:
        return observations, observations[-1:], observations[-1:]
    return observations[: -2 * n], observations[-n:], observations[-2 * n : -n]


def tempered(model: Program, temperature: float) -> Program:
    r"""The model with its joint to the power 1 / temperature: what training ends at for a final reward temperature."""
    if temperature == 1:
        return model

    def program(*args: Any) -> Any:
        with poutine.scale(scale=1 / temperature):
            return model(*args)

    return program


def power(temperature: float) -> str:
    """The target of a `tempered` model in words."""
    if temperature == 1:
        return "the posterior"
    return f"p(z|x, y) to the power 1 / {temperature:g}, the paper's setting"
