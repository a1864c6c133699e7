"""`Sharded`: any algorithm on several processes, each with a part of the observations."""

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
    r"""Runs an algorithm on several processes, each with a part of the observations, and gathers the posterior.

    .. math:: p(z \mid y) = \prod_i p(z_i \mid y_i)

    The product is over the plate to which the first axis of every argument belongs.  Every process is called with all
    observations, infers its part, and returns the whole posterior.  With the same seed, exact results and texts drawn
    token by token (`Importance`, the guides of trainers) are the same as on one process.  `SMC`, rejection and sites
    that are no texts draw from the same distribution, but other values.  On one process nothing changes.

    :param algorithm: any object with ``.model`` and ``.run(*args) -> Posterior``.

    ``run(*args)`` raises ValueError if the arguments cannot be divided: if their first axes differ in length, or are
    not that of the model's leftmost plate.

    Example::

        # in a script started by `torchrun --nproc-per-node 8 script.py`
        posterior = Sharded(Importance(model, guide, num_particles=64)).run(x, y)
    """

    def __init__(self, algorithm: Any):
        if not callable(getattr(algorithm, "run", None)) or not callable(getattr(algorithm, "model", None)):
            raise ValueError(f"algorithm: expected one with .model and .run, got {type(algorithm).__name__}")
        self.algorithm, self.model = algorithm, algorithm.model
        self.guide: Program | None = getattr(algorithm, "guide", None)

    def on(self, model: Program, guide: Program | None = None) -> Sharded:
        """A copy for another model, and for another guide if the algorithm has one.

        :param model: a Pyro program.
        :param guide: a Pyro program; None: the algorithm's own guide.
        """
        return Sharded(on(self.algorithm, model, guide))

    def sized(self, num_particles: int) -> Sharded:
        """A copy whose algorithm has ``num_particles`` particles."""
        return Sharded(sized(self.algorithm, num_particles))

    @property
    def density(self) -> Program:
        """The ``density`` of the algorithm: the program whose density is judged."""
        found: Program = self.algorithm.density
        return found

    @property
    def training_tokens(self) -> int:
        """The ``training_tokens`` of the algorithm."""
        found: int = self.algorithm.training_tokens
        return found

    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        """The posterior of all observations, on every process.

        :param args: the arguments of model and guide, the same on every process; their first axes are divided.
        :param kwargs: keyword arguments, which are not divided.
        """

        def dim(own: tuple[Any, ...], part: Part) -> int:
            programs = self.model, self.guide or self.model
            return plate_of(lambda: Query(*programs, own), lambda: Query(*programs, args), part)

        with distributed.shard(args, dim, few=True) as own:
            return gathered(posterior_of(self.algorithm, own, kwargs), args)


def plate_of(own_part: Callable[[], Query], all_of_it: Callable[[], Query], part: Part) -> int:
    """The axis, from the right, of the observations' plate, found without a network.

    Each sketch builds its query again, with the same seed or another one.

    :raises ValueError: if the leftmost plate that encloses every site has another size, if a plate is subsampled, or if
        the programs read other texts from a part of the arguments than from all of them.
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
    if whole.keys == again.keys and not same:  # keys that differ between seeds are drawn and say nothing
        raise ValueError(
            "batches: model and guide read other texts from a part of the arguments than from all of them; on several "
            "processes the first axis of each must be that of the observations"
        )
    return own.plates.dims[0]


def gathered(posterior: Posterior, args: tuple[Any, ...]) -> Posterior:
    """The posterior of all observations, ``args``, on every process, from the posterior of each process's part.

    Supports of different sizes are padded with their first value, at weight zero.
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
        except TypeError:  # for instance an ancestry
            kind = Posterior
    others = {f.name: others[f.name] for f in fields(kind) if f.name in others}
    sites, whole = posterior.sites, replace(plates, sizes=(own.total, *plates.sizes[1:]))
    sites = replace(sites, plates=whole, observed={}, query=sites.query and replace(sites.query, args=args))
    return kind(values=values, sites=sites, **others)


def _gathered(x: Any, kept: int) -> Any:
    """A tensor whose last ``kept`` axes are the kept plates, joined along the first of these; or a tuple or dict."""
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
