"""The protocols of inference algorithms: a model, an optional guide, and ``run(*args) -> Posterior``."""

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
    r"""An inference algorithm: ``run(*args)`` returns the posterior :math:`p(z \mid y)` of its model's latent sites.

    Derive your own algorithm from it: keep ``model`` and ``guide`` as attributes (a guide of None means that the model
    proposes, or that nothing is proposed) and write `run`.  `compare`, `diagnose`, `Sharded` and the E-step of
    `VariationalEM` then accept it.  An algorithm that wraps another one also writes `on`, and calls the inner one's.
    A class without this base follows the protocol if it has these four attributes.

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
        """The posterior for these arguments, which are passed to both the model and the guide."""

    def on(self, model: Program, guide: Program | None = None) -> Self:
        """A copy of this algorithm for another model, and for another guide if it has one.

        :param model: a Pyro program.
        :param guide: a Pyro program; None: the algorithm's own guide.  Ignored by an algorithm without a guide.
        """
        return _elsewhere(self, model, guide)


@runtime_checkable
class Sampler(Algorithm, Protocol):
    """An algorithm whose number of particles can be chosen, so that `compare` can give it a budget.

    A subclass keeps the number as an attribute ``num_particles``, or writes `sized` itself.

    Example::

        >>> sampler = Importance(model, num_particles=64)
        >>> sampler.sized(100).run(x, y).num_particles
        100
        >>> sampler.num_particles  # unchanged: `sized` returns a copy
        64
    """

    def sized(self, num_particles: int) -> Self:
        """A copy of this algorithm whose posteriors have ``num_particles`` particles.

        :raises ValueError: for fewer than one.
        """
        at_least(1, num_particles=num_particles)
        return _with(self, num_particles=num_particles)


def on(algorithm: Any, model: Program, guide: Program | None = None) -> Any:
    """`Algorithm.on` for any object with ``model`` and ``run``.

    :raises ValueError: if the object's model cannot be set.
    """
    own = getattr(algorithm, "on", None)
    return own(model, guide) if callable(own) else _elsewhere(algorithm, model, guide)


def sized(algorithm: Any, num_particles: int) -> Any:
    """`Sampler.sized` for any object with ``run`` and a number of particles: an attribute, or an argument of ``run``.

    :raises ValueError: if the object has no number of particles.
    """
    own, kind = getattr(algorithm, "sized", None), type(algorithm)
    if callable(own):
        return own(num_particles)
    if "num_particles" in inspect.signature(algorithm.run).parameters:
        if not hasattr(kind, "run"):  # ``run`` is a function set on the object
            return _with(algorithm, run=partial(algorithm.run, num_particles=num_particles))

        @wraps(kind.run)
        def run(self: Any, *args: Any, **kwargs: Any) -> Posterior:
            found: Posterior = kind.run(self, *args, **{"num_particles": num_particles, **kwargs})
            return found

        return _with(algorithm, __class__=type(kind.__name__, (kind,), {"run": run}))
    if isinstance(getattr(algorithm, "num_particles", None), int):
        return _with(algorithm, num_particles=num_particles)
    raise ValueError(f"budgets: {kind.__name__} has no number of particles, so it cannot be given a budget")


def query_of(algorithm: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], nesting: int | None = None) -> Query:
    """The query of ``algorithm.run(*args, **kwargs)``; a guide that is the model itself counts as none."""
    guide = getattr(algorithm, "guide", None)
    return Query(algorithm.model, None if guide == algorithm.model else guide, args, kwargs, nesting)


def posterior_of(algorithm: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Posterior:
    """The posterior that an algorithm returns.

    :raises ValueError: if it returns something else.
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
    """A copy with other values of some attributes; frozen dataclasses are allowed."""
    other = copy.copy(algorithm)
    for name, value in attributes.items():
        try:
            object.__setattr__(other, name, value)
        except AttributeError as error:
            what = f"{type(algorithm).__name__}.{name} cannot be set"
            raise ValueError(f"algorithm: {what}; give it the methods of lmppl.inference.Sampler") from error
    return other
