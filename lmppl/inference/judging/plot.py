"""The plot of a diagnosis."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...files import new_figure, plain
from ..posterior.posterior import Posterior
from .calibration import Calibration
from .drift import Drift

if TYPE_CHECKING:
    from .diagnose import Diagnosis


def draw(diagnosis: Diagnosis, path: str | Path | None = None) -> Any:
    """One row of panels, without those that have nothing to show; see `new_figure`."""
    panels: list[tuple[Any, Any]] = []
    if diagnosis.calibration.positions:
        panels.append((_positions, diagnosis.calibration))
        if bool((diagnosis.calibration.lowers.isfinite() & diagnosis.calibration.uppers.isfinite()).any()):
            panels.append((_bounds, diagnosis.calibration))
    if diagnosis.posterior is not None and not hasattr(diagnosis.posterior, "unexplored"):
        panels.append((_weights, diagnosis.posterior))
    panels += [(_lengths, d) for d in diagnosis.drifts if d.name.startswith("length")][:1]
    figure = new_figure(path, figsize=(4.4 * max(1, len(panels)), 3.6), layout="constrained")
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for axis, (panel, what) in zip(axes, panels, strict=False):
        panel(axis, what)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _positions(axis: Any, calibration: Calibration) -> None:
    longest = 0
    for name, x in calibration.positions.items():
        x = x[~x.isnan()].sort().values
        longest = max(longest, len(x))
        grid = torch.linspace(0, 1, 201, dtype=x.dtype)
        share = torch.searchsorted(x, grid, right=True) / max(1, len(x))
        axis.plot(grid, share - grid, label=plain(name), linewidth=1.2)
    band = 1.63 / max(1, longest) ** 0.5  # Kolmogorov's 99%
    axis.axhspan(-band, band, color="0.9", zorder=0)
    axis.axhline(0, color="0.5", linewidth=0.8)
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, -1.3 * band), max(high, 1.3 * band) + 0.6 * band)
    axis.legend(fontsize=7, frameon=False, loc="upper left")
    axis.set_xlabel("position of the truth among the draws", fontsize=8)
    axis.set_title("calibration: share below minus uniform\n(band: 99% if correct)", fontsize=9)


def _bounds(axis: Any, calibration: Calibration) -> None:
    both = calibration.lowers.isfinite() & calibration.uppers.isfinite()
    lowers, uppers = calibration.lowers[both].double(), calibration.uppers[both].double()
    order = uppers.argsort()
    lowers, uppers = lowers[order], uppers[order]
    rank = torch.arange(len(order))
    axis.vlines(rank.numpy(), lowers.numpy(), uppers.numpy(), color="0.8", linewidth=1)
    axis.plot(rank, uppers, "v", markersize=3, label="upper bound", color="C3")
    axis.plot(rank, lowers, "^", markersize=3, label="the algorithm's", color="C0")
    axis.legend(fontsize=7, frameon=False)
    axis.set_xlabel("simulated data, sorted", fontsize=8)
    axis.set_title("log evidence bounds (nats)", fontsize=9)


def _weights(axis: Any, posterior: Posterior) -> None:
    n = posterior.num_particles
    weights = posterior.log_weights.softmax(0).reshape(n, -1).T
    weights = weights[~weights.isnan().any(1)][:8]  # NaN: zero evidence
    # Limits are set before scales, because equal weights have no range.
    axis.set_xlim(0.9, 1.1 * n + 0.1)
    axis.set_ylim(1e-3 / n, max(2.0 * float(weights.max()) if len(weights) else 0.0, 4 / n))
    axis.set_xscale("log")
    axis.set_yscale("log")
    for w in weights:
        axis.plot(range(1, n + 1), w.sort(descending=True).values.clamp(min=1e-12), linewidth=1.2)
    axis.axhline(1 / n, color="0.5", linewidth=0.8, linestyle="--")
    axis.set_xlabel("particle, largest weight first", fontsize=8)
    axis.set_title(f"normalised weights ({len(weights)} plate element(s); dashed: 1/N)", fontsize=9)


def _lengths(axis: Any, drift: Drift) -> None:
    longest = int(max(float(v.max()) for v in drift.values))
    axis.xaxis.get_major_locator().set_params(integer=True)
    for label, x, w, shift in zip(("guide", "posterior"), drift.values, drift.weights, (-0.2, 0.2), strict=True):
        share = torch.zeros(longest + 1, dtype=torch.float64)
        share.scatter_add_(0, x.round().long().flatten(), (w / w.sum()).double().flatten())
        axis.bar((torch.arange(longest + 1) + shift).tolist(), share.tolist(), width=0.4, label=label)
    axis.legend(fontsize=7, frameon=False)
    axis.set_xlabel("tokens", fontsize=8)
    axis.set_title(plain(drift.name), fontsize=9)
