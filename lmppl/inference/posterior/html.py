"""The HTML of a posterior in a notebook: summaries, the most probable texts with bars, means of numbers."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from ... import markup
from ...markup import Markup, note
from ..core.arguments import all_particles
from .log_weights import ZeroEvidence
from .values import moments, values

if TYPE_CHECKING:
    from .posterior import Posterior

ELEMENTS, VALUES, NUMBERS = 4, 8, 12  # the most plate elements, values of each, and numbers of each site


def html(posterior: Posterior) -> str:
    """A table of plate elements, and one for each site; large tables are cut, with a note."""
    shown, cut = _first(posterior.log_weights.shape[1:])
    parts: list[Any] = [_summaries(posterior, shown), cut and note(f"{cut} more plate elements")]
    for site in posterior.samples:
        parts.append(_values(posterior, site) if is_discrete(posterior, site) else _numbers(posterior, site))
    return markup.page(repr(posterior), *parts)


def is_discrete(posterior: Posterior, site: str) -> bool:
    """Whether the site's values are listed one by one: texts, integers and booleans."""
    return site in posterior.sites.decoders or not posterior.samples[site].is_floating_point()


def _first(sizes: torch.Size) -> tuple[list[tuple[int, ...]], int]:
    """The first elements of plates of these sizes, and the number of all others."""
    some = [i for i, _ in zip(product(*map(range, sizes)), range(ELEMENTS), strict=False)]
    return some, sizes.numel() - len(some)


def _plate_titles(posterior: Posterior) -> list[str]:
    return [name or "plate" for name in posterior.sites.plates.names]


def _summaries(posterior: Posterior, elements: list[tuple[int, ...]]) -> Markup:
    found = [posterior.summary(element) for element in elements]
    names = list(dict.fromkeys(name for row in found for name in row))
    titles = _plate_titles(posterior)
    rows = [
        [*element, *(_figure(name, row.get(name)) for name in names)]
        for element, row in zip(elements, found, strict=True)
    ]
    return markup.table([*titles, *names], rows, left=range(len(titles)))


def _figure(name: str, x: float | None) -> str:
    if x is None:
        return ""
    if name == "suspect":
        return "yes" if x else "no"
    return f"{x:.1f}" if "ESS" in name else f"{x:.3g}" if name == "unexplored" else f"{x:.3f}"


def _others(posterior: Posterior, site: str) -> torch.Size:
    """The sizes of the plates around a site that are not kept."""
    return torch.Size(n for n in posterior._other_plates(site) if n > 1)


def _values(posterior: Posterior, site: str) -> Markup:
    """The most probable values of a site in the first plate elements."""
    kept, others = posterior.log_weights.shape[1:], _others(posterior, site)
    elements, cut = _first(torch.Size((*kept, *others)))
    most = VALUES if len(elements) == 1 else VALUES // 2
    titles = [*_plate_titles(posterior), *[""] * len(others)]
    rows: list[tuple[list[Any], list[Any]]] = []  # the first columns, and (value, probability, error, particles)
    for element in elements:
        try:
            found, there = values(posterior, site, element, most)
        except ZeroEvidence:
            rows.append(([*element, note("every particle has probability zero")], [0.0, 0.0, 0]))
            continue
        for i, v in enumerate(found):
            value = markup.text(v.value) if isinstance(v.value, str) else str(v.value)
            rows.append(([*(element if i == 0 else [""] * len(element)), value], list(v[1:])))
        if there > len(found):
            left = 1 - sum(v.probability for v in found)
            rows.append(([*[""] * len(element), note(f"{there - len(found)} more")], [max(0.0, left), 0.0, 0]))
    errors = any(_known(error) for _, (_, error, _) in rows)
    counts = any(error != 0 for _, (_, error, _) in rows)  # errors of an enumeration are zero
    titles += [site, "", "probability", *(["± s.e."] if errors else []), *(["particles"] if counts else [])]
    body = []
    for first, (p, error, n) in rows:
        error = error if _known(error) else 0.0
        row = [*first, markup.bar(p, error), f"{p:.3f}"]
        row += [f"{error:.3f}" if error else ""] if errors else []
        row += [n or ""] if counts else []
        body.append(row)
    return _cut(markup.table(titles, body, left=range(len(elements[0]) + 2 if elements else 0)), cut, site)


def _numbers(posterior: Posterior, site: str) -> Markup:
    """Mean and standard deviation of each number of a site in the first plate elements."""
    kept = posterior.log_weights.dim() - 1
    value = posterior.samples[site]
    elements, cut = _first(value.shape[1 : 1 + kept])
    entries = list(product(*map(range, value.shape[1 + kept :])))
    shown = entries[: max(1, NUMBERS // len(elements))] if elements else []
    rows = []
    for element in elements:
        try:
            found = moments(posterior, value[all_particles(element)], element)
        except ZeroEvidence:
            rows.append([*element, note("every particle has probability zero"), "", "", ""])
            continue
        for i, entry in enumerate(shown):
            mean, sd, error = (float(x[entry]) for x in found)
            name = f"{site}[{', '.join(map(str, entry))}]" if entry else site
            plates = element if i == 0 else [""] * len(element)
            rows.append([*plates, name, f"{mean:.4g}", f"{error:.2g}" if _known(error) else "", f"{sd:.4g}"])
    titles = [*_plate_titles(posterior), "", "mean", "± s.e.", "sd"]
    cut += len(elements) * (len(entries) - len(shown))
    return _cut(markup.table(titles, rows, left=range(kept + 1)), cut, site)


def _known(error: float) -> bool:
    """Whether an error is neither NaN nor zero, up to rounding; zero means that all draws are equal."""
    return error > 1e-12


def _cut(table: Markup, cut: int, site: str) -> Markup:
    return Markup(table + (note(f"{cut} more of {site}") if cut else ""))
