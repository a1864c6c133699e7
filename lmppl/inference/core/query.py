"""`Query`: what an algorithm is given, and the pair of traces that a guide and a model make of it."""

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
    """Stands for the model of a query that was read from a file, which holds the arguments alone."""
    raise ValueError("model: a posterior from a file does not know its program")


@dataclass(frozen=True)
class Query:
    r"""What an algorithm is asked: :math:`p(z \mid y)` of a model, perhaps with a guide q, for the arguments of both.

    :param model: a Pyro program.
    :param guide: another, with the model's latent sites; None: the model proposes.
    :param args: what both are called with, and ``kwargs``.
    :param max_plate_nesting: how many axes their plates take; None or infinite: guessed, once, from a run of both that
        asks no network.

    `trace` and `run` run them with particles on the left of every site, (particle, *plate axes, *event).  A `Posterior`
    keeps its query (``posterior.sites.query``), for predictions and files.

    Example::

        query = Query(model, guide, (x, y))
        weighted = weigh(query, 64)
    """

    model: Program
    guide: Program | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_plate_nesting: int | float | None = None

    @property
    def proposal(self) -> Program:
        """What draws latent values: the guide, else the model."""
        return self.model if self.guide is None else self.guide

    @property
    def given(self) -> tuple[Program, Program, tuple[Any, ...], dict[str, Any]]:
        """Model, guide, args and kwargs, as signatures that are public take them."""
        return self.model, self.proposal, self.args, dict(self.kwargs)

    @cached_property
    def sketches(self) -> list[Trace]:
        """A trace of what proposes, and of the model where that is another: shapes alone, no network is asked."""
        both = [self.model] if self.guide is None else [self.guide, self.model]
        return programs.sketches(both, self.args, dict(self.kwargs))

    @cached_property
    def nesting(self) -> int:
        """How many axes the plates take."""
        given = programs.given_nesting(self.max_plate_nesting)
        return programs.nesting_of(self.sketches) if given is None else given

    @property
    def networks(self) -> list[Any]:
        """The networks behind the texts, each once: whose ``tokens_scored`` an algorithm costs."""
        nodes = [node for sketch in reversed(self.sketches) for node in programs.scored(sketch).values()]
        lms = [lm for node in nodes for lm in lms_of(node["fn"])]
        return list({id(lm.network): lm.network for lm in lms}.values())

    def trace(self, program: Program, *handlers: Messenger, particles: int, prefixes: int | None = None) -> Trace:
        """One run of a program on these arguments, with particles (and prefixes) on the left of its plates."""
        shape: dict[str, Any] = {"nesting": self.nesting, "particles": particles, "prefixes": prefixes}
        return programs.trace(program, self.args, dict(self.kwargs), *handlers, **shape)

    def run(self, *handlers: Messenger, particles: int, prefixes: int | None = None) -> Pair:
        """What proposes, under these handlers, and without gradient the model at the values that came out."""
        shape: dict[str, Any] = {"particles": particles, "prefixes": prefixes}
        proposal = self.trace(self.proposal, *handlers, **shape)
        if self.guide is None:
            return Pair(self, proposal, proposal, particles)
        with torch.no_grad():
            target = self.trace(self.model, Substitute(programs.values(proposal)), **shape)
        return Pair(self, proposal, target, particles)

    def at(self, values: Mapping[str, Tensor], *, particles: int, prefixes: int | None = None) -> Pair:
        """Both programs at given values of the latents (and subsamples)."""
        return self.run(Substitute(values), particles=particles, prefixes=prefixes)

    @torch.no_grad()
    def sketch(self, *, particles: int) -> Pair:
        """As `run`, with placeholders for texts: no network is asked, and other latents are drawn."""
        proposal = self.trace(self.proposal, Sketch(), particles=particles)
        held = Substitute(programs.values(proposal))
        return Pair(self, proposal, self.trace(self.model, Sketch(), held, particles=particles), particles)


@dataclass(frozen=True)
class Pair:
    """A trace of what proposes and one of the model, at the same values; without a guide they are one."""

    query: Query
    proposal: Trace
    model: Trace
    particles: int

    def matched(self) -> Pair:
        """This pair; SiteMismatch where model and guide have not the same latent sites."""
        if self.query.guide is not None:
            programs.match(self.model, self.proposal)
        return self

    @property
    def values(self) -> dict[str, Tensor]:
        """Latents and subsamples, (particle, *plate axes, *event)."""
        return programs.values(self.proposal)

    def plates(self, *, subsampling: bool = False) -> Plates:
        """The plates that enclose every site of both.

        :raises ValueError: for a subsampled plate that is not kept, unless ``subsampling``.
        """
        traces = [self.model] if self.query.guide is None else [self.model, self.proposal]
        return kept_plates(traces, self.query.nesting, subsampling=subsampling)
