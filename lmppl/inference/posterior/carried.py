"""Which latents of a posterior are kept in another call of the model; the others are drawn again.

A latent is *local* if a plate around it also encloses an observation or a factor of the run, else *global*.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ... import text
from ...constraints.masks import Constraint, allowed_at
from ...rows import distinct_rows
from ..core import programs
from ..core.programs import Node, Sketch, Substitute
from ..core.query import Query, unknown
from ..core.sites import innermost, prompt_of

_PARTICLES = 64  # particles with which distributions are compared


def carried(
    run: Query | None,
    call: Query,
    values: Mapping[str, Tensor],
    keep: Collection[str] | None,
    predicted: str | None = None,
) -> set[str]:
    """The latent sites of ``call``'s model that keep the posterior's ``values`` (N, *plate axes, *event).

    ``keep`` names them.  If it is None, a global latent is kept if its distribution, given the latents before it, is
    the same as in the run.  A local latent is kept if also the plate's elements are those of the run, which any of
    these shows: the distributions differ between elements; an argument of the plate's size is equal to one of the run;
    the whole call is that of the run.

    The ``predicted`` site is never kept.

    :raises ValueError: if some arguments of the plate's size are equal to those of the run, and others are neither that
        nor observations; and if the run is unknown.
    """
    latents = programs.latents(call.sketches[-1])
    if keep is not None:
        return _chosen(keep, values, latents, call.nesting)
    names = [name for name in latents if name in values and name != predicted]
    if not names:
        return set()
    if run is not None and run.model is unknown:
        run = replace(run, model=call.model)
        run = run if _fits(run) else None
    if run is None:
        for name in names:
            around = [f for f in latents[name]["cond_indep_stack"] if f.name != programs.PARTICLES]
            if around:
                raise _unclear(name, around, "the arguments of its run are not known")
        return set(names)
    first = next(iter(values.values()))
    index = torch.linspace(0, len(first) - 1, _PARTICLES, device=first.device).round().long()
    some = {name: value[index] for name, value in values.items()}
    before = _sketched(replace(run, max_plate_nesting=call.nesting), Substitute(some))
    carry = _Carry(before, {name: some[name] for name in names}, Evidence.of(run, call, before))
    _sketched(call, carry)
    return carry.kept


class _Carry(Messenger):
    """Gives kept latent sites the values of the posterior; so later distributions show what depends on other sites."""

    def __init__(self, before: Trace, values: Mapping[str, Tensor], evidence: Evidence):
        super().__init__()
        self.before, self.values, self.evidence = before, values, evidence
        self.kept: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["done"] or msg["is_observed"] or name not in self.values or name not in self.before.nodes:
            return
        old, value = self.before.nodes[name], self.values[name]
        if _same_law(old["fn"], msg["fn"], value) and self._same_elements(old, msg):
            self.kept.add(name)
            msg["value"], msg["done"] = value, True

    def _same_elements(self, old: Node, new: Node) -> bool:
        local = _shared_plates(old, self.before)
        if not local:
            return True
        sizes = {f.dim or f.name: f.size for f in new["cond_indep_stack"]}
        if any(sizes.get(f.dim or f.name) != f.size for f in local):
            return False
        if self.evidence.everything or any(f.vectorized and _differs(new["fn"], f.dim) for f in local):
            return True
        kept, changed = (any(_has_size(x, f.size) for x in xs for f in local) for xs in self.evidence.arguments)
        if kept and changed:
            raise _unclear(
                new["name"],
                local,
                "some arguments of that plate's size are equal to those of the run, and others are not",
            )
        return kept


@dataclass(frozen=True)
class Evidence:
    """Which arguments of a call are equal to those of the run."""

    everything: bool  # all of them are, and the program is the same
    arguments: tuple[list[Any], list[Any]]  # those equal to one of the run's; those that are neither that nor observed

    @classmethod
    def of(cls, run: Query, call: Query, before: Trace) -> Evidence:
        old, new = _arguments(run), _arguments(call)
        kept = [x for x in new if any(_equal(x, y) for y in old)]
        observed = [n["value"] for n in programs.scored(call.sketches[-1]).values() if n["is_observed"]]
        changed = [
            x for x in new if not any(x is y for y in kept) and not any(_same_memory(x, value) for value in observed)
        ]
        seen = [n["value"] for n in programs.scored(before).values() if n["is_observed"]]

        def same(x: Any, y: Any) -> bool:  # equal, or None in place of an observation
            return _equal(x, y) or (y is None and any(_same_memory(x, value) for value in seen))

        everything = run.model == call.model and len(old) == len(new) and all(map(same, old, new))
        return cls(everything, (kept, changed))


def _chosen(keep: Collection[str], values: Mapping[str, Tensor], latents: Mapping[str, Node], nesting: int) -> set[str]:
    if not isinstance(keep, Collection):
        raise ValueError(f"keep: expected names of sites, got {keep!r}")
    names = [keep] if isinstance(keep, str) else list(keep)
    for name in names:
        if name not in values or name not in latents:
            both = [n for n in latents if n in values]
            raise ValueError(f"keep: {name!r} is none of the latent sites {both} of both the posterior and the model")
        plates = values[name].shape[1 : 1 + nesting]
        batch = tuple(latents[name]["fn"].batch_shape)
        shape = ((1,) * nesting + batch)[len(batch) :]
        if any(a not in (1, b) for a, b in zip(plates, shape, strict=True)):
            raise ValueError(
                f"keep: {name!r} has plates of shape {tuple(plates)} in the posterior, and {tuple(shape)} in this call"
            )
    return set(names)


def _unclear(name: str, local: list[Any], why: str) -> ValueError:
    return ValueError(
        f"keep: it is not clear whether to keep {name!r} or to draw it again. It is in the plate {local[0].name!r}, "
        f"and {why}. Pass keep=[{name!r}, ...], the latent sites whose elements are those of the run, or keep=[] for "
        "other elements"
    )


def _sketched(query: Query, *handlers: Messenger) -> Trace:
    """The model's sites, with placeholders for texts."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return query.trace(query.model, Sketch(), *handlers, particles=_PARTICLES)


def _arguments(query: Query) -> list[Any]:
    """The arguments of a call, with their defaults if the program has a signature."""
    try:
        bound = inspect.signature(query.model).bind(*query.args, **query.kwargs)
    except (TypeError, ValueError):
        return [*query.args, *query.kwargs.values()]
    bound.apply_defaults()
    return [*bound.args, *bound.kwargs.values()]


def _fits(query: Query) -> bool:
    """Whether the model's signature accepts the arguments; true if it has none."""
    try:
        inspect.signature(query.model).bind(*query.args, **query.kwargs)
    except TypeError:
        return False
    except ValueError:  # a program without a signature
        pass
    return True


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments have equal values."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and bool((a.cpu() == b.cpu()).all()))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return a is b or (type(a) is type(b) and isinstance(a, bool | int | float | str) and a == b)


def _shared_plates(node: Node, trace: Trace) -> list[Any]:
    """The plates around a site that also enclose an observation or a factor."""
    others = [n for n in programs.scored(trace).values() if n["is_observed"]]
    around = {f.name for other in others for f in other["cond_indep_stack"]} - {programs.PARTICLES}
    return [f for f in node["cond_indep_stack"] if f.name in around]


def _same_law(old: Any, new: Any, value: Tensor) -> bool:
    """Whether two distributions are the same.  Texts are compared by their prompts and limits, without a network."""
    if type(old) is not type(new):
        return False
    try:
        if prompt_of(old) is not None:
            old, new = innermost(old), innermost(new)
            if type(old) is not type(new):
                return False
            rules = [
                torch.broadcast_tensors(getattr(old, key), getattr(new, key))
                for key in ("max_tokens", "min_tokens", "temperature", "stop")
                if hasattr(old, key)
            ]
            alike = (
                old.lm is new.lm
                and getattr(old, "order", None) == getattr(new, "order", None)
                and all(torch.equal(*pair) for pair in rules)
                and bool(text.equal(old.prompt, new.prompt).all())
            )
            return alike and _same_allowed(old, new, value)
        return all(_close(old.log_prob(x), new.log_prob(x)) for x in _points(old, value))
    except (RuntimeError, ValueError):  # shapes that do not broadcast, or a value outside the support of one of them
        return False


def _same_allowed(old: Any, new: Any, texts: Tensor) -> bool:
    """Whether the constraints of two texts are the same; functions are compared by what they allow along ``texts``."""
    given = [getattr(fn, "allowed", None) for fn in (old, new)]
    if given[0] is given[1]:
        return True
    V = old.lm.vocab_size
    every = torch.ones(V, dtype=torch.bool, device=texts.device)
    both: list[Constraint] = [every if allowed is None else allowed for allowed in given]
    if all(isinstance(allowed, Tensor) for allowed in both):
        return torch.equal(*torch.broadcast_tensors(*both))
    rows, _ = distinct_rows(texts.reshape(-1, texts.shape[-1]))
    # At max_tokens a single stop is certain, and constraints are not called.
    for t in range(int(old.max_tokens.max()) if old.stop.numel() == 1 else rows.shape[1]):
        if len(asked := rows[rows[:, t] != text.PAD, :t]):
            masks = (allowed_at(allowed, asked, V).expand(len(asked), V) for allowed in both)
            if not torch.equal(*masks):
                return False
    return True


def _points(fn: Any, value: Tensor) -> list[Tensor]:
    """The values at which distributions are compared: all of them, or the given ones and a sample."""
    if fn.has_enumerate_support:
        try:
            return [fn.enumerate_support(expand=False)]
        except NotImplementedError:
            pass
    return [value, fn.sample()]


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = torch.broadcast_tensors(a, b)
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def _differs(fn: Any, dim: int) -> bool:
    """Whether a distribution's parameters differ between the elements of a plate."""
    if (prompt := prompt_of(fn)) is not None:
        prompt = prompt.expand(*innermost(fn).batch_shape, -1).movedim(dim - max(1, fn.event_dim), 0)
        return bool((prompt != prompt[:1]).any())
    try:
        point = _points(fn, fn.sample())[0]
        if not fn.has_enumerate_support:
            point = point.select(dim - fn.event_dim, 0).unsqueeze(dim - fn.event_dim).expand_as(point)
        log_p = fn.log_prob(point).movedim(dim, 0)
    except (RuntimeError, ValueError):
        return False
    return not _close(log_p, log_p[:1].expand_as(log_p))


def _has_size(x: Any, size: int) -> bool:
    return size in x.shape if isinstance(x, Tensor) else isinstance(x, list | tuple) and len(x) == size


def _same_memory(x: Any, value: Tensor) -> bool:
    """Whether an argument is the observed value or a view of it."""
    return isinstance(x, Tensor) and (
        x is value or x.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    )
