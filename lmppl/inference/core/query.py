"""`Query`: a model, a guide and their arguments; and `Pair`, the two traces that they produce."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from . import programs
from .plates import Plates, kept_plates
from .programs import Program, Sketch, Substitute
from .sites import lms_of


def unknown(*args: Any, **kwargs: Any) -> Any:
    """Stands in for the model of a query that was read from a file: a file holds only the arguments."""
    raise ValueError("model: a posterior from a file does not know its program")


@dataclass(frozen=True)
class Query:
    r"""A question to an algorithm: the posterior :math:`p(z \mid y)` of a model, for one call's arguments.

    It bundles a model, an optional guide q, and the arguments that both are called with.  `trace` and `run` run the
    programs with all particles at once: every site gets the shape (particle, *plate axes, *event).  An algorithm of
    your own starts with ``Query(self.model, self.guide, args, kwargs)``.  A `Posterior` keeps its query as
    ``posterior.sites.query``, for predictions and files.

    :param model: the Pyro program whose latent sites are inferred; its ``obs=`` sites are the observations.
    :param guide: a Pyro program that samples the model's latent sites; None: the model proposes them itself.
    :param args: the positional arguments of model and guide, a tuple.
    :param kwargs: their keyword arguments, a dict.
    :param max_plate_nesting: how many batch axes their plates take; None or infinite: found from one run of both, in
        which texts are placeholders and no network runs.

    Example::

        >>> query = Query(model, guide, (x, y))
        >>> query.nesting  # one plate, "stories"
        1
        >>> query.sketch(particles=3).matched().plates().names
        ('stories',)
        >>> weigh(query, 64).u.shape  # (particle, stories)
        torch.Size([64, 2])
    """

    model: Program
    guide: Program | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_plate_nesting: int | float | None = None

    @property
    def proposal(self) -> Program:
        """The program that draws the latent values: the guide, or the model where there is no guide."""
        return self.model if self.guide is None else self.guide

    @property
    def given(self) -> tuple[Program, Program, tuple[Any, ...], dict[str, Any]]:
        """Model, proposal, args and kwargs, in the order of public signatures such as `Objective.loss_at`."""
        return self.model, self.proposal, self.args, dict(self.kwargs)

    @cached_property
    def sketches(self) -> list[Trace]:
        """One trace of the proposal, and one of the model if there is a guide.

        Texts are placeholders, so only shapes mean something, and no network runs.
        """
        both = [self.model] if self.guide is None else [self.guide, self.model]
        return programs.sketches(both, self.args, dict(self.kwargs))

    @cached_property
    def nesting(self) -> int:
        """How many batch axes the plates take: the number given, or the one found by `sketches`."""
        given = programs.given_nesting(self.max_plate_nesting)
        return programs.nesting_of(self.sketches) if given is None else given

    @property
    def networks(self) -> list[Any]:
        """The networks of the text sites, each once.  The sum of their ``tokens_scored`` is an algorithm's cost."""
        nodes = [node for sketch in reversed(self.sketches) for node in programs.scored(sketch).values()]
        lms = [lm for node in nodes for lm in lms_of(node["fn"])]
        return list({id(lm.network): lm.network for lm in lms}.values())

    def trace(self, program: Program, *handlers: Messenger, particles: int, prefixes: int | None = None) -> Trace:
        """One run of a program on this query's arguments, with a particle axis on the left of its plates.

        :param program: the model, the guide, or another program with the same arguments.
        :param handlers: Pyro messengers that act inside the particle plate.
        :param particles: the size of the particle axis.
        :param prefixes: the size of a further axis on the left of the particles; None: there is none.
        """
        shape: dict[str, Any] = {"nesting": self.nesting, "particles": particles, "prefixes": prefixes}
        return programs.trace(program, self.args, dict(self.kwargs), *handlers, **shape)

    def run(self, *handlers: Messenger, particles: int, prefixes: int | None = None) -> Pair:
        """One run of the proposal, and one of the model at the values that the proposal drew.

        The model runs without gradient.  Without a guide the two traces are the same.

        :param handlers: Pyro messengers for the run of the proposal.
        :param particles: the size of the particle axis.
        :param prefixes: the size of a further axis on the left of the particles; None: there is none.
        """
        shape: dict[str, Any] = {"particles": particles, "prefixes": prefixes}
        proposal = self.trace(self.proposal, *handlers, **shape)
        if self.guide is None:
            return Pair(self, proposal, proposal, particles)
        with torch.no_grad():
            target = self.trace(self.model, Substitute(programs.values(proposal), proposal), **shape)
        return Pair(self, proposal, target, particles)

    def at(self, values: Mapping[str, Tensor], *, particles: int, prefixes: int | None = None) -> Pair:
        """Both programs at given values of their latent sites and subsamples.

        :param values: by site, (particle, *plate axes, *event) each, as in ``Pair.values``.
        :param particles: the size of the particle axis.
        :param prefixes: the size of a further axis on the left of the particles; None: there is none.
        """
        return self.run(Substitute(values), particles=particles, prefixes=prefixes)

    @torch.no_grad()
    def sketch(self, *, particles: int) -> Pair:
        """The same as `run` with placeholders for texts, so that no network runs; other latents are drawn.

        :param particles: the size of the particle axis.
        """
        proposal = self.trace(self.proposal, Sketch(), particles=particles)
        held = Substitute(programs.values(proposal))
        return Pair(self, proposal, self.trace(self.model, Sketch(), held, particles=particles), particles)


@dataclass(frozen=True)
class Pair:
    """A trace of the proposal and one of the model at the same values; without a guide they are the same trace."""

    query: Query
    proposal: Trace
    model: Trace
    particles: int

    def matched(self) -> Pair:
        """Returns this pair.

        :raises SiteMismatch: if model and guide do not have the same latent sites.
        """
        if self.query.guide is not None:
            programs.match(self.model, self.proposal)
        return self

    @property
    def values(self) -> dict[str, Tensor]:
        """The values of latent sites and subsamples, (particle, *plate axes, *event) each."""
        return programs.values(self.proposal)

    def plates(self, *, subsampling: bool = False) -> Plates:
        """The kept plates: those that enclose every latent, observation and factor of both traces.

        :raises ValueError: for a subsampled plate that is not kept, unless ``subsampling`` is true.
        """
        traces = [self.model] if self.query.guide is None else [self.model, self.proposal]
        return kept_plates(traces, self.query.nesting, subsampling=subsampling)
