"""The plot of one site of a posterior."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...files import plain
from ...markup import visible
from ..core.arguments import all_particles
from .html import is_discrete
from .values import moments, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .posterior import Index, Posterior

BARS, LONGEST, BINS = 10, 48, 30  # the most bars, characters of a text, and bins of a histogram


def draw(posterior: Posterior, site: str | None, index: Index, ax: Axes | None) -> Axes:
    """See `Posterior.plot`."""
    if site is None:
        site = next((s for s in posterior.samples if s in posterior.sites.decoders), next(iter(posterior.samples), ""))
    posterior._checked(site)
    if is_discrete(posterior, site):
        return _probabilities(posterior, site, index, ax)
    element, within = posterior._element(index, [site])
    numbers = posterior.samples[site][all_particles((*element, *within))]
    if numbers.dim() > 1:
        return _means(posterior, site, numbers, element, ax)
    return _histogram(site, numbers, posterior._normalised(element), ax)


def _probabilities(posterior: Posterior, site: str, index: Index, ax: Axes | None) -> Axes:
    found, there = values(posterior, site, index, BARS)
    ax = _bars(
        [_label(v.value) for v in found], [v.probability for v in found], [v.error for v in found], ax, capped=1.0
    )
    ax.set_xlabel("probability")
    title = site if there == len(found) else f"{site}: {len(found)} of {there} values"
    ax.set_title(_label(title), fontsize=9)
    return ax


def _means(posterior: Posterior, site: str, numbers: Tensor, element: tuple[int, ...], ax: Axes | None) -> Axes:
    entries = list(product(*map(range, numbers.shape[1:])))
    found = moments(posterior, numbers, element)
    shown = entries[:BARS]
    means, sds = ([float(x[entry]) for entry in shown] for x in (found.mean, found.sd))
    ax = _bars([str(list(entry)) for entry in shown], means, sds, ax)
    ax.set_xlabel("mean and standard deviation")
    title = site if len(shown) == len(entries) else f"{site}: {len(shown)} of {len(entries)} numbers"
    ax.set_title(_label(title), fontsize=9)
    return ax


def _histogram(site: str, numbers: Tensor, weights: Tensor, ax: Axes | None) -> Axes:
    ax = _axes(2.8) if ax is None else ax
    possible = weights > 0
    x, w = (t[possible].double().cpu().numpy() for t in (numbers, weights.to(numbers.device)))
    bins = min(BINS, 2 + int(len(x) ** 0.5))
    ax.hist(x, bins=bins, weights=w, density=True, color="C0", alpha=0.8)
    ax.set(xlabel=_label(site), ylabel="density")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _bars(
    labels: list[str], lengths: list[float], errors: list[float], ax: Axes | None, capped: float = torch.inf
) -> Axes:
    """Horizontal bars, the first on top; an error of NaN is not drawn."""
    ax = _axes(0.28 * len(labels) + 1.0) if ax is None else ax
    places = range(len(labels))
    ax.barh(places, lengths, color="C0", alpha=0.8)
    known = [i for i, error in enumerate(errors) if error > 0]
    if known:
        xs, es = [lengths[i] for i in known], [errors[i] for i in known]
        above = [max(0.0, min(e, capped - x)) for x, e in zip(xs, es, strict=True)]
        below = [min(e, x) if capped < torch.inf else e for x, e in zip(xs, es, strict=True)]
        ax.errorbar(xs, known, xerr=[below, above], fmt="none", ecolor="0.4", elinewidth=1, capsize=2)
    ax.set_yticks(places, labels, fontsize=8)
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _axes(height: float) -> Axes:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(6.0, height), layout="constrained")[1]


def _label(value: object) -> str:
    """A value as the label of its bar: long texts are cut, control characters named, and dollars start no formula."""
    shown = visible(str(value).replace("\n", "⏎"), keep="")
    shown = shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"
    return plain(shown or "(empty)")
