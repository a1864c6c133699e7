"""`Comparison`: the tables, plots and files of `compare`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ... import markup
from ...files import claim, new_figure, plain, save_figure, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILES = "comparison.json", "comparison.png", "budget.png"


@dataclass
class Row:
    """The figures of one algorithm, averaged over plates, repetitions and seeds; None for a figure that is not defined.

    A query is the posterior of one observation (one plate element).  ``break_even`` is the number of queries from which
    on training costs fewer tokens than enumeration.  ``sd`` is the standard deviation over seeds of each figure, by
    field.  A ``reference`` is no algorithm but the exact posterior, or draws from it.
    """

    name: str
    num_particles: int | None = None
    draws_tv: float | None = None
    draws_modes: float | None = None  # the share of the posterior's modes that are among the draws
    log_evidence: float | None = None
    log_evidence_error: float | None = None
    log_evidence_sd: float | None = None  # of one observation's estimate, over repetitions and seeds
    ess: float | None = None
    khat: float | None = None
    min_ess: float | None = None  # of SMC: the smallest ESS / N during the run
    survival: float | None = None  # of SMC: the share of the first particles with descendants at the end
    suspect: float | None = None  # of SMC: the share of plate elements and runs that are `Sequential.suspect`
    density_tv: float | None = None
    forward_kl: float | None = None
    reverse_kl: float | None = None  # KL(q, p): inf if q has mass where p = 0
    density_outside: float | None = None  # the mass of q where p = 0 or where the enumeration did not look
    reverse_kl_inside: float | None = None  # KL(q, p) of q restricted to the support of p
    density_modes: float | None = None  # the share of modes to which q gives at least a tenth of their probability
    training_tokens: int | None = None
    query_tokens: float | None = None
    seconds: float | None = None  # per query
    break_even: float | None = None
    sd: dict[str, float] = field(default_factory=dict)
    reference: bool = False


def averaged(rows: list[Row]) -> Row:
    """The mean of each figure over seeds, and its standard deviation."""
    result = Row(rows[0].name)
    for f in fields(Row):
        if f.name in ("name", "sd", "reference"):
            continue
        values = [getattr(row, f.name) for row in rows if getattr(row, f.name) is not None]
        if values:
            mean = sum(values) / len(values)
            setattr(result, f.name, round(mean) if isinstance(values[0], int) else mean)
            if len(values) > 1 and f.name not in _WITHOUT_SPREAD and math.isfinite(mean):
                result.sd[f.name] = float(torch.tensor(values, dtype=torch.float64).std())
    return result


_WITHOUT_SPREAD = ("khat", "suspect", "num_particles", "training_tokens", "query_tokens", "seconds", "log_evidence")


@dataclass
class Point:
    """A point of a curve: the quality of one algorithm's draws at one budget per query, averaged over seeds."""

    name: str
    budget: float
    num_particles: int
    query_tokens: float
    seconds: float
    draws_tv: float | None
    log_evidence_error: float | None


@dataclass(repr=False)
class Comparison:
    """The result of `compare`: a row of figures for each algorithm, and curves of quality against cost.

    ``comparison["SMC"]`` is the row of that name; its attributes are the figures, None where a figure is not defined:
    ``draws_tv`` (total variation of the draws to the exact posterior), ``log_evidence`` and ``log_evidence_error``
    (nats), ``ess`` (ESS / N), ``khat``, ``density_tv``, ``forward_kl`` and ``reverse_kl`` (nats), ``query_tokens`` and
    ``seconds`` (per query), ``training_tokens``, and ``sd``, a dict with the standard deviation over seeds of each.

    :param rows: one row per algorithm, and reference rows: the exact posterior, and draws from it.
    :param unexplored: the prior mass that the enumeration left out, on average; None if there was no enumeration.
    :param notes: remarks below the tables.
    :param curves: points of quality against budget, if there were budgets.
    :param unit: the unit of the budgets, "tokens" or "seconds".

    Example::

        samplers = {"prior": Importance(model, num_particles=64), "SMC": SMC(model, num_particles=64)}
        comparison = compare(model, samplers, x, y, exact=Enumeration(model))
        comparison.print()
        comparison["SMC"].draws_tv  # total variation to the exact posterior
        comparison.save("comparison")  # comparison.json and comparison.png
    """

    rows: list[Row]
    unexplored: float | None = None
    notes: list[str] = field(default_factory=list)
    curves: list[Point] = field(default_factory=list)
    unit: str = "tokens"

    def __repr__(self) -> str:
        """One line: the algorithms."""
        return f"Comparison({', '.join(row.name for row in self.rows)})"

    def _repr_html_(self) -> str:
        parts: list[Any] = []
        for title, columns, rows in self.cells():
            cells = [[row.name, *figures] for row, figures in rows]
            parts += [title, markup.table(["algorithm", *columns], cells)]
        return markup.page("Comparison", *parts, *map(markup.note, self.notes))

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} is none of {[row.name for row in self.rows]}")

    def tables(self) -> list[Table]:
        """The rows as rich tables: draws, evidence, densities, cost.  Columns without figures are left out."""
        found = []
        for title, columns in _TABLES:
            shown, rows = self._filled(columns)
            if not shown:
                continue
            table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
            table.add_column("algorithm", no_wrap=True)
            for column in shown:
                table.add_column(column.title, justify="right", no_wrap=not any(column.field in r.sd for r in rows))
            for i, row in enumerate(rows):
                if row.reference and i and not rows[i - 1].reference:
                    table.add_section()
                table.add_row(row.name, *(column.show(row) for column in shown))
            found.append(table)
        return found

    def cells(self) -> list[tuple[str, list[str], list[tuple[Row, list[str]]]]]:
        """The same tables as strings: of each its title, the titles of its columns, and each row's figures."""
        filled = [(title, *self._filled(columns)) for title, columns in _TABLES]
        return [
            (title, [c.title for c in shown], [(row, [c.show(row) for c in shown]) for row in rows])
            for title, shown, rows in filled
            if shown
        ]

    def markdown(self) -> str:
        """The tables in Markdown."""
        lines = []
        for title, columns, rows in self.cells():
            titles = [c.replace("|", "\\|") for c in columns]
            lines += [f"**{title}**", "", "| algorithm | " + " | ".join(titles) + " |"]
            lines += ["|---|" + "---:|" * len(columns)]
            lines += [f"| {row.name} | " + " | ".join(figures) + " |" for row, figures in rows]
            lines.append("")
        return "\n".join(lines)

    def _filled(self, columns: tuple[_Column, ...]) -> tuple[list[_Column], list[Row]]:
        shown = [c for c in columns if any(getattr(row, c.field) is not None for row in self.rows)]
        return shown, [row for row in self.rows if any(getattr(row, c.field) is not None for c in shown)]

    def print(self, console: Console | None = None) -> None:
        """Prints the tables and notes.

        :param console: a `rich.console.Console`; None: standard output.
        """
        console = console or Console()
        for table in self.tables():
            title, table.title = table.title, None  # as a title it would be broken at the table's width
            console.print(title, style="bold", highlight=False)
            console.print(table)
        for note in self.notes:
            console.print(note, highlight=False)

    def to_json(self) -> dict[str, Any]:
        """A dict for JSON: rows, curves, unexplored mass and notes; numbers that are not finite are None."""
        return {
            "rows": [_finite(asdict(row)) for row in self.rows],
            "curves": [_finite(asdict(point)) for point in self.curves],
            "unit": self.unit,
            "unexplored": self.unexplored,
            "notes": self.notes,
        }

    def save(self, directory: str | Path) -> None:
        """Writes ``comparison.json``, ``comparison.png`` and, if there are curves, ``budget.png``, all or none.

        Files of an earlier comparison are replaced.

        :param directory: the directory.
        :raises ValueError: if something else wrote files of these names there.
        """
        claim(directory, FILES)
        with writing(directory, "comparison") as fresh:
            (fresh / FILES[0]).write_text(json.dumps(self.to_json(), indent=2, allow_nan=False))
            self.plot(fresh / FILES[1])
            if self._drawn(_BUDGET, self.curves):
                self.plot_budget(fresh / FILES[2])

    def plot(self, path: str | Path | None = None) -> list[Axes]:
        """Draws bars: distance of the draws, of the density, error of the evidence, and ESS, by algorithm.

        There are two panels in a row.  Each shows the rows that have its figure, algorithms in colour, and references
        hatched below them.  An infinite figure is written where its bar would begin.

        :param path: a PNG to write; None: a notebook shows the figure.
        :returns: the axes of the panels.
        """
        panels = self._drawn(_BARS, self.rows)
        shown = [[row for row in self.rows if getattr(row, key) is not None] for key, _ in panels]
        wide = min(2, max(1, len(panels)))
        bars = [max(map(len, shown[i : i + wide])) for i in range(0, len(shown), wide)] or [1]  # of each row of panels
        heights = [0.42 * n + 1.6 for n in bars]
        figure = new_figure(path, figsize=(5.4 * wide, sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(bars), wide, height_ratios=heights)
        axes: list[Any] = [figure.add_subplot(grid[divmod(i, wide)]) for i in range(max(1, len(panels)))]
        colors = {row.name: f"C{i}" for i, row in enumerate(self.rows)}
        for panel, (axis, (key, title), rows) in enumerate(zip(axes, panels, shown, strict=False)):
            for i, row in enumerate(rows):
                value, error = getattr(row, key), row.sd.get(key)
                length = value if math.isfinite(value) else 0.0
                style: dict[str, Any] = {"color": "0.9", "edgecolor": "0.5", "hatch": "//"} if row.reference else {}
                axis.barh(i, length, xerr=error, error_kw={"lw": 0.8}, **{"color": colors[row.name], **style})
                axis.annotate(f" {value:.3f}", (length + (error or 0.0), i), va="center", fontsize=8)
            algorithms = sum(not row.reference for row in rows)
            if 0 < algorithms < len(rows):
                axis.axhline(algorithms - 0.5, color="0.5", linewidth=0.8, linestyle="--")
            axis.set_title(title, fontsize=9)
            axis.set_yticks(range(len(rows)), [plain(row.name) for row in rows], fontsize=8)
            axis.margins(x=0.25)
            axis.set_ylim(bars[panel // wide] - 0.4, -0.6)  # bars of one height, the first at the top
            axis.spines[["top", "right"]].set_visible(False)
        if path is not None:
            save_figure(figure, path)
        return list(axes)

    def plot_budget(self, path: str | Path | None = None) -> list[Axes]:
        """Draws curves: distance of the draws and error of the evidence against the cost per query.

        :param path: a PNG to write; None: a notebook shows the figure.
        :returns: the axes of the panels.
        :raises ValueError: if there are no curves, because `compare` had no ``budgets`` or no ``exact``.
        """
        cost, panels = "seconds" if self.unit == "seconds" else "query_tokens", self._drawn(_BUDGET, self.curves)
        if not panels:
            raise ValueError("budgets: there is no curve; compare with budgets=... and exact=...")
        figure = new_figure(path, figsize=(4.5 * len(panels), 3.6), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (key, title) in zip(axes, panels, strict=True):
            for i, name in enumerate(dict.fromkeys(p.name for p in self.curves)):
                points = [p for p in self.curves if p.name == name and _is_finite(getattr(p, key))]
                if points:
                    x, y = [getattr(p, cost) for p in points], [getattr(p, key) for p in points]
                    axis.plot(x, y, "o-", ms=3, lw=1, label=plain(name), color=f"C{i}")
            axis.set(xscale="log", yscale="log", xlabel=f"{self.unit} per query", title=title)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, fontsize=7)
        if path is not None:
            save_figure(figure, path)
        return list(axes)

    @staticmethod
    def _drawn(panels: list[tuple[str, str]], of: list[Row] | list[Point]) -> list[tuple[str, str]]:
        """The panels that have a figure."""
        return [(key, title) for key, title in panels if any(_is_finite(getattr(x, key)) for x in of)]


_BARS = [("draws_tv", "TV of draws to the exact posterior"), ("density_tv", "TV of the density"),
         ("log_evidence_error", "|error of log evidence| (nats)"), ("ess", "ESS / N")]  # fmt: skip
_BUDGET = [_BARS[0], _BARS[2]]


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures with None in place of numbers that are not finite, which JSON cannot hold."""
    none = {k: None for k, v in figures.items() if isinstance(v, float) and not math.isfinite(v)}
    return figures | none | {k: _finite(v) for k, v in figures.items() if isinstance(v, dict)}


@dataclass(frozen=True)
class _Column:
    field: str
    title: str
    format: str = "{:.3f}"

    def show(self, row: Row) -> str:
        value = getattr(row, self.field)
        if value is None:
            return ""
        shown = self.format.format(value)
        return f"{shown} ± {self.format.format(row.sd[self.field])}" if self.field in row.sd else shown


_TABLES = (
    (
        "Draws: weighted particles against the exact posterior",
        (
            _Column("num_particles", "N", "{:,d}"),
            _Column("draws_tv", "TV"),
            _Column("draws_modes", "modes", "{:.2f}"),
        ),
    ),
    (
        "Evidence and weights",
        (
            _Column("log_evidence", "log Z"),
            _Column("log_evidence_error", "|error|"),
            _Column("log_evidence_sd", "sd"),
            _Column("ess", "ESS/N"),
            _Column("khat", "k-hat", "{:.2f}"),
        ),
    ),
    (
        "During the run: what SMC's final weights do not show",
        (
            _Column("min_ess", "least ESS/N"),
            _Column("survival", "survival"),
            _Column("suspect", "suspect", "{:.0%}"),
        ),
    ),
    (
        "Density: q against the exact posterior p",
        (
            _Column("density_tv", "TV"),
            _Column("forward_kl", "KL(p,q)"),
            _Column("reverse_kl", "KL(q,p)"),
            _Column("density_modes", "modes", "{:.2f}"),
        ),
    ),
    (
        "Support: q where p = 0, and KL(q, p) of q elsewhere",
        (
            _Column("density_outside", "share of q", "{:.2g}"),
            _Column("reverse_kl_inside", "KL(q,p) within"),
        ),
    ),
    (
        "Cost: tokens through the network",
        (
            _Column("training_tokens", "training", "{:,.0f}"),
            _Column("query_tokens", "per query", "{:,.0f}"),
            _Column("break_even", "queries to break even", "{:,.0f}"),
        ),
    ),
)
