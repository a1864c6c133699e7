"""What the M-step maximises: the expected log joint of fixed particles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from pyro.poutine import Trace
from torch import Tensor

from ..core import programs
from ..core.plates import Plates
from ..core.programs import SiteMismatch, Substitute
from ..core.query import Query
from ..core.weights import log_density
from ..posterior.posterior import Posterior


@dataclass(frozen=True)
class Surrogate:
    r"""Q(theta) :math:`= s \sum_{i, n} w_{ni} \log p_\theta(z_{ni}, y_i)`: the particles and weights are fixed."""

    query: Query
    values: dict[str, Tensor]  # (n, *plate axes, *event)
    weights: Tensor  # (n, *kept), summing to 1, or to 0 where the evidence is zero
    plates: Plates
    scale: float

    @classmethod
    def of(cls, query: Query, posterior: Posterior, log_weights: Tensor, scale: float) -> Surrogate:
        """Leaves out particles of weight zero: the others come first, then repeats of the heaviest, with weight zero.

        The log p of a repeat is finite, so that weight zero gives gradient zero and never NaN.
        """
        weights = log_weights.softmax(0).masked_fill(log_weights.amax(0) == -torch.inf, 0.0)
        weights, order = weights.sort(0, descending=True)
        n = max(1, int((weights > 0).sum(0).max()))
        order = torch.where(weights > 0, order, order[:1])[:n]
        plates = posterior.sites.plates
        values = {name: plates.take(value, order) for name, value in posterior.values.items()}
        return cls(replace(query, max_plate_nesting=plates.nesting), values, weights[:n], plates, scale)

    def _terms(self, size: int) -> Iterator[Tensor]:
        """Q, ``size`` particles at a time."""
        for start in range(0, len(self.weights), size):
            weights = self.weights[start : start + size]
            held = Substitute({name: value[start : start + size] for name, value in self.values.items()})
            run = self.query.trace(self.query.model, held, particles=len(weights))
            for name in programs.latents(run):
                if name not in self.values:
                    raise SiteMismatch(f"e_step: its posterior has no site {name!r}, a latent site of the model")
            log_p = log_density(run, self.plates).expand(1, *weights.shape)[0]
            yield self.scale * (weights * torch.where(weights > 0, log_p, 0.0)).sum()

    @torch.no_grad()
    def value(self, size: int) -> float:
        """Q at the present parameters."""
        return sum(term.item() for term in self._terms(size))

    def backward(self, parameters: list[Tensor], size: int) -> float:
        """Adds the gradient of -Q to the ``.grad`` of these parameters and of no others; returns Q.

        :raises ValueError: where Q does not depend on any of them.
        """
        value, leaves = 0.0, [p for p in parameters if p.requires_grad]
        for term in self._terms(size):
            value += term.item()
            if leaves and term.requires_grad:
                (-term).backward(inputs=leaves)
        if all(p.grad is None for p in leaves):
            raise ValueError("m_optimizer: log p(z, observed) depends on none of its parameters")
        return value


def subsampling(trace: Trace, plates: Plates) -> float:
    """Full size / size of the kept plates: how often each of their elements counts."""
    frames = {f.name: f for node in programs.scored(trace).values() for f in node["cond_indep_stack"]}
    return math.prod((frames[name].full_size or frames[name].size) / frames[name].size for name in plates.names)


@contextmanager
def frozen_but(parameters: list[Tensor], free: list[Tensor]) -> Iterator[None]:
    """Builds no graph for the parameters that are not among ``free``."""
    own = {id(p) for p in free}
    frozen = [p for p in parameters if p.requires_grad and id(p) not in own]
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)
