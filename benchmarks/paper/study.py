"""One experiment of a results page: its units of work, which run and are kept separately, and its section."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Figures = dict[str, Any]  # what one run of a cell measured; JSON
Results = dict[str, list[Figures]]  # for every cell that has run, the figures of each seed
Headline = list[tuple[str, str, str, int]]  # what is measured, the paper's figures, ours, the number of seeds


@dataclass(frozen=True)
class Study:
    """One experiment.

    :param name: a short name; the study's files are named after it.
    :param title: the title of its section.
    :param cells: units of work that run separately, usually one method each; each is run for every seed.
    :param run: ``run(cell, seed, short, *given) -> figures``, which JSON can hold.  ``short`` is for tests: the run
        takes seconds.  ``given`` is what the command that runs the study adds.  "scored" is the number of tokens that
        were scored, "elsewhere" the processor seconds of other processes.
    :param report: makes Markdown of the results: the `opening`, the tables, then one `verdict` for each claim.  The
        figures of each run include its "seed".
    :param plot: draws a picture of the results, which is shown at the end of the section.
    :param paired: True: figures are paired by seed, and the report gets the seeds that all cells have.  False: it gets
        all runs of each cell, and must work without the cells that have none.
    :param needs: files that it reads, relative to the folder of data.
    :param beside: earlier studies whose cells the report gets too, as "study: cell", as far as they have run.
    :param headline: the rows of this study in the first table of a page.
    :param told: figures that the text of a page quotes, by their names in that text; a missing figure is shown as "–".
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
    """The figures of `Study.told`, with a dash for what is missing."""

    def __missing__(self, name: str) -> str:
        return "–"


def spread(runs: Sequence[Figures], key: str, digits: int = 3, scale: float = 1.0) -> str:
    """The mean of a figure over seeds and, in brackets, its standard deviation; null stands for infinite."""
    values = [math.inf if r[key] is None else r[key] * scale for r in runs]
    if not all(map(math.isfinite, values)):
        return "infinite"
    shown = (
        f"{mean(values):.{digits}f}" if abs(mean(values)) >= 10**-digits or not any(values) else f"{mean(values):.1e}"
    )
    return shown if len(values) < 2 else f"{shown} ({stdev(values):.{digits}f})"


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean, null if one of the values is infinite."""
    known = [v for v in values if v is not None]
    return mean(known) if len(known) == len(values) else None


def opening(question: str, setting: str, columns: Mapping[str, str]) -> str:
    """How a section begins: what was asked, the setting, and what each column means."""
    return f"{question}\n\n{setting}\n\n{meanings(columns)}\n"


def meanings(of: Mapping[str, str]) -> str:
    """A Markdown list of what columns or rows mean."""
    return "".join(f"- {name}: {means}.\n" for name, means in of.items())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The mean of paired differences and half the width of its 95% interval, by Student's t."""
    from scipy.stats import t

    d = [a - b for a, b in zip(ours, theirs, strict=True)]
    half = math.inf if len(d) < 2 else float(t.ppf(0.975, len(d) - 1)) * stdev(d) / math.sqrt(len(d))
    return mean(d), half


def verdict(claim: str, seen: bool | None, because: str) -> str:
    """A claim and whether it was seen (None: it cannot be tested here), in the form that `runner.claims` reads."""
    word = {True: "seen", False: "not seen", None: "not testable here"}[seen]
    return f"- *{claim}*: **{word}**. {because}\n"
