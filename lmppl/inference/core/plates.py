"""Kept plates: the plates that enclose every latent, observation and factor.  Weights stay separate along them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pyro.poutine import Trace
from torch import Tensor

from . import programs


@dataclass(frozen=True)
class Plates:
    """The kept plates from left to right: names, sizes and axes.  ``nesting`` is the number of plate axes in all."""

    names: tuple[str, ...]
    dims: tuple[int, ...]
    sizes: tuple[int, ...]
    nesting: int

    def reduce(self, log_prob: Tensor) -> Tensor:
        """Sums over every plate axis that is not kept: (..., *plate axes) -> (prefix, particle, *kept)."""
        lead = 2 + self.nesting - log_prob.dim()
        log_prob = log_prob[(None,) * lead] if lead > 0 else log_prob
        others = [d for d in range(-self.nesting, 0) if d not in self.dims]
        log_prob = log_prob.sum(others) if others else log_prob
        return log_prob.expand(log_prob.shape[:2] + self.sizes)

    def lead(self, value: Tensor, event_dim: int) -> Tensor:
        """A site's value (particle, *plate axes, *event) as (particle, *kept, *others larger than 1, *event)."""
        axes = [value.dim() - event_dim + d for d in range(-self.nesting, 0)]
        kept = [axes[d] for d in self.dims]
        others = [a for a in axes if a not in kept]
        value = value.permute(0, *kept, *others, *range(value.dim() - event_dim, value.dim()))
        first = 1 + len(kept)
        return value.reshape(
            *value.shape[:first],
            *(n for n in value.shape[first : first + len(others)] if n > 1),
            *value.shape[first + len(others) :],
        )

    def spread(self, kept: Tensor) -> Tensor:
        """(particle, *kept) as (particle, *plate axes), size 1 along plates that are not kept."""
        shape = [1] * self.nesting
        for d, n in zip(self.dims, self.sizes, strict=True):
            shape[d] = n
        return kept.reshape(kept.shape[0], *shape)

    def take(self, value: Tensor, chosen: Tensor) -> Tensor:
        """Particles ``chosen`` (n, *kept) of a value (N, *plate axes, *event)."""
        index = self.spread(chosen)
        index = index.reshape(*index.shape, *[1] * (value.dim() - index.dim()))
        shape = (a if b == 1 else b for a, b in zip(value.shape[1:], index.shape[1:], strict=True))
        value = value.expand(value.shape[0], *shape)  # an axis of size 0 (empty texts) stays
        return value.gather(0, index.expand(index.shape[0], *value.shape[1:]))


def kept_plates(traces: Iterable[Trace], nesting: int, *, subsampling: bool = True) -> Plates:
    """The plates that enclose every scored site of these traces.

    :raises ValueError: for a subsampled plate that is not kept, unless ``subsampling`` is true: an objective can be
        estimated from a subsample, the evidence cannot.
    """
    nodes = [node for trace in traces for node in programs.scored(trace).values()]
    enclosing = [{f.name: f for f in node["cond_indep_stack"] if f.name not in _OWN} for node in nodes]
    every = [{name: f for name, f in e.items() if f.vectorized} for e in enclosing]
    frames = [f for name, f in every[0].items() if all(name in e for e in every)] if every else []
    frames.sort(key=lambda f: f.dim)
    if not subsampling:
        for node_frames in enclosing:  # sequential plates too, because their elements are joint
            for f in node_frames.values():
                if f.full_size not in (None, f.size) and f.name not in {k.name for k in frames}:
                    raise ValueError(
                        f"model: the plate {f.name!r} is subsampled ({f.size} of {f.full_size}) but does not enclose "
                        "every latent, observation and factor, so the evidence is not defined; run the plate in full"
                    )
    return Plates(tuple(f.name for f in frames), tuple(f.dim for f in frames), tuple(f.size for f in frames), nesting)


_OWN = (programs.PARTICLES, programs.PREFIXES)
