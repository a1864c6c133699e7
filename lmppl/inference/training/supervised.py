"""Supervised fine-tuning: maximum likelihood of given latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from pyro import poutine
from torch import Tensor
from torch.optim import Optimizer

from ..core import programs
from ..core.programs import Program
from ..core.query import Query
from .densities import log_likelihood
from .trainer import Trainer

Examples: TypeAlias = Callable[..., tuple[tuple[Any, ...], Mapping[str, Tensor]]]


class SupervisedFineTuning(Trainer):
    r"""Trains the guide by maximum likelihood on given latents.

    .. math:: \mathcal L = -\log q(z \mid x, y), \qquad (x, z, y) \text{ an example}

    averaged over the guide's kept plates (those that enclose every site): the cross-entropy of whole texts, so that
    longer texts weigh more.  On exact draws of the posterior the guide converges to the posterior.  On other data it
    learns how they were written, independently of the model.

    :param model: a Pyro program.  Training does not use it; `run` and `evaluate` do.
    :param guide: a Pyro program with the model's latent sites.
    :param optimizer: a torch optimiser over the guide's trainable parameters.
    :param examples: a function called with a batch, which returns (arguments of model and guide, values of the latent
        sites by site).  None: the last item of a batch is the dict of values, the items before it are the arguments.
        Values have the shapes that the guide would draw, (*plates, *event), and texts end with their stop.
    :param clip: the largest norm of the gradient.
    :param max_plate_nesting: how many axes the plates of model and guide take; None: found from a run of both that
        calls no network.

    ``held_out`` of `fit` and the arguments of `run` are arguments of the model, without latents.

    :raises ValueError: in a step, for latents without a value, values without a site, impossible values, and a plate
        that subsamples its observations.

    Example::

        tuning = SupervisedFineTuning(model, guide, optimizer=optimizer)
        tuning.fit([(x, y, {"z": z})], steps=100, held_out=(x, y))
        posterior = tuning.run(x, y)
        SupervisedFineTuning(model, guide, optimizer=optimizer, examples=lambda x, z, y: ((x, y), {"z": z}))
        SupervisedFineTuning(model, guide, optimizer=optimizer, examples=dreams(model))  # the sleep phase
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        optimizer: Optimizer,
        examples: Examples | None = None,
        clip: float = 1.0,
        max_plate_nesting: int | None = None,
    ):
        super().__init__(model, guide, optimizer=optimizer, clip=clip, max_plate_nesting=max_plate_nesting)
        self.examples: Examples = _last_is_values if examples is None else examples

    def arguments(self, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        with torch.random.fork_rng(devices=[]):
            return self.examples(*batch, **kwargs)[0]

    def update(self, query: Query, step: int) -> dict[str, float]:
        given, values = self.examples(*query.args, **query.kwargs)
        loss = -log_likelihood(replace(query, args=given), values).mean()
        return {"loss": loss.item(), "grad_norm": self.descend(loss)}


def _last_is_values(*batch: Any, **kwargs: Any) -> tuple[tuple[Any, ...], Mapping[str, Tensor]]:
    if not batch or not isinstance(batch[-1], Mapping):
        raise ValueError(
            "examples: the last item of a batch must be a dict of latent values, unless examples= is a function"
        )
    return batch[:-1], batch[-1]


def dreams(model: Program) -> Examples:
    r"""A function that simulates the model, :math:`(z, y') \sim p`, and puts the simulated y' in the place of y.

    Use it as ``simulate`` of `ReweightedWakeSleep` or as ``examples`` of `SupervisedFineTuning`.  It finds each
    observation among the arguments by identity: an observed site must observe an argument itself, as in
    ``pyro.sample("y", ..., obs=y)`` of ``model(x, y)``.  A simulated text may be as long as the model allows under
    these arguments: with ``max_tokens=length(y), stop=None`` it is as long as y.  For several simulations of each
    observation, repeat the arguments.

    :param model: a Pyro program.
    :returns: a function of the model's arguments that returns (arguments with y' for y, latent values by site).
    :raises ValueError: when called, where an observation is not an argument, or the model has a factor, which cannot be
        simulated.

    Example::

        (x, simulated), values = dreams(model)(x, y)
    """

    @torch.no_grad()
    def simulate(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        with poutine.block(hide_fn=lambda msg: msg["type"] == "sample"):
            run = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
        dreamt, values = list(args), {}
        for name, node in programs.latents(run).items():
            if not node["infer"].get("was_observed"):
                values[name] = node["value"]
                continue
            if node["infer"].get("_deterministic"):
                continue
            where = [i for i, arg in enumerate(args) if arg is node["infer"]["obs"]]
            if not where:
                raise ValueError(
                    f"simulate: what the site {name!r} observes is none of the arguments, or it is a factor, which "
                    "cannot be simulated; write a function of your own"
                )
            for i in where:
                dreamt[i] = node["value"]
        return tuple(dreamt), values

    return simulate
