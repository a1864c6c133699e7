"""Saves a posterior in a directory, completely or not at all: tensors as safetensors, the rest as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ... import files, text
from ...damage import first_line
from ..core.packed import pack, unpack
from ..core.plates import Plates
from ..core.query import Query, unknown
from .posterior import Posterior, Sites

KIND, TENSORS, REST, FORMAT = "posterior", "posterior.safetensors", "posterior.json", "lmppl posterior 1"
P = TypeVar("P", bound=Posterior)


@dataclass(frozen=True)
class Lookup:
    """Decodes texts by looking them up in ``strings``, whose keys are the tokens, as "5 6 0"."""

    strings: dict[str, str]

    def __call__(self, value: Tensor) -> Any:
        if value.dim() > 1:
            return [self(part) for part in value]
        key = _key(value.tolist())
        if key not in self.strings:
            raise ValueError(f"text: the tokens {key} were not saved with this posterior; load it with lm=...")
        return self.strings[key]


def save(posterior: Posterior, path: Path) -> None:
    """Writes the directory ``path``; a posterior that was there is replaced.

    A subclass of `Posterior` with fields that are not made of tensors is saved as a `Posterior`.

    :raises ValueError: if there is something other than a posterior at ``path``.
    """
    files.settle(path)
    if path.exists() and not (path / REST).is_file() and not files.is_free(path):
        raise ValueError(f"path: {path} exists and is no saved posterior")
    sites, tensors = posterior.sites, {f"values.{name}": value for name, value in posterior.values.items()}
    try:
        kind, extra = type(posterior).__name__, _flattened(posterior, _others(type(posterior)))
    except TypeError:  # for instance an ancestry
        kind, extra = Posterior.__name__, _flattened(posterior, _others(Posterior))
    tensors |= {key: value for key, value in extra.items() if isinstance(value, Tensor)}
    arguments, given = _packed(sites.query)
    tensors |= given
    rest = {
        "format": FORMAT,
        "class": kind,
        "empty": [
            n for n in _others(type(posterior)) if isinstance(v := getattr(posterior, n), tuple | dict) and not v
        ],
        "plates": vars(sites.plates),
        "event_dims": sites.event_dims,
        "strings": {site: _strings(posterior, site) for site in sites.decoders},
        "stops": sites.stops,
        "arguments": arguments,
        "dependent": sites.dependent,
    }
    with files.writing(path, KIND) as fresh:
        save_file({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}, fresh / TENSORS)
        (fresh / REST).write_text(json.dumps(rest))


def load(cls: type[P], path: Path, lm: Any = None) -> P:
    """Reads what `save` wrote."""
    files.settle(path)
    if not (path / REST).is_file() or not (path / TENSORS).is_file():
        raise ValueError(f"path: {path} is no saved posterior; it should have {REST} and {TENSORS}")
    try:
        rest, tensors = files.read(path, lambda: _read(path))
        return _build(cls, rest, tensors, lm)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"path: {path} cannot be read as a posterior: {first_line(error)}") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    files.verify(path, KIND)
    try:
        rest = json.loads((path / REST).read_text())
    except ValueError as error:
        raise ValueError(f"{REST}: {error}") from error
    if not isinstance(rest, dict) or rest.get("format") != FORMAT:
        raise ValueError(f"{REST} is not of the format {FORMAT!r}")
    try:
        return rest, load_file(path / TENSORS)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{TENSORS}: {error}") from error


def _build(cls: type[P], rest: dict[str, Any], tensors: dict[str, Tensor], lm: Any) -> P:
    kinds = {kind.__name__: kind for kind in [cls, *cls.__subclasses__()]}
    if rest["class"] not in kinds:
        raise ValueError(f"it was saved by the class {rest['class']}, which is no {cls.__name__}")
    kind = kinds[rest["class"]]
    names, dims, sizes = (tuple(rest["plates"][key]) for key in ("names", "dims", "sizes"))
    plates = Plates(names, dims, sizes, int(rest["plates"]["nesting"]))
    decoders = {site: lm.decode if lm is not None else Lookup(strings) for site, strings in rest["strings"].items()}
    lms = {} if lm is None else dict.fromkeys(rest["stops"], lm)
    values = {name.removeprefix("values."): t for name, t in tensors.items() if name.startswith("values.")}
    others: dict[str, Any] = {name: () if name in rest["empty"] else _gathered(tensors, name) for name in _others(kind)}
    n = len(others["log_weights"])
    if not set(rest["event_dims"]) <= set(values) or tuple(others["log_weights"].shape) != (n, *sizes):
        raise ValueError("its tensors and its sites do not fit together")
    if any(len(values[k]) != n or values[k].dim() != 1 + plates.nesting + e for k, e in rest["event_dims"].items()):
        raise ValueError("the shapes of its values do not fit its weights")
    query = _unpacked(rest.get("arguments"), tensors)
    sites = Sites(plates, rest["event_dims"], decoders, lms, rest["stops"], query)
    sites = replace(sites, dependent=bool(rest.get("dependent", True)))  # of files that do not say
    return kind(values=values, sites=sites, **others)


def _packed(query: Query | None) -> tuple[Any, dict[str, Tensor]]:
    """A query's arguments as JSON and tensors; None if they are of other types."""
    tensors: dict[str, Tensor] = {}
    try:
        return query and pack([query.args, query.kwargs], "arguments", tensors), tensors
    except TypeError:
        return None, {}


def _unpacked(packed: Any, tensors: dict[str, Tensor]) -> Query | None:
    """The query of these arguments, without its programs."""
    return None if packed is None else Query(unknown, None, *unpack(packed, tensors))


def _others(cls: type[Posterior]) -> list[str]:
    """The names of all fields except the values and the sites."""
    return [f.name for f in fields(cls) if f.name not in ("values", "sites")]


def _flattened(posterior: Posterior, names: list[str]) -> dict[str, Tensor]:
    """The tensors of fields that are tensors, or tuples or dicts of them; TypeError for other types."""
    found: dict[str, Tensor] = {}
    for name in names:
        value = getattr(posterior, name)
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else None
        found |= {name: value} if parts is None else {f"{name}.{key}": part for key, part in parts}
    if not all(isinstance(value, Tensor) for value in found.values()):
        raise TypeError("not only tensors")
    return found


def _gathered(tensors: dict[str, Tensor], name: str) -> Any:
    """The value of a field from the tensors that `_flattened` made of it."""
    if name in tensors:
        return tensors[name]
    parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    if not parts:
        raise ValueError(f"it has no {name}")
    if all(key.isdigit() for key in parts):
        return tuple(parts[key] for key in sorted(parts, key=int))
    return parts


def _strings(posterior: Posterior, site: str) -> dict[str, str]:
    """The decoded string of each distinct text, by its tokens."""
    value = posterior.values[site]
    distinct = torch.unique(value.reshape(-1, value.shape[-1]), dim=0)
    return dict(zip(map(_key, distinct.tolist()), posterior.sites.decoders[site](distinct), strict=True))


def _key(tokens: list[int]) -> str:
    return " ".join(str(t) for t in tokens if t != text.PAD)
