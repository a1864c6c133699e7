"""One experiment of the paper: units of work that run apart and are kept, and the section that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Figures = dict[str, Any]  # what one run of a cell found; JSON
Results = dict[str, list[Figures]]  # of every cell that has run, one a seed
Headline = list[tuple[str, str, str, int]]  # what is measured, the paper's figures, ours, and the seeds they rest on


@dataclass(frozen=True)
class Study:
    """One experiment.

    :param name: short; its files are named after it.
    :param title: the section's.
    :param cells: units of work that run apart, usually a method each; each is run for every seed.
    :param run: ``run(cell, seed, short, *given) -> figures`` that JSON can hold; ``short`` is for tests, seconds in
        all; ``given`` is what the command that runs it adds.  Tokens that were scored are "scored", processor seconds
        of other processes "elsewhere".
    :param report: results, each run's figures with its "seed", to Markdown: a table, then one sentence a claim.
    :param plot: a picture of the results, shown under the table.
    :param paired: figures are paired by seed, and the report gets the seeds that all cells have.  False: it gets what
        there is of each cell, and does without cells that have nothing yet.
    :param needs: files that it reads, below the folder of data.
    :param beside: studies whose cells the report gets too, as far as they have run, as "study: cell"; earlier ones.
    :param headline: what a page's first table has of it.
    :param told: figures that the text of a page names, by the names that stand for them there; "–" what is missing.
    """

    name: str
    title: str
    cells: tuple[str, ...]
    run: Callable[..., Figures]
    report: Callable[[Results], str]
    plot: Callable[[Results, Path], None] | None = None
    paired: bool = True
    needs: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    headline: Callable[[Results], Headline] | None = None
    told: Callable[[Results], dict[str, str]] | None = None


class Told(dict[str, str]):
    """What `Study.told` gives, with a dash for what is missing."""

    def __missing__(self, name: str) -> str:
        return "–"


def spread(runs: Sequence[Figures], key: str, digits: int = 3, scale: float = 1.0) -> str:
    """Mean and, in brackets, standard deviation over seeds of one figure; null stands for infinite."""
    values = [math.inf if r[key] is None else r[key] * scale for r in runs]
    if not all(map(math.isfinite, values)):
        return "infinite"
    shown = (
        f"{mean(values):.{digits}f}" if abs(mean(values)) >= 10**-digits or not any(values) else f"{mean(values):.1e}"
    )
    return shown if len(values) < 2 else f"{shown} ({stdev(values):.{digits}f})"


def mean_of(values: Sequence[float | None]) -> float | None:
    """Their mean, null where one of them is infinite."""
    known = [v for v in values if v is not None]
    return mean(known) if len(known) == len(values) else None


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The mean of paired differences and the half-width of its 95% interval, by Student's t."""
    from scipy.stats import t

    d = [a - b for a, b in zip(ours, theirs, strict=True)]
    half = math.inf if len(d) < 2 else float(t.ppf(0.975, len(d) - 1)) * stdev(d) / math.sqrt(len(d))
    return mean(d), half


def verdict(claim: str, seen: bool | None, because: str) -> str:
    """One sentence on a claim of the paper; None: it is not testable here."""
    word = {True: "seen", False: "not seen", None: "not testable here"}[seen]
    return f"- *{claim}*: **{word}**. {because}\n"
