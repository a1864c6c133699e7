"""What every algorithm is: a model, perhaps a guide, and ``run(*args) -> Posterior``; and the same one on others.

An algorithm that stands inside another goes along: `Sharded(a).on(model)` is `Sharded(a.on(model))`.
"""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial, wraps
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

from ..core.arguments import at_least
from ..core.programs import Program
from ..core.query import Query
from .posterior import Posterior

A = TypeVar("A")


@runtime_checkable
class Algorithm(Protocol):
    r"""Answers with the posterior :math:`p(z \mid y)` of its model's latents, for the arguments of ``run``.

    A subclass keeps ``model`` and ``guide`` (None: the model proposes, or nothing does) as attributes and writes `run`.
    `compare`, `diagnose`, `Sharded` and the E-step of `VariationalEM` then take it.  One that wraps another algorithm
    writes `on` too, and hands it on.  A class of any other base keeps the protocol if it has these four.

    Example::

        class PriorDraws(Algorithm):
            def __init__(self, model):
                self.model = model

            def run(self, *args, **kwargs):
                query = Query(self.model, None, args, kwargs)
                drawn = weigh(query, 100)
                log_weights = drawn.u.log_softmax(0) + drawn.u.exp().mean(0).log()  # (100, *plates)
                return Posterior.of(drawn.guide, drawn.plates, log_weights, query)
    """

    model: Program
    guide: Program | None = None

    @abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        """The posterior for these arguments, of model and guide alike."""

    def on(self, model: Program, guide: Program | None = None) -> Self:
        """The same algorithm on another model, and where it has a guide on another guide; None: its own stays."""
        return _elsewhere(self, model, guide)


@runtime_checkable
class Sampler(Algorithm, Protocol):
    """An algorithm whose answers have as many particles as one likes; so `compare` fits it to a budget.

    A subclass keeps their number as ``num_particles``, or writes `sized` itself.

    Example::

        sampler = Importance(model, num_particles=64)
        sampler.sized(1000).run(x, y).num_particles  # 1000; the sampler itself stays as it is
    """

    def sized(self, num_particles: int) -> Self:
        """The same algorithm with this many particles an answer."""
        at_least(1, num_particles=num_particles)
        return _with(self, num_particles=num_particles)


def on(algorithm: Any, model: Program, guide: Program | None = None) -> Any:
    """`Algorithm.on`, of anything with ``model`` and ``run``.

    :raises ValueError: for an algorithm whose model cannot be set.
    """
    own = getattr(algorithm, "on", None)
    return own(model, guide) if callable(own) else _elsewhere(algorithm, model, guide)


def sized(algorithm: Any, num_particles: int) -> Any:
    """`Sampler.sized`, of anything with ``run`` and a number of particles: its attribute, or an argument of ``run``.

    :raises ValueError: for an algorithm that has none.
    """
    own, kind = getattr(algorithm, "sized", None), type(algorithm)
    if callable(own):
        return own(num_particles)
    if "num_particles" in inspect.signature(algorithm.run).parameters:
        if not hasattr(kind, "run"):  # a function of its own
            return _with(algorithm, run=partial(algorithm.run, num_particles=num_particles))

        @wraps(kind.run)
        def run(self: Any, *args: Any, **kwargs: Any) -> Posterior:
            found: Posterior = kind.run(self, *args, **{"num_particles": num_particles, **kwargs})
            return found

        return _with(algorithm, __class__=type(kind.__name__, (kind,), {"run": run}))
    if isinstance(getattr(algorithm, "num_particles", None), int):
        return _with(algorithm, num_particles=num_particles)
    raise ValueError(f"budgets: {kind.__name__} has no number of particles to fit to one")


def query_of(algorithm: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], nesting: int | None = None) -> Query:
    """What an algorithm is asked by ``run(*args, **kwargs)``; a model that proposes for itself is no guide."""
    guide = getattr(algorithm, "guide", None)
    return Query(algorithm.model, None if guide == algorithm.model else guide, args, kwargs, nesting)


def posterior_of(algorithm: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Posterior:
    """What an algorithm answers.

    :raises ValueError: where that is no posterior.
    """
    found = algorithm.run(*args, **kwargs)
    if not isinstance(found, Posterior):
        name, got = type(algorithm).__name__, type(found).__name__
        raise ValueError(f"algorithm: {name}.run(*args) returns a {got}, expected a Posterior")
    return found


def _elsewhere(algorithm: A, model: Program, guide: Program | None) -> A:
    if guide is None or getattr(algorithm, "guide", None) is None:
        return _with(algorithm, model=model)
    return _with(algorithm, model=model, guide=guide)


def _with(algorithm: A, **attributes: Any) -> A:
    """A copy with other attributes, of a frozen dataclass too."""
    other = copy.copy(algorithm)
    for name, value in attributes.items():
        try:
            object.__setattr__(other, name, value)
        except AttributeError as error:
            what = f"{type(algorithm).__name__}.{name} cannot be set"
            raise ValueError(f"algorithm: {what}; give it the methods of lmppl.inference.Sampler") from error
    return other
