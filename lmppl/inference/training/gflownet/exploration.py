"""What to draw training samples from instead of the guide: u may be computed at any z."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine import Trace
from torch import Tensor

from ...core import programs
from ...core.arguments import is_program
from ...core.programs import Draw, Program, Substitute, Temper, Values
from ...core.query import Query
from ...core.sites import Site
from ..loop.schedules import Schedule, at, checked


@dataclass
class Memory:
    """What an objective remembers of its steps; a part of the state of a training run."""

    impossible: float = 0.0  # largest share of reward zero in the draws of a step; 1 if an observation had no other
    fruitless: int = 0  # searches in a row that found nothing
    rest: int = 0  # steps until the next search


@dataclass(frozen=True)
class Source(Query):
    """What an exploration draws from: the programs, their arguments, the step of the training and what is remembered.

    All draws for one loss share one subsample.

    :param guide: a Pyro program with the model's latent sites.
    :param step: the number of the training step.
    :param subsamples: the subsamples of plates, by name.
    :param memory: what the objective remembers.
    """

    guide: Program
    step: int = 0
    subsamples: Values = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)

    def draw(self, program: Program, num_particles: int, temper: Temper | None = None) -> Values:
        """Latent values of one run of ``program``.

        :param program: a Pyro program, called with the source's arguments.
        :param num_particles: how many values of each latent.
        :param temper: None, or a function from a text site to the distribution that draws it.
        :returns: by site, (particle, *plate axes, *event).
        """
        return self.drawn(program, num_particles, Draw(temper))[1]

    def drawn(self, program: Program, num_particles: int, draw: Draw) -> tuple[Trace, Values]:
        """The trace of one run of ``program``, and its latent values."""
        run = self.trace(program, draw, Substitute(self.subsamples), particles=num_particles)
        latents = {name: node["value"] for name, node in programs.latents(run).items()}
        self.subsamples.update({n: v for n, v in programs.values(run).items() if n not in latents})
        return run, latents


class Exploration(ABC):
    """A way to draw training samples.  A subclass defines `draw`.

    Off-policy samples are allowed, because u is the same number for every z at the posterior: any distribution of z
    will do, and log q is always that of the guide.

    Example::

        class HalfAndHalf(Exploration):  # half from the guide, half from the prior: Mixture does it, too
            def draw(self, source, num_particles):
                return Mixture((OnPolicy(), 0.5), (Prior(), 0.5)).draw(source, num_particles)

        GFlowNet(model, guide, optimizer=optimizer, exploration=HalfAndHalf()).fit(batches, steps=100)
    """

    @abstractmethod
    def draw(self, source: Source, num_particles: int) -> Values:
        """Draws values of every latent site.

        :param source: model, guide, their arguments, and the step of the training; ``source.draw(program, n)`` runs
            one.
        :param num_particles: how many values of each.
        :returns: values by site, (particle, *plate axes, *event).
        """


class OnPolicy(Exploration):
    r"""Draws from the guide, :math:`z \sim q`.

    Example::

        trainer = GFlowNet(model, guide, optimizer=optimizer, exploration=OnPolicy())
        trainer.fit(batches, steps=100)
    """

    def draw(self, source: Source, num_particles: int) -> Values:
        return source.draw(source.guide, num_particles)


class Prior(Exploration):
    r"""Draws from the model's latent sites, unconditioned: :math:`z \sim p(z)`.

    Example::

        exploration = Mixture((OnPolicy(), 0.75), (Prior(), 0.25))
        trainer = GFlowNet(model, guide, optimizer=optimizer, exploration=exploration)
        trainer.fit(batches, steps=100)
    """

    def draw(self, source: Source, num_particles: int) -> Values:
        return source.draw(source.model, num_particles)


class Proposal(Exploration):
    """Draws from any program with the guide's latent sites, called with the same arguments.

    :param program: a Pyro program, such as a guide masked token by token.
    :raises ValueError: for what is not a function.

    Example::

        exploration = Mixture((OnPolicy(), 0.5), (Proposal(masked), 0.5))
        trainer = GFlowNet(model, guide, optimizer=optimizer, exploration=exploration)
        trainer.fit(batches, steps=100)
    """

    def __init__(self, program: Program):
        is_program(program=program)
        self.program = program

    def draw(self, source: Source, num_particles: int) -> Values:
        return source.draw(self.program, num_particles)


class _Broadened(Exploration):
    """The guide, with broader distributions of its texts in the last ``fraction`` of the particles."""

    def __init__(self, amount: Schedule, fraction: Schedule):
        self.amount = amount
        self.fraction = checked(fraction, "fraction", lambda f: 0 <= f <= 1, "must lie in [0, 1]")

    neutral = 0.0  # the amount that changes nothing

    @staticmethod
    @abstractmethod
    def broaden(fn: Any, amount: Tensor) -> TorchDistribution:
        """The distribution ``fn`` of a text, broader by ``amount`` (particle, *1s)."""

    def draw(self, source: Source, num_particles: int) -> Values:
        amount = torch.full((num_particles,), self.neutral)  # on the CPU; moved to where the text is drawn
        kept = num_particles - round(at(self.fraction, source.step) * num_particles)
        amount[kept:] = at(self.amount, source.step)
        amount = amount.view(-1, *[1] * source.nesting)  # (particle, *plate axes)

        def temper(site: Site) -> TorchDistribution:
            each = amount.reshape(*amount.shape, *[1] * site.stacked)
            return self.broaden(site.fn, each) if site.broadens else site.fn

        return source.draw(source.guide, num_particles, temper if kept < num_particles else None)


class Tempered(_Broadened):
    r"""Draws from the guide; the last ``fraction`` of the particles at a higher temperature of every token.

    .. math:: z_t \sim q(z_t \mid z_{<t})^{1/T} / \textstyle\sum_v q(v \mid z_{<t})^{1/T}

    :param temperature: T > 0; 1 changes nothing.  A number or a function of the step.
    :param fraction: in [0, 1], of the particles.  A number or a function of the step.
    :raises ValueError: for a fraction outside [0, 1] or a temperature that is not positive.

    Example::

        exploration = Tempered(temperature=1.5, fraction=0.25)
        trainer = GFlowNet(model, guide, optimizer=optimizer, exploration=exploration)
        trainer.fit(batches, steps=100)
    """

    neutral = 1.0

    def __init__(self, temperature: Schedule = 1.5, fraction: Schedule = 0.25):
        super().__init__(checked(temperature, "temperature", lambda t: t > 0, "must be positive"), fraction)

    @staticmethod
    def broaden(fn: Any, amount: Tensor) -> TorchDistribution:
        return fn.broadened(temperature=amount)


class EpsilonUniform(_Broadened):
    r"""Draws from the guide; the last ``fraction`` of the particles with uniform tokens mixed in.

    .. math:: z_t \sim (1 - \epsilon) \, q(z_t \mid z_{<t}) + \epsilon / |allowed|

    :param epsilon: in [0, 1], the probability that a token is drawn uniformly from the allowed ones.  A number or a
        function of the step.
    :param fraction: in [0, 1], of the particles.  A number or a function of the step.
    :raises ValueError: for an epsilon or a fraction outside [0, 1].

    Example::

        exploration = EpsilonUniform(epsilon=0.05)
        trainer = GFlowNet(model, guide, optimizer=optimizer, exploration=exploration)
        trainer.fit(batches, steps=100)
    """

    def __init__(self, epsilon: Schedule = 0.05, fraction: Schedule = 1.0):
        super().__init__(checked(epsilon, "epsilon", lambda e: 0 <= e <= 1, "must lie in [0, 1]"), fraction)

    @staticmethod
    def broaden(fn: Any, amount: Tensor) -> TorchDistribution:
        return fn.broadened(epsilon=amount)


class Mixture(Exploration):
    """Draws from several explorations, each for a share of the particles.

    :param parts: pairs (exploration, weight).  A weight is a number or a function of the step, not negative; weights
        need not sum to one.  Shares are rounded so that they add up to the number of particles.
    :raises ValueError: for what are not such pairs; when it draws, for weights that are all zero.

    Example::

        exploration = Mixture((OnPolicy(), 0.5), (Tempered(2.0, fraction=1.0), 0.25), (Prior(), 0.25))
        trainer = GFlowNet(model, guide, optimizer=optimizer, exploration=exploration)
        trainer.fit(batches, steps=100)
    """

    def __init__(self, *parts: tuple[Exploration, Schedule]):
        if not parts:
            raise ValueError("parts: a mixture needs at least one (exploration, weight)")
        for part in parts:
            if not isinstance(part, tuple | list) or len(part) != 2 or not isinstance(part[0], Exploration):
                raise ValueError(f"parts: expected pairs (exploration, weight), got {part!r}")
        self.parts = [(e, checked(w, "weight", lambda x: x >= 0, "must not be negative")) for e, w in parts]

    def draw(self, source: Source, num_particles: int) -> Values:
        weights = [at(w, source.step) for _, w in self.parts]
        if sum(weights) <= 0:
            raise ValueError("parts: the weights of a mixture must not all be zero")
        drawn, first, share = [], 0, 0.0
        for (exploration, _), weight in zip(self.parts, weights, strict=True):
            share += weight / sum(weights)
            last = round(share * num_particles)
            if last > first:
                drawn.append(exploration.draw(source, last - first))
            first = last
        return programs.cat_particles(drawn)
