"""Finds programs that are not written for leading axes: a particle must have the same density alone as among others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from ... import text
from . import programs
from .auxiliary import is_transformed, lacking
from .plates import Plates
from .programs import Node, SiteMismatch, Substitute
from .query import Pair, Query
from .sites import innermost, prompt_of

AGAIN = 10  # runs; an estimate by few particles is often the same twice
_KNOWN: WeakSet[Any] = WeakSet()  # programs that have been checked


class AxesError(ValueError):
    """Raised where a model's density of one particle depends on the other particles.

    The model is not written for a particle axis on the left.  Typical causes are a ``.sum()`` without a dimension,
    which sums over the particles too, and a Python loop over the first axis.  The message names the site.  The check
    runs under Pyro's validation, which is on by default.

    Example::

        def wrong(x):
            with pyro.plate("stories", len(x)):
                z = pyro.sample("z", Completion(lm, x, max_tokens=1))
                pyro.factor("few", -text.length(z).float().sum())  # .sum() runs over all particles

        try:
            Importance(wrong, num_particles=8).run(x)
        except AxesError as error:
            print(error)  # model: site 'few' is not written for a particle axis: ...
    """


@torch.no_grad()
def check_axes(pair: Pair) -> None:
    """Under Pyro's validation, runs two particles alone and compares their sites with the vectorised run.

    A bare ``.sum()`` over particles broadcasts silently; here it raises AxesError with the site's name.  The particles
    have different latent values, because the largest of all, for instance, is also its own ``.max()``.  Text sites are
    compared by their prompts, which needs no pass through the network.
    """
    query, n = pair.query, pair.particles
    if not is_validation_enabled() or n == 1:
        return
    _check_reach(pair)
    own = programs.latents(pair.proposal)
    for one in _different([v for k, v in pair.values.items() if k in own], n):
        alone_values = {k: _only(v, one, n) if k in own else v for k, v in pair.values.items()}
        alone = query.trace(query.model, Substitute(alone_values), particles=1)
        for name, node in programs.scored(pair.model).items():
            other = programs.scored(alone).get(name)
            alike = other is not None and _same(node, other, query.nesting, (one, n), (0, 1))
            if not alike and not _is_random(pair, name, one):
                raise AxesError(
                    f"model: site {name!r} is not written for a particle axis: the density of one of {n} particles "
                    "changes when this particle is run alone. Keep every axis on the left: sum with .sum(-1), not "
                    ".sum(), and build prompts with lm.join or lm.fill"
                )


def _check_reach(pair: Pair) -> None:
    """Raises SiteMismatch where an auxiliary site that the model lacks decides which values other latents can have.

    Such a site counts as uniform in the model, which needs that each of its values can go with the other latents.  So
    the guide's density is computed once more, with the auxiliary values of each particle given to the next one.
    """
    alone, own, n = lacking(pair.proposal, pair.model.nodes), programs.latents(pair.proposal), pair.particles
    if not alone or is_transformed(pair.proposal):
        return
    moved = {k: pair.values[k].roll(1, 0) for k in alone if len(pair.values[k]) == n}
    again = programs.latents(pair.query.trace(pair.query.proposal, Substitute({**pair.values, **moved}), particles=n))
    plates = pair.plates()
    possible = torch.ones((), dtype=torch.bool)
    for name in alone:  # the moved value is one of the values that are counted for this particle
        possible = ~_is_zero(again[name], plates) & possible.to(again[name]["value"].device)
    for name in own.keys() - alone.keys():
        if bool((_is_zero(again[name], plates) & ~_is_zero(own[name], plates) & possible).any()):
            raise SiteMismatch(
                f"guide: some values of its auxiliary sites {list(alone)}, which the model lacks, rule out a value of "
                f"{name!r} that others allow, so they cannot be uniform there; give the model these sites, after the "
                'latent sites that they depend on: pyro.sample(name, r, infer={"is_auxiliary": True})'
            )


def _is_zero(node: Node, plates: Plates) -> Tensor:
    """Whether a site's density is zero, (prefix, particle, *kept); torch's Categorical has eps in place of zero."""
    fn = node["fn"]
    log_q = fn.log_prob(node["value"])
    is_text = fn.event_dim or not fn.has_enumerate_support
    zero = log_q == -torch.inf if is_text else log_q <= math.log(1.5 * torch.finfo(log_q.dtype).eps)
    return plates.reduce(scale_and_mask(zero.double(), 1.0, node["mask"])) > 0


def _is_random(pair: Pair, name: str, one: int) -> bool:
    """Whether a site's density changes from run to run, as an estimate by an algorithm inside the model does."""
    query, n, node = pair.query, pair.particles, pair.model.nodes[name]
    for _ in range(AGAIN):
        again = query.trace(query.model, Substitute(pair.values), particles=n).nodes.get(name)
        if again is not None and not _same(node, again, query.nesting, (one, n), (one, n)):
            return True
    return False


def _different(values: list[Tensor], n: int) -> list[int]:
    """The last particle, and the one that differs from it at the most sites, if any does."""
    differs = [(v != v[-1]).reshape(n, v[0].numel()).any(1).cpu() for v in values if len(v) == n]
    most = torch.stack(differs).sum(0) if differs else None
    return [n - 1] if most is None or not most.any() else [n - 1, int(most.argmax())]


def check_axes_once(query: Query, pair: Callable[[], Pair]) -> None:
    """`check_axes` at the first run of a program, for training, which runs it many times."""
    program = getattr(query.model, "__func__", query.model)
    if is_validation_enabled() and program not in _KNOWN:
        check_axes(pair())
        _KNOWN.add(program)


def _same(node: Node, other: Node, nesting: int, one: tuple[int, int], two: tuple[int, int]) -> bool:
    """Whether a site is the same in two runs, for particle i of n each; ``one`` and ``two`` are (i, n)."""
    first, second = prompt_of(node["fn"]), prompt_of(other["fn"])
    if first is not None and second is not None:
        right = nesting + max(1, node["fn"].event_dim)
        first = _of_particle(first.expand(*innermost(node["fn"]).batch_shape, -1), right, *one)
        second = _of_particle(second.expand(*innermost(other["fn"]).batch_shape, -1), right, *two)
        return bool(text.equal(first, second).all())
    try:
        first = _of_particle(node["fn"].log_prob(node["value"]), nesting, *one)
        second = _of_particle(other["fn"].log_prob(other["value"]), nesting, *two)
        return torch.allclose(first, second, rtol=1e-3, atol=1e-4, equal_nan=True)
    except RuntimeError:  # shapes that do not broadcast count as a difference
        return False


def _of_particle(x: Tensor, right: int, one: int, n: int) -> Tensor:
    """One particle of (particle, *right axes); a tensor without a particle axis is the same for all particles."""
    return _only(x, one, n) if x.dim() > right else x[None]


def _only(x: Tensor, one: int, n: int) -> Tensor:
    return x[one : one + 1] if len(x) == n else x[-1:]
