"""What a batch observes, found without the network: a key that recognises each observation when it comes again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from ... import text
from . import programs
from .plates import Plates
from .programs import Values
from .query import Query
from .sites import is_text, prompt_of

Tokens = tuple[Hashable, ...]


@dataclass(frozen=True)
class Observations:
    """What a batch observes: a key for every element of its kept plates, and their latent sites."""

    keys: tuple[str, ...]
    plates: Plates
    sites: Mapping[str, tuple[int, bool]]  # event_dim of each latent, and whether it is a text
    subsamples: Values
    elsewhere: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # keys of the processes before and after this one


def observe(query: Query, task: int = 0, key: Callable[..., Iterable[Any]] | None = None) -> tuple[Observations, Trace]:
    """The observations of a batch, and a sketch of the model; ``key`` as in `Replay`.

    The sketch has two particles: a value with an axis for them depends on latents, so it is not part of a key.
    """
    pair = query.sketch(particles=2)
    q, p, plates = pair.proposal, pair.model, pair.plates(subsampling=True)
    sites = {n: (node["fn"].event_dim, is_text(node["fn"])) for n, node in programs.latents(q).items()}
    subsamples = {n: v for n, v in pair.values.items() if n not in sites}
    found = _identities([q, p], plates) if key is None else [[repr(k)] for k in key(*query.args, **query.kwargs)]
    count = torch.Size(plates.sizes).numel()
    if len(found) != count:
        raise ValueError(f"key: expected one for each of the batch's {count} observations, got {len(found)}")
    keys = [hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest() for parts in found]
    return Observations(tuple(f"{task}:{k}" for k in keys), plates, sites, subsamples), p


def split(value: Tensor, plates: Plates, event_dim: int) -> Tensor:
    """(n, *plate axes, *event) -> (n, kept elements, *other plate axes, *event)."""
    axes = [value.dim() - event_dim + d for d in plates.dims]
    value = value.movedim(axes, list(range(1, 1 + len(axes))))
    return value.flatten(1, len(axes)) if axes else value[:, None]


def merge(value: Tensor, plates: Plates, event_dim: int) -> Tensor:
    """The inverse of `split`."""
    value = value.unflatten(1, plates.sizes) if plates.sizes else value[:, 0]
    axes = [value.dim() - event_dim + d for d in plates.dims]
    return value.movedim(list(range(1, 1 + len(axes))), axes)


def _spread(value: Tensor, plates: Plates, event_dim: int) -> Tensor:
    """A tensor whose batch axes broadcast with (lead, *plate axes), expanded along the kept plates: (lead, ...)."""
    while value.dim() < 1 + plates.nesting + event_dim:
        value = value[None]
    shape = list(value.shape)
    for d, size in zip(plates.dims, plates.sizes, strict=True):
        shape[d - event_dim] = size
    return value.expand(shape)


def tokens_of(
    value: Tensor, event_dim: int, of_text: bool, mask: Tensor | bool | None, plates: Plates
) -> list[list[Tokens]]:
    """A site's values (n, K, *others, *event) as tuples, by particle and observation; masked values are left out."""
    event = value.shape[value.dim() - event_dim :]
    rows = value.reshape(*value.shape[:2], -1, event.numel()).tolist()  # (n, K, others, event)
    there = _there(mask, value.shape[: value.dim() - event_dim], plates)

    def read(n: int, k: int) -> Tokens:
        found: list[Hashable] = []
        for row, real in zip(rows[n][k], there[n][k], strict=True):
            row = row if real else [-2]
            found += [*(t for t in row if not (of_text and t == text.PAD)), -1]
        return tuple(found)

    return [[read(n, k) for k in range(value.shape[1])] for n in range(value.shape[0])]


def _there(mask: Tensor | bool | None, batch: torch.Size, plates: Plates) -> list[list[list[bool]]]:
    """Whether a site is unmasked, (n, K, others); of a prefix axis the last entry, the whole sample, is taken."""
    if isinstance(mask, Tensor):
        mask = mask[-1] if mask.dim() > 1 + plates.nesting else mask
        there = split(_spread(mask, plates, 0), plates, 0).cpu().expand(batch)
    else:
        there = torch.full(batch, mask is not False)
    return there.reshape(*batch[:2], -1).tolist()


def _identities(traces: list[Trace], plates: Plates) -> list[list[Any]]:
    """What identifies each kept plate element: the prompts and observed values that depend on no latent."""
    found: list[list[Any]] = [[] for _ in range(torch.Size(plates.sizes).numel())]
    for trace in traces:
        for name, node in programs.scored(trace).items():
            for value, event_dim, of_text in _evidence(node):
                lead = value.dim() - event_dim - plates.nesting
                if not value.numel() or value.shape[: max(0, lead)].numel() > 1:
                    continue
                value = split(_spread(value, plates, event_dim), plates, event_dim)
                for parts, tokens in zip(found, tokens_of(value[:1], event_dim, of_text, None, plates)[0], strict=True):
                    parts.append((name, tokens))
    return found


def _evidence(node: programs.Node) -> Iterable[tuple[Tensor, int, bool]]:
    """A site's prompt, and its value if it is observed, each with its event dimension and whether it is a text."""
    fn = node["fn"]
    if (prompt := prompt_of(fn)) is not None:
        yield prompt, fn.event_dim or 1, True
    if node["is_observed"] and isinstance(node["value"], Tensor):
        yield node["value"], fn.event_dim, is_text(fn)
