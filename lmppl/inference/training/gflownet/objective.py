"""What every GFlowNet objective shares: draw from the guide, compute u, compare one u with another."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyro.infer
import torch
from torch import Tensor, nn

from ...core import programs
from ...core.arguments import at_least, instance_of, is_number
from ...core.impossible import impossible_texts, observed_texts
from ...core.programs import Program, Substitute, Values
from ...core.query import Query
from ...core.sites import is_terminable
from ...core.validation import check_axes_once
from ...core.weights import Balance, balance
from ...processes import distributed
from ..loop.schedules import Schedule, at, checked
from .divergences import Divergence, mean, named
from .exploration import Exploration, Memory, OnPolicy, Source

log = logging.getLogger("lmppl")


class Objective(pyro.infer.ELBO):
    r"""A loss that is zero, for every set of samples, if and only if the guide is the posterior.

    .. math:: u(z) = \log p(z, observed) - \log q(z), \qquad
              q = p(z \mid observed) \iff u(z) = \log Z \text{ for every } z

    An objective is a *balance* and a *divergence*.  The balance, its class, defines which u of *one* observation are
    compared (`reduce`); the divergence defines how.  With the squared divergence the loss is a variance of u.
    Gradients flow through log q only.

    There are three ways to use it: in `GFlowNet`; as the ``loss`` of `pyro.infer.SVI`; or called as ``objective(model,
    guide)``, a module whose call with the programs' arguments returns a differentiable loss.

    :param num_particles: samples for each observation.
    :param prefixes: "all", or how many prefixes of each text to use, at least 2; the first possible one and the whole
        text are always among them.  Only objectives that compare prefixes use it.
    :param exploration: the `Exploration` that draws the samples; None: the guide itself.
    :param reward_temperature: T in the target :math:`p(z, observed)^{1/T}`, a number or a function of the step.
    :param floor: nats.  A reward of zero counts as this much below the largest reward of its observation.
    :param max_plate_nesting: how many axes the plates of model and guide take; infinite, as in Pyro: found from a run
        of both that calls no network.
    :param divergence: how two u are compared: a name in `DIVERGENCES`, such as "squared" or "forward_kl", or a
        `Divergence`.  Near balance all of them are the squared loss.
    :raises ValueError: naming the argument that is out of its range.

    Example::

        objective = VarGrad(num_particles=8)  # or SubTB(), TrajectoryBalance(divergence="forward_kl"), ...
        optimizer.zero_grad()
        objective.differentiable_loss(model, guide, x, y).backward()
        optimizer.step()

    docs/extending.md shows how to write one.
    """

    def __init__(
        self,
        *,
        num_particles: int = 16,
        prefixes: int | str = "all",
        exploration: Exploration | None = None,
        reward_temperature: Schedule = 1.0,
        floor: float = 50.0,
        max_plate_nesting: int | float = float("inf"),
        divergence: Divergence | str = "squared",
    ):
        super().__init__(num_particles=num_particles, max_plate_nesting=max_plate_nesting)
        at_least(self.least_particles, num_particles=num_particles)
        if prefixes != "all" and (not isinstance(prefixes, int) or prefixes < 2):
            raise ValueError(f"prefixes: expected 'all' or an integer >= 2, got {prefixes!r}")
        self.prefixes = None if prefixes == "all" else int(prefixes)
        if exploration is not None:
            instance_of(Exploration, exploration=exploration)
        self.exploration = exploration
        is_number("positive", lambda x: x > 0, floor=floor)
        self.reward_temperature = checked(reward_temperature, "reward_temperature", lambda t: t > 0, "must be positive")
        self.floor = floor
        self.divergence = named(divergence)
        self.training_step = 0  # the argument of schedules
        self.memory = Memory()  # what the next draws know of the earlier ones
        self._told: set[str] = set()
        self._guessed: tuple[Program, Program, int] | None = None

    uses_prefixes = True
    least_particles = 1
    max_plate_nesting: int | float

    @abstractmethod
    def reduce(self, u: Tensor, balance: Balance) -> Tensor:
        """The loss of one site.  Subclasses define it.

        :param u: (prefix, particle, *kept), with one prefix where whole samples are compared.
        :param balance: what belongs to u, in its shape: ``valid``, ``at``, ``last``, ``stop``, ``log_p``.
            ``balance.identifies`` tells whether pairs within one sample suffice: every latent, on every process, is a
            text whose empty prefix is kept and possible.
        :returns: the loss of each element of the kept plates, (*kept).
        """

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the objective itself, such as those of log Z; most have none."""
        return iter(())

    def param_groups(self) -> list[dict[str, Any]]:
        """`parameters` as groups for a torch optimiser, with their options; `GFlowNet` adds them to its optimiser."""
        own = list(self.parameters())
        return [{"params": own, "weight_decay": 0.0}] if own else []

    def draw(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_particles: int | None = None,
        subsamples: Values | None = None,
    ) -> Values:
        """Draws training samples.

        :param model: a Pyro program.
        :param guide: a Pyro program with the model's latent sites.
        :param args: the arguments of both.
        :param kwargs: their keyword arguments.
        :param num_particles: samples for each observation; None: the objective's.
        :param subsamples: the subsamples of plates, by name, where they are fixed.
        :returns: the values of every latent, and of subsamples, by site, (particle, *plate axes, *event).
        """
        nesting = self.nesting(model, guide, args, kwargs)
        own = dict(subsamples or {})
        source = Source(model, guide, args, kwargs, nesting, self.training_step, own, self.memory)
        with torch.no_grad():
            drawn = (self.exploration or OnPolicy()).draw(source, num_particles or self.num_particles)
        return drawn | source.subsamples

    def balances(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], values: Values
    ) -> list[Balance]:
        """Computes u at these values.

        :param model: a Pyro program.
        :param guide: a Pyro program with the model's latent sites.
        :param args: the arguments of both.
        :param kwargs: their keyword arguments.
        :param values: the values of every latent by site, as `draw` returns them.
        :returns: a `Balance` for each text site that is cut, one site at a time; one in all where whole samples are
            compared.
        """
        query, n = self._query(model, guide, args, kwargs), self.num_particles
        with torch.no_grad():
            drawn = query.trace(guide, Substitute(values), particles=n)
            check_axes_once(query, lambda: query.at(values, particles=n).matched())
        texts = [name for name, node in programs.latents(drawn).items() if is_terminable(node["fn"])]
        sites = texts if self.uses_prefixes and texts else [None]
        return [balance(query, drawn, n, site, self.prefixes) for site in sites]

    def _query(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Query:
        return Query(model, guide, args, kwargs, self.nesting(model, guide, args, kwargs))

    def nesting(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """How many axes the plates take: as given, or found once for each pair of programs.

        :param model: a Pyro program.
        :param guide: a Pyro program with the model's latent sites.
        :param args: the arguments of both.
        :param kwargs: their keyword arguments.
        """
        if (given := programs.given_nesting(self.max_plate_nesting)) is not None:
            return given
        if self._guessed is None or self._guessed[0] is not model or self._guessed[1] is not guide:
            self._guessed = (model, guide, Query(model, guide, args, kwargs).nesting)
        return self._guessed[2]

    def residual(self, b: Balance) -> Tensor:
        r"""u of the tempered target, :math:`\frac1T \log p - \log q`; gradients flow through log q only.

        A reward of zero counts as ``floor`` nats below the group's largest, or as the group's smallest positive reward,
        if that is less.  Positive rewards are unchanged, however small, so that the loss is zero at the posterior.

        :param b: the balance.
        :returns: (prefix, particle, *kept); 0 where there is no balance term.
        """
        log_p = (b.log_p / at(self.reward_temperature, self.training_step)).masked_fill(~b.valid, -torch.inf)
        return (floored(log_p, self.floor, (0, 1)) - b.log_q).masked_fill(~b.valid, 0.0)

    def loss_at(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], values: Values
    ) -> tuple[Tensor, list[Balance]]:
        """The loss of these samples.

        :param model: a Pyro program.
        :param guide: a Pyro program with the model's latent sites.
        :param args: the arguments of both.
        :param kwargs: their keyword arguments.
        :param values: the values of every latent by site, as `draw` returns them.
        :returns: the differentiable loss, averaged over samples, plates and sites, and the balances it was computed
            from.
        """
        found = [_with_rewards(b) for b in self.balances(model, guide, args, kwargs, values)]
        if self._remember(found):
            for why in impossible_texts(observed_texts(self._query(model, guide, args, kwargs).sketches[-1])):
                self._say_once(f"an observation teaches nothing, because no latent explains it: {why}")
        identified = distributed.everywhere(all(b.identifies and _empty_is_possible(b) for b in found))
        found = [replace(b, identifies=identified) for b in found]
        losses = [self.reduce(self.residual(b), b).mean() for b in found]
        return torch.stack(losses).mean(), found

    def _remember(self, found: list[Balance]) -> bool:
        """Keeps the share of draws that are impossible; returns whether an observation has no possible draw."""
        dead = [whole(b) == -torch.inf for b in found]
        share = distributed.total(distributed.share() * sum(d.double().mean().item() for d in dead) / len(dead))
        none = any(bool(d.all(0).any()) for d in dead)
        if not distributed.everywhere(not none):
            share = 1.0
        self.memory.impossible = max(self.memory.impossible, share)
        return none

    def loss_and_balances(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, list[Balance]]:
        """`loss_at` of samples drawn by `draw`.

        :param model: a Pyro program.
        :param guide: a Pyro program with the model's latent sites.
        :param args: the arguments of both.
        :param kwargs: their keyword arguments.
        :returns: the differentiable loss, and the balances it was computed from.
        """
        return self.loss_at(model, guide, args, kwargs, self.draw(model, guide, args, kwargs))

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a tensor; call ``.backward()`` on it.

        :param model: a Pyro program.
        :param guide: a Pyro program with the model's latent sites.
        :param args: the arguments of both.
        :param kwargs: their keyword arguments.
        :returns: a scalar with gradient.
        """
        return self.loss_and_balances(model, guide, *args, **kwargs)[0]

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without gradient.

        :param model: a Pyro program.
        :param guide: a Pyro program with the model's latent sites.
        :param args: the arguments of both.
        :param kwargs: their keyword arguments.
        :returns: the loss.
        """
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; its gradient is added to the parameters.  `pyro.infer.SVI` calls it.

        The objective's own parameters are registered with Pyro, so that SVI trains them, too.

        :param model: a Pyro program.
        :param guide: a Pyro program with the model's latent sites.
        :param args: the arguments of both.
        :param kwargs: their keyword arguments.
        :returns: the loss.
        """
        programs.register("objective", self.parameters())
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("GFlowNet objectives run vectorised; see balances()")

    def _say_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning("%s: %s", type(self).__name__, message)


def among(divergence: Divergence, u: Tensor, balance: Balance, weight: Tensor) -> Tensor:
    """The weighted mean of g(u - c) at the best c, of u (prefix, particle, *kept): (*kept).

    Where the divergence asks for at most the floor, c is that of the positive rewards only, and an impossible value to
    which q gives less than the floor costs nothing.  A group without any positive reward has the loss 0.
    """
    positive = balance.log_p > -torch.inf
    if divergence.at_most:
        asked = (weight * positive).flatten(0, 1)
        some = (asked > 0).any(0)
        c = divergence.fit(u.detach().flatten(0, 1), asked)
        u = torch.where(positive, u, torch.minimum(u, c)).where(some, 0.0)
        weight = weight.where(some, 1.0)
    return divergence.spread(u.flatten(0, 1), weight.flatten(0, 1))


def against(divergence: Divergence, u: Tensor, c: Tensor, balance: Balance, weight: Tensor) -> Tensor:
    """The weighted mean of g(u - c), of u (prefix, particle, *kept) and c (*kept): (*kept).

    Zero rewards count as in `among`.
    """
    delta = u - c
    if divergence.at_most:
        delta = torch.where(balance.log_p > -torch.inf, delta, delta.clamp(max=0.0))
    return mean(divergence.g(delta).flatten(0, 1), weight.flatten(0, 1))


def floored(log_p: Tensor, floor: float, dims: tuple[int, ...]) -> Tensor:
    """-inf counts as ``floor`` below the largest along ``dims``, or as the smallest finite number, if that is less."""
    zero = log_p == -torch.inf
    largest = log_p.amax(dims, keepdim=True)
    least = torch.minimum(largest - floor, log_p.masked_fill(zero, torch.inf).amin(dims, keepdim=True))
    least = least.masked_fill(largest == -torch.inf, -floor)
    return torch.where(zero, least, log_p)


def whole(b: Balance) -> Tensor:
    """log p(z, observed) of the whole samples, (particle, *kept); -inf where the guide cannot draw them."""
    return b.log_p.detach().masked_fill(~b.last, -torch.inf).amax(0)


def _with_rewards(b: Balance) -> Balance:
    """Leaves out the observations of which every draw has reward zero: they carry no information."""
    some = (b.valid & (b.log_p > -torch.inf)).any(0).any(0)  # (*kept)
    return b if bool(some.all()) else replace(b, valid=b.valid & some)


def _empty_is_possible(b: Balance) -> bool:
    """Whether the model, too, gives the empty prefix of every sample a positive reward."""
    return not bool((b.valid & (b.at == 0) & (b.log_p == -torch.inf)).any())
