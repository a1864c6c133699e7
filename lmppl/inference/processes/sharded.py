"""`Sharded`: any algorithm on several processes, each with its part of the observations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ... import text
from ...randomness import Part, forked, part
from ..core.observations import observe
from ..core.programs import Program, scored
from ..core.query import Query
from ..posterior.algorithm import Sampler, on, posterior_of, sized
from ..posterior.posterior import Posterior
from . import distributed


class Sharded(Sampler):
    r"""Runs an algorithm on this process's part of the observations, and answers the posterior of all of them.

    .. math:: p(z \mid y) = \prod_i p(z_i \mid y_i)

    over the plate that the first axis of every argument belongs to.  Every process is called with all observations and
    gets the whole posterior, gathered along that plate.  What draws texts token by token (`Importance`, the guides of
    trainers) draws the same as on one process with the same seed; what is exact is the same; `SMC`, rejection and
    sites that are no texts draw as well as on one process, and otherwise.  On one process nothing changes.

    :param algorithm: anything with ``.model`` and ``.run(*args) -> Posterior``.
    :raises ValueError: in ``run``, where the arguments cannot be shared out; see `distributed.shard`.

    Example::

        posterior = Sharded(gflownet).run(x, y, num_particles=64)  # in a script that torchrun has started
    """

    def __init__(self, algorithm: Any):
        if not callable(getattr(algorithm, "run", None)) or not callable(getattr(algorithm, "model", None)):
            raise ValueError(f"algorithm: expected one with .model and .run, got {type(algorithm).__name__}")
        self.algorithm, self.model = algorithm, algorithm.model
        self.guide: Program | None = getattr(algorithm, "guide", None)

    def on(self, model: Program, guide: Program | None = None) -> Sharded:
        return Sharded(on(self.algorithm, model, guide))

    def sized(self, num_particles: int) -> Sharded:
        return Sharded(sized(self.algorithm, num_particles))

    @property
    def density(self) -> Program:
        """The algorithm's own, where it has one."""
        found: Program = self.algorithm.density
        return found

    @property
    def training_tokens(self) -> int:
        """The algorithm's own, where it trains."""
        found: int = self.algorithm.training_tokens
        return found

    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        """The posterior of all observations, on every process; ``kwargs`` are not shared out."""

        def dim(own: tuple[Any, ...], part: Part) -> int:
            programs = self.model, self.guide or self.model
            return plate_of(lambda: Query(*programs, own), lambda: Query(*programs, args), part)

        with distributed.shard(args, dim, few=True) as own:
            return gathered(posterior_of(self.algorithm, own, kwargs), args)


def plate_of(own_part: Callable[[], Query], all_of_it: Callable[[], Query], part: Part) -> int:
    """The axis, from the right, of the plate that this part of the observations lies along; the network is not asked.

    The queries are asked for anew for each sketch, with the same seed or another one.

    :raises ValueError: where the leftmost plate that encloses every site has another size, a plate is subsampled, or
        the programs do not make of a part of the arguments what they make of it among all of them.
    """
    found = []
    for query, seed in ((own_part, 0), (all_of_it, 0), (all_of_it, 1)):
        with torch.no_grad(), forked():
            torch.manual_seed(seed)
            found.append(observe(query()))
    (own, _), (whole, trace), (again, _) = found
    for node in scored(trace).values():
        for f in node["cond_indep_stack"]:
            if f.full_size not in (None, f.size):
                raise ValueError(f"model: the plate {f.name!r} is subsampled; on several processes use smaller batches")
    sizes = [seen.plates.sizes[:1] for seen in (own, whole)]
    if sizes != [(part.stop - part.start,), (part.total,)]:
        raise ValueError(
            f"model: its leftmost plate around every site has size {whole.plates.sizes[:1]} for {part.total} "
            "observations; on several processes it must be that of the observations"
        )
    each = len(own.keys) // (part.stop - part.start)
    same = own.keys == whole.keys[part.start * each : part.stop * each]
    if whole.keys == again.keys and not same:  # else they are drawn anew each time
        raise ValueError(
            "batches: model and guide read other texts from a part of the arguments than from all; on several "
            "processes the first axis of each must be that of the observations"
        )
    return own.plates.dims[0]


def gathered(posterior: Posterior, args: tuple[Any, ...]) -> Posterior:
    """The posterior of all processes' observations, ``args``, from that of each, on every process.

    Supports of different sizes are filled up with their first value, at weight zero.
    """
    own = part()
    if own is None:
        return posterior
    plates, event_dims = posterior.sites.plates, posterior.sites.event_dims
    values = {}
    for name, value in posterior.values.items():  # (N, *plate axes, *event)
        parts = distributed.gather(value.cpu())
        rows = max(map(len, parts))
        if name in posterior.sites.decoders:
            width = max(p.shape[-1] for p in parts)
            parts = [text.pad(p, width) for p in parts]
        parts = [torch.cat([p, p[:1].expand(rows - len(p), *p.shape[1:])]) for p in parts]
        values[name] = torch.cat(parts, value.dim() - event_dims[name] + own.dim).to(value.device)
    others, kind = {}, type(posterior)
    for name in (f.name for f in fields(posterior) if f.name not in ("values", "sites")):
        try:
            others[name] = _gathered(getattr(posterior, name), len(plates.sizes))
        except TypeError:  # an ancestry, say
            kind = Posterior
    others = {f.name: others[f.name] for f in fields(kind) if f.name in others}
    sites, whole = posterior.sites, replace(plates, sizes=(own.total, *plates.sizes[1:]))
    sites = replace(sites, plates=whole, query=sites.query and replace(sites.query, args=args))
    return kind(values=values, sites=sites, **others)


def _gathered(x: Any, kept: int) -> Any:
    """A tensor whose last ``kept`` axes are the kept plates', joined along the first of them; or a tuple or dict."""
    if isinstance(x, tuple):
        return tuple(_gathered(part, kept) for part in x)
    if isinstance(x, dict):
        return {key: _gathered(part, kept) for key, part in x.items()}
    if not isinstance(x, Tensor):
        raise TypeError("not only tensors")
    parts = distributed.gather(x.cpu())
    rows = max(map(len, parts))
    if x.dim() > kept:
        parts = [torch.cat([p, p.new_full((rows - len(p), *p.shape[1:]), -torch.inf)]) for p in parts]
    return torch.cat(parts, x.dim() - kept).to(x.device)
