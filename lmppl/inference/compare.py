"""`compare`: several algorithms on one model, beside the truth."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import programs
from .posterior import Posterior
from .programs import Program
from .quality import density_quality, draw_quality


class Algorithm(Protocol):
    """What `compare` needs: ``run(*args) -> Posterior``."""

    def run(self, *args: Any, **kwargs: Any) -> Posterior: ...


@dataclass
class Row:
    """One algorithm's figures, averaged over plates and repetitions; None where a figure is not defined.

    A query is the posterior of one observation (one plate element); ``break_even`` is the number of queries after which
    training has cost fewer tokens than enumerating each.
    """

    name: str
    num_particles: int | None = None
    density_tv: float | None = None
    forward_kl: float | None = None
    reverse_kl: float | None = None
    draws_tv: float | None = None
    log_evidence: float | None = None
    log_evidence_error: float | None = None
    ess: float | None = None
    khat: float | None = None
    training_tokens: int | None = None
    query_tokens: float | None = None
    break_even: float | None = None


@dataclass
class Comparison:
    """A table of algorithms; `print`, `plot` and `save` it."""

    rows: list[Row]
    unexplored: float | None = None
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def tables(self) -> list[Table]:
        """The rows as rich tables: draws and evidence, densities, cost; what no row has a figure for is left out."""
        found = []
        for title, columns in _TABLES:
            shown = [c for c in columns if any(getattr(row, c.field) is not None for row in self.rows)]
            rows = [row for row in self.rows if any(getattr(row, c.field) is not None for c in shown)]
            if not shown:
                continue
            table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
            table.add_column("algorithm", no_wrap=True)
            for column in shown:
                table.add_column(column.title, justify="right", no_wrap=True)
            for row in rows:
                table.add_row(row.name, *(column.show(getattr(row, column.field)) for column in shown))
            found.append(table)
        return found

    def print(self, console: Console | None = None) -> None:
        """Print the tables and notes."""
        console = console or Console()
        for table in self.tables():
            console.print(table)
        for note in self.notes:
            console.print(note, highlight=False)

    def to_json(self) -> dict[str, Any]:
        """Rows, unexplored mass and notes; numbers that are not finite are None."""
        rows = [
            {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in asdict(row).items()}
            for row in self.rows
        ]
        return {"rows": rows, "unexplored": self.unexplored, "notes": self.notes}

    def save(self, directory: str | Path) -> None:
        """Write ``comparison.json`` and ``comparison.png`` there, each whole or not at all."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "comparison.json", json.dumps(self.to_json(), indent=2).encode())
        self.plot(directory / "comparison.png")

    def plot(self, path: str | Path) -> None:
        """Bars: distance of the draws, error of the evidence, and effective sample size, by algorithm."""
        from matplotlib.figure import Figure

        panels = [("draws_tv", "TV of draws to the exact posterior"), ("density_tv", "TV of the density"),
                  ("log_evidence_error", "|error of log evidence| (nats)"), ("ess", "ESS / N")]  # fmt: skip
        panels = [p for p in panels if any(_finite(getattr(r, p[0])) for r in self.rows)]
        figure = Figure(figsize=(4.2 * max(1, len(panels)), 0.42 * len(self.rows) + 1.6), layout="constrained")
        axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
        names = [row.name for row in self.rows]
        for axis, (key, title) in zip(axes, panels, strict=False):
            for i, row in enumerate(self.rows):
                value = getattr(row, key)
                if _finite(value):
                    axis.barh(i, value, color=f"C{i}")
                    axis.annotate(f" {value:.3f}", (value, i), va="center", fontsize=8)
            axis.set_title(title, fontsize=9)
            axis.set_yticks(range(len(names)), names, fontsize=8)
            axis.margins(x=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].invert_yaxis()
        path = Path(path)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".png", delete=False) as scratch:
            figure.savefig(scratch, dpi=120)
        os.replace(scratch.name, path)


def compare(
    model: Program,
    algorithms: Mapping[str, Algorithm],
    *args: Any,
    exact: Any = None,
    exact_tokens: float | None = None,
    guides: Mapping[str, Program] | None = None,
    repetitions: int = 1,
    progress: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> Comparison:
    """Run each algorithm on the model, count its tokens, and hold its answer against the exact posterior.

    :param algorithms: by name; each answers ``run(*args) -> Posterior``.
    :param exact: the exact `Posterior`, or an `Enumeration` to get it from; None: only what needs no truth is shown.
    :param exact_tokens: what a given exact posterior cost in tokens.
    :param guides: programs whose *density* is compared, by the name of their algorithm; by default the algorithm's own
        ``density``, which importance sampling and GFlowNets have and SMC has not.
    :param repetitions: runs of each algorithm to average over.
    """
    networks = programs.networks(model, args, kwargs)
    rows: list[Row] = []
    truth: Posterior | None = exact if isinstance(exact, Posterior) or exact is None else None
    if exact is not None and truth is None:
        _tell(progress, "enumeration")
        before = _tokens(networks)
        truth = exact.run(*args, **kwargs)
        exact_tokens = _tokens(networks) - before
    counts = []
    for name, algorithm in algorithms.items():
        _tell(progress, name)
        before = _tokens(networks)
        answers = [algorithm.run(*args, **kwargs) for _ in range(repetitions)]
        row = Row(name, num_particles=answers[0].num_particles)
        row.query_tokens = (_tokens(networks) - before) / repetitions / answers[0].log_evidence.numel()
        row.training_tokens = getattr(algorithm, "training_tokens", None)
        evidence = torch.stack([a.log_evidence for a in answers])
        row.log_evidence = _mean(evidence)
        row.ess = _mean(torch.stack([a.ess / a.num_particles for a in answers]))
        khat = torch.stack([a.khat for a in answers])
        row.khat = _mean(khat[khat.isfinite()])
        if truth is not None:
            row.log_evidence_error = _mean((evidence - truth.log_evidence).abs())
            alive = [a for a in answers if bool((a.log_evidence != -torch.inf).all())]  # NaN: not estimated
            if alive:
                row.draws_tv = _mean(torch.stack([draw_quality(truth, a) for a in alive]))
            guide = (guides or {}).get(name) or getattr(algorithm, "density", None)
            if guide is not None:
                _fill_density(row, truth, guide, args, kwargs)
            counts.append(answers[0].num_particles)
        rows.append(row)
    if truth is not None:
        exact_tokens = None if exact_tokens is None else exact_tokens / truth.log_evidence.numel()
        for n in sorted(set(counts)):
            draws = torch.stack([draw_quality(truth, truth.resample(n, "multinomial")) for _ in range(8)])
            rows.append(Row(f"exact posterior, {n} draws", num_particles=n, draws_tv=_mean(draws)))
        rows.append(
            Row(
                "enumeration",
                draws_tv=0.0,
                log_evidence=_mean(truth.log_evidence),
                log_evidence_error=0.0,
                query_tokens=exact_tokens,
            )  # fmt: skip
        )
        for row in rows:
            if row.training_tokens and exact_tokens and row.query_tokens and exact_tokens > row.query_tokens:
                row.break_even = row.training_tokens / (exact_tokens - row.query_tokens)
    result = Comparison(rows, unexplored=_unexplored(truth))
    if truth is None:
        result.notes.append(
            "No exact posterior can be had here: evidence is an estimate, and ESS and k-hat say how good."
        )
    elif result.unexplored is not None:
        result.notes.append(f"Prior mass left out of the enumeration: {result.unexplored:.2g} on average.")
    return result


def _fill_density(row: Row, exact: Posterior, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    quality = density_quality(exact, guide, args, kwargs)
    row.density_tv, row.forward_kl, row.reverse_kl = (_mean(x) for x in quality)


def _tokens(networks: list[Any]) -> int:
    return sum(network.tokens_scored for network in networks)


def _tell(progress: Callable[[str], None] | None, what: str) -> None:
    if progress is not None:
        progress(what)


def _mean(x: Tensor) -> float | None:
    """The mean of what is defined; None where nothing is. (-inf, an evidence of zero, is defined.)"""
    x = x.double()
    x = x[~x.isnan()]
    return float(x.mean()) if x.numel() else None


def _unexplored(truth: Posterior | None) -> float | None:
    left = getattr(truth, "unexplored", None)
    return None if left is None else float(torch.as_tensor(left).double().mean())


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as scratch:
        scratch.write(content)
    os.replace(scratch.name, path)


@dataclass(frozen=True)
class _Column:
    field: str
    title: str
    format: str = "{:.3f}"

    def show(self, value: Any) -> str:
        return "" if value is None else value if isinstance(value, str) else self.format.format(value)


_TABLES = (
    (
        "Draws: weighted particles against the exact posterior",
        (
            _Column("num_particles", "N", "{:,d}"),
            _Column("draws_tv", "TV"),
            _Column("log_evidence", "log Z"),
            _Column("log_evidence_error", "|error|"),
            _Column("ess", "ESS/N"),
            _Column("khat", "k-hat", "{:.2f}"),
        ),
    ),
    (
        "Density: q against the exact posterior p",
        (_Column("density_tv", "TV"), _Column("forward_kl", "KL(p|q)"), _Column("reverse_kl", "KL(q|p)")),
    ),
    (
        "Cost: tokens through the network",
        (
            _Column("training_tokens", "training", "{:,d}"),
            _Column("query_tokens", "a query", "{:,.0f}"),
            _Column("break_even", "queries to break even", "{:,.0f}"),
        ),
    ),
)
