"""The values of one site in one plate element of a posterior, with their probabilities and standard errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..core.arguments import plate_element

if TYPE_CHECKING:
    from .posterior import Index, Posterior


class Value(NamedTuple):
    """A distinct value of a site; ``error`` is the standard error of ``probability``, NaN if it is not known."""

    value: Any
    probability: float
    error: float
    particles: int


class Moments(NamedTuple):
    """Mean and standard deviation of a number under the posterior; ``error`` is the standard error of the mean."""

    mean: Tensor
    sd: Tensor
    error: Tensor


def values(posterior: Posterior, site: str, index: Index = None, most: int | None = None) -> tuple[list[Value], int]:
    """The ``most`` probable values of a site, as in `Posterior.table`, and the number of all values."""
    element, (keys,) = posterior._columns([site], index)
    rows: dict[Any, list[int]] = {}
    for n, key in enumerate(keys):
        rows.setdefault(key, []).append(n)
    weights = posterior._normalised(element, torch.float64).tolist()
    total = {key: sum(weights[n] for n in of) for key, of in rows.items()}
    possible = sorted((key for key in rows if total[key] > 0), key=lambda key: -total[key])
    shown = possible[:most]
    indicators = torch.zeros(len(weights), len(shown), dtype=torch.float64)
    for i, key in enumerate(shown):
        indicators[rows[key], i] = 1.0
    errors = posterior.standard_error(indicators, element).tolist()
    found = [
        Value(key, total[key], error, sum(weights[n] > 0 for n in rows[key]))
        for key, error in zip(shown, errors, strict=True)
    ]
    return found, len(possible)


def moments(posterior: Posterior, numbers: Tensor, index: Index = None) -> Moments:
    """Mean and standard deviation, (...) each, of ``numbers`` (N, ...) of the particles of one plate element."""
    element = plate_element(index, posterior.log_weights.shape[1:])
    weights = posterior._normalised(element, torch.float64).to(numbers.device)
    weights = weights.view(-1, *[1] * (numbers.dim() - 1))
    possible = torch.where(weights > 0, numbers.double(), 0.0)  # numbers of weight zero may be infinite
    mean = (weights * possible).sum(0)
    sd = (weights * (possible - mean).square()).sum(0).sqrt()
    return Moments(mean, sd, posterior.standard_error(numbers, element))
