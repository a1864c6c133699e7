"""Auxiliary sites of a guide that the model lacks.  There they are uniform over the values that the guide can draw.

A guide may draw a value that only helps it: ``pyro.sample("a", fn, infer={"is_auxiliary": True})``.  The weight of
(a, z) is then p(z, observed) r(a | z) / q(a, z) for some density r, which the model gives by a site of the same name.
Without such a site r is 1 / K, with K values of positive probability.  The evidence is then that of the model if the
guide can draw each z with each of the K values.  If it draws some z with some values only, the model has to give r:
`check_axes` finds this among the particles that are drawn.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from pyro.distributions import Delta, Independent
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from . import programs
from .plates import Plates
from .programs import Node, SiteMismatch
from .sites import innermost

MOST_VALUES = 1000


def lacking(proposal: Trace, model: Container[str]) -> dict[str, Node]:
    """The auxiliary sites of a guide that are not among the sites of the model."""
    own = programs.latents(proposal).items()
    return {name: node for name, node in own if node["infer"].get("is_auxiliary") and name not in model}


def log_lacking(proposal: Trace, model: Container[str], plates: Plates) -> Tensor:
    """`log_uniform` of the auxiliary sites that the model lacks."""
    return log_uniform(lacking(proposal, model), plates, transformed=is_transformed(proposal))


def is_transformed(proposal: Trace) -> bool:
    """Whether latent sites are functions of others, as in Pyro's ``AutoContinuous``: q(a) is then their density."""
    return any(isinstance(innermost(node["fn"]), Delta) for node in programs.latents(proposal).values())


def log_uniform(nodes: dict[str, Node], plates: Plates, *, transformed: bool = False) -> Tensor:
    """The sum of log 1/K over these sites, (prefix, particle, *kept), or a scalar 0.

    :param transformed: `is_transformed` of the guide; then continuous sites are left out.
    :raises SiteMismatch: for a site that is continuous, or has infinitely or too many values.
    """
    total = torch.zeros(())
    for node in nodes.values():
        if transformed and not node["fn"].support.is_discrete:
            continue
        log_r = scale_and_mask(-_log_count(node["name"], node["fn"]), 1.0, node["mask"])
        total = total + plates.reduce(log_r.expand(node["fn"].batch_shape))
    return total


def _log_count(name: str, fn: Any) -> Tensor:
    """The logarithm of how many values a site can have, for each element of its batch."""
    if isinstance(fn, Independent):
        several = fn.reinterpreted_batch_ndims
        single = _log_count(name, fn.base_dist).expand(fn.base_dist.batch_shape)
        return single.flatten(-several).sum(-1) if several else single
    try:
        support = fn.enumerate_support(expand=False)
    except (NotImplementedError, ValueError):
        support = None
    if support is None or len(support) > MOST_VALUES:
        raise SiteMismatch(
            f"guide: its auxiliary site {name!r} is not in the model, and it has no list of at most "
            f"{MOST_VALUES} values, over which it would be uniform there; give the model this site too, after the "
            f'latent sites that it depends on: pyro.sample("{name}", r, infer={{"is_auxiliary": True}}), with '
            "any distribution r"
        )
    probability = fn.log_prob(support).exp()
    count: Tensor = (probability > 1.5 * torch.finfo(probability.dtype).eps).sum(0)  # torch's Categorical has eps for 0
    return count.double().log()
