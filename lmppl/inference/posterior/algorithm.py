"""What every algorithm is: a model, perhaps a guide, and ``run(*args) -> Posterior``; and the same one on others.

An algorithm that stands inside another goes along: `Sharded(a).on(model)` is `Sharded(a.on(model))`.
"""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any, Protocol, Self, runtime_checkable

from ..core.arguments import at_least
from ..core.programs import Program
from .posterior import Posterior


@runtime_checkable
class Algorithm(Protocol):
    """Answers with a posterior of the model's latents, given its arguments."""

    @property
    def model(self) -> Program: ...

    @property
    def guide(self) -> Program | None:
        """None: the model proposes, or nothing does."""

    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        """The posterior for these arguments, of model and guide alike."""

    def on(self, model: Program, guide: Program | None = None) -> Self:
        """The same algorithm on another model, and where it has a guide on another guide; None: its own stays."""


@runtime_checkable
class Sampler(Algorithm, Protocol):
    """An algorithm whose answers have as many particles as one likes."""

    def sized(self, num_particles: int) -> Self:
        """The same algorithm with this many particles an answer."""


class OnPrograms:
    """`on` and `sized` of an algorithm that keeps ``model``, ``guide`` and ``num_particles`` as attributes."""

    model: Program
    guide: Program | None = None

    def on(self, model: Program, guide: Program | None = None) -> Self:
        """The same algorithm on another model, and where it has a guide on another guide; None: its own stays."""
        other = copy.copy(self)
        other.model = model
        if guide is not None and self.guide is not None:
            other.guide = guide
        return other


class Particles(OnPrograms):
    num_particles: int

    def sized(self, num_particles: int) -> Self:
        """The same algorithm with this many particles an answer."""
        at_least(1, num_particles=num_particles)
        other = copy.copy(self)
        other.num_particles = num_particles
        return other


def guide_of(algorithm: Any) -> Program | None:
    """An algorithm's guide; a model that proposes for itself is none."""
    guide: Program | None = getattr(algorithm, "guide", None)
    return None if guide is None or guide == getattr(algorithm, "model", None) else guide


def on(algorithm: Any, model: Program, guide: Program | None = None) -> Any:
    """`Algorithm.on`, of anything with ``model`` and ``run``."""
    if isinstance(algorithm, Algorithm):
        return algorithm.on(model, guide)
    other = copy.copy(algorithm)
    other.model = model
    if guide is not None and getattr(algorithm, "guide", None) is not None:
        other.guide = guide
    return other


def sized(algorithm: Any, num_particles: int) -> Any:
    """`Sampler.sized`, of anything with ``run`` and a number of particles.

    :raises ValueError: for an algorithm that has none.
    """
    if isinstance(algorithm, Sampler):
        return algorithm.sized(num_particles)
    if isinstance(getattr(algorithm, "num_particles", None), int):
        other = copy.copy(algorithm)
        other.num_particles = num_particles
        return other
    if "num_particles" in inspect.signature(algorithm.run).parameters:
        other = copy.copy(algorithm)
        other.run = partial(algorithm.run, num_particles=num_particles)
        return other
    raise ValueError(f"budgets: {type(algorithm).__name__} has no number of particles to fit to one")
