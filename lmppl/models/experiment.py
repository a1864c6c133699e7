"""An experiment: programs, data, a recipe for training, and the exact posterior where it can be computed."""

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
    """How a guide is trained: steps, sizes, learning rate, objective and adapter.

    The defaults are for small networks; they won the comparison of `benchmarks/recipes.py`.  `PRETRAINED` is for large
    ones.  See docs/recipes.md.

    :param steps: how many updates.
    :param quick_steps: how many updates in a quick run.
    :param observations: observations in a step.
    :param particles: draws of the guide for each observation.
    :param learning_rate: of AdamW.
    :param betas: of AdamW.
    :param objective: makes the `Objective`: a class, or a function without arguments.
    :param replay: makes the `Replay` buffer; None: there is none.
    :param adapter: the arguments of peft's `LoraConfig`.
    :param output_layer: whether the output layer gets an adapter, too, see `linear_layers`.
    :param upper_layers: which layers get an adapter, counted from the top: a number of layers (an integer) or a share
        of them (a float, 1.0 is all); None: all.  The output layer is none of them, see ``output_layer``.

    Example::

        from lmppl.models import EXPERIMENTS

        recipe = Recipe(steps=200, particles=8, learning_rate=3e-3, objective=Linex)
        experiment = EXPERIMENTS["infilling"](recipe=recipe)
        experiment.gflownet().fit(experiment.batches, recipe.steps)
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
        """Which observations a step trains on: passes over all of them, each in a new random order.

        :param count: how many observations there are.
        :param seed: of the orders.
        :returns: a function of the step that returns the numbers of the observations.
        """
        size = min(self.observations, count)

        def chosen(step: int) -> torch.Tensor:
            epoch, at = divmod(step, max(1, count // size))
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
            return order[at * size : (at + 1) * size]

        return chosen

    def batches(self, *observations: torch.Tensor, seed: int = 0) -> Callable[[int], tuple[torch.Tensor, ...]]:
        """The batches of a training.

        :param observations: the arguments of model and guide, one row of each for each observation.
        :param seed: of the orders, see `passes`.
        :returns: a function of the step that returns the arguments for the observations of this step.
        """
        chosen = self.passes(len(observations[0]), seed)

        def batch(step: int) -> tuple[torch.Tensor, ...]:
            rows = chosen(step)
            return tuple(x[rows] for x in observations)

        return batch

    def length(self, quick: bool) -> int:
        """How many steps to train.

        :param quick: whether the run is quick.
        """
        return self.quick_steps if quick else self.steps

    def guide_lm(self, lm: V, seed: int = 0, checkpoint: str | Path | None = None) -> V:
        """The guide's language model: ``lm`` with a new adapter of this recipe, or with a saved one.

        :param lm: a language model.
        :param seed: of the adapter's first weights.
        :param checkpoint: a directory with a saved adapter; None: a new one.
        :returns: another view of the same network.
        """
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
        """How many layers, counted from the top, get an adapter.

        :param layers: how many layers the network has.
        :raises ValueError: for an ``upper_layers`` that is out of its range.
        """
        upper = self.upper_layers
        if upper is None:
            return layers
        most = 1.0 if isinstance(upper, float) else layers
        if isinstance(upper, bool) or not isinstance(upper, int | float) or not 0 < upper <= most:
            raise ValueError(f"upper_layers: expected an integer up to {layers}, or a share up to 1.0, got {upper!r}")
        return max(1, math.ceil(upper * layers - 1e-9)) if isinstance(upper, float) else upper


#: The recipe for networks with more than 20 million parameters, measured by `benchmarks/pretrained_recipes.py`.
PRETRAINED = Recipe(observations=2, particles=8, learning_rate=1e-3)
LARGE = 20_000_000


def recipe_for(lm: View, own: Recipe, large: int = LARGE) -> Recipe:
    """An experiment's own recipe; on a large network with the sizes, rate, adapter and objective of `PRETRAINED`.

    A network is large if it has more than ``large`` parameters: no embedded one has, most pretrained ones have.  The
    experiment keeps its steps, its replay buffer, and an objective other than the default.
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
    """The names of all linear layers, including the output layer, which PEFT's "all-linear" leaves out.

    A small language model has nearly equal embeddings for words that it has no reason to distinguish, and the norm
    before the output layer bounds how far the difference can be amplified.  A guide that must distinguish them needs an
    adapter on the output layer.
    """
    names = (key.removesuffix(".weight") for key in lm.network.base_keys if key.endswith(".weight"))
    layers = {name: lm.model.get_submodule(name) for name in names}
    plain = {name: m.get_base_layer() if hasattr(m, "get_base_layer") else m for name, m in layers.items()}
    return sorted(name for name, m in plain.items() if isinstance(m, torch.nn.Linear | Conv1D))


def decoder_layers(lm: View) -> list[str]:
    """The prefix of the module names of each decoder layer, from the bottom to the top.

    :raises ValueError: where the network has no list of its layers.
    """
    count = lm.model.config.get_text_config().num_hidden_layers
    for name, module in lm.model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return [f"{name}.{i}." for i in range(count)]
    raise ValueError(f"upper_layers: {type(lm.model).__name__} has no list of its {count} layers; leave it None")


@dataclass
class Experiment:
    """A latent-variable model ready to run: programs, data, a recipe, and the exact posterior where it can be computed.

    :param name: the name in the catalogue.
    :param lm: the language model of the model.
    :param guide_lm: the language model of the guide.
    :param model: a Pyro program.
    :param guide: a Pyro program with the model's latent sites.
    :param batches: a function of the step that returns the arguments of a training step; or a list of `Task`, where
        training uses other programs.
    :param held_out: validation observations: arguments of model and guide.
    :param test: test observations, which training does not use.
    :param describe: a function from the number of a test observation to its description.
    :param site: the latent site that is shown.
    :param exact: computes the exact posterior; None: the space is too large.
    :param recipe: how the guide is trained.
    :param target: the name of the target distribution.
    :param demonstrations: arguments of model and guide and a dict of values, with which a replay buffer starts.
    :param shows: a function of a directory that returns what `lmppl compare` prints in addition, and saves pictures
        there; None: nothing.

    Example::

        from lmppl.models import EXPERIMENTS

        experiment = EXPERIMENTS["infilling"]()
        trainer = experiment.gflownet()
        trainer.fit(experiment.batches, steps=100, held_out=experiment.held_out)
        trainer.run(*experiment.test).table(experiment.site, 0)
    """

    name: str
    lm: View
    guide_lm: View
    model: Program
    guide: Program
    # The arguments of a training step, or a list of tasks where training uses other programs.
    batches: Callable[[int], tuple[Any, ...]] | Sequence[Task]
    held_out: tuple[Any, ...]  # validation observations
    test: tuple[Any, ...]  # unseen observations
    describe: Callable[[int], str]  # a test observation in words
    site: str = "z"
    exact: Enumeration | None = None  # None: the space cannot be enumerated
    recipe: Recipe = field(default_factory=Recipe)
    target: str = "the posterior"
    demonstrations: tuple[Any, ...] = ()  # arguments, and values that a replay buffer starts with
    shows: Callable[[Path], str] | None = None  # what `lmppl compare` prints in addition; saves pictures there

    def optimizer(self, learning_rate: float | None = None) -> torch.optim.Optimizer:
        """AdamW over the guide's parameters.

        :param learning_rate: None: the recipe's.
        """
        rate = self.recipe.learning_rate if learning_rate is None else learning_rate
        return torch.optim.AdamW(self.guide_lm.trainable_parameters(), lr=rate, betas=self.recipe.betas)

    def sized(self, observations: int, particles: int) -> Experiment:
        """The same experiment with other sizes of a training step.

        :param observations: observations in a step; a batch is split into parts of this size, and the rest of it is
            left out.
        :param particles: draws of the guide for each observation.
        """
        recipe = replace(self.recipe, observations=observations, particles=particles)
        if callable(self.batches):
            return replace(self, recipe=recipe, batches=_parts(self.batches, observations))
        tasks = [task._replace(batches=_parts(task.batch, observations)) for task in self.tasks]
        return replace(self, recipe=recipe, batches=tasks)

    @property
    def tasks(self) -> list[Task]:
        """The programs to train on, each with its batches."""
        return [Task(self.model, self.guide, self.batches)] if callable(self.batches) else [*self.batches]

    def gflownet(self) -> GFlowNet:
        """A `GFlowNet` trainer of the guide, by the recipe."""
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
    """Each batch in parts of so many observations: a function of the step."""
    parts = max(1, len(batches(0)[0]) // rows)

    def part(step: int) -> tuple[Any, ...]:
        batch, at = divmod(step, parts)
        return tuple(x[at * rows : (at + 1) * rows] for x in batches(batch))

    return part


class Options(TypedDict, total=False):
    """The options of every experiment."""

    recipe: Recipe | None  # how the guide is trained; None: the experiment's own, see `recipe_for`
    seed: int  # of the guide's first weights and of the batches
    checkpoint: str | Path | None  # a saved adapter from which the guide starts
    setting: str  # the target: "posterior", or "paper", that of the paper's released code
    device: str | None  # of the embedded language model


@dataclass(frozen=True)
class Start:
    """What an experiment has before its programs: the language models, the recipe and the options."""

    name: str
    lm: Any  # a LanguageModel, or another kind of language model that the experiment needs
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
        """The start with ``lm``, or with the embedded language model ``world``, and with these `Options`.

        :param default: the recipe where none is given; on a large network, see `recipe_for`.
        :param needs: what another language model needs as ``data``, in words; None: nothing.
        :param kind: the class of the language model.
        :raises ValueError: for another language model without ``data``, one of another class, and an unknown setting.
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

        :param splits: observations for training, validation and test.
        :param describe: a function from an observation to its description.
        :param encode: a function from observations to the programs' arguments; None: ``task.encode``.
        :param fields: other fields of `Experiment`, or replacements of those made here.
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
        """The number of tokens of the longest of these texts."""
        return int(length(self.lm.encode(texts)).max())


def embedded_splits(name: str) -> tuple[list[Any], list[Any], list[Any]]:
    """Embedded observations for training, and the first ones for validation and for test."""
    train, held_out, test = (embedded.data(name, s) for s in ("train", "validation", "test"))
    return train, held_out[:TEST_OBSERVATIONS], test[:TEST_OBSERVATIONS]


def split(observations: list[T]) -> tuple[list[T], list[T], list[T]]:
    """Observations for training, validation (the last eighth) and test (the eighth before); one or two serve all."""
    n = max(1, min(TEST_OBSERVATIONS, len(observations) // 8))
    if len(observations) < 3:
        return observations, observations[-1:], observations[-1:]
    return observations[: -2 * n], observations[-n:], observations[-2 * n : -n]


def tempered(model: Program, temperature: float) -> Program:
    """The model with its joint to the power 1 / temperature: the target of training with a final reward temperature."""
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
