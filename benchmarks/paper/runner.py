"""Runs the units of work that have no file yet, and writes a page from the units that have one.

Every unit of work (a study's cell and a seed) is one JSON file. The same command continues an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lmppl import files

from .study import Figures, Headline, Results, Study, Told, markdown

Kept = dict[tuple[str, int], Figures]  # the content of the file of a cell and a seed


def path_of(study: Study, cell: str, seed: int, runs: Path) -> Path:
    return runs / study.name / f"{cell}.{seed}.json"


def unit(package: str, name: str, cell: str, seed: int, runs: Path, given: Sequence[Any]) -> str:
    """Run one cell of a package's study with one seed, and write its figures to a file."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    study = next(s for s in import_module(package).STUDIES if s.name == name)
    torch.manual_seed(seed)
    started = time.process_time()
    found = study.run(cell, seed, False, *given)
    seconds = time.process_time() - started + found.get("elsewhere", 0.0)
    path = path_of(study, cell, seed, runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps({"seconds": seconds, "found": found}).encode())
    return f"{name}: {cell}, seed {seed}: {seconds:.0f} s"


def kept_of(study: Study, seeds: int, runs: Path) -> Kept:
    """The contents of a study's files, as far as they exist."""
    return {
        (cell, seed): json.loads(path.read_text())
        for cell in study.cells
        for seed in range(seeds)
        if (path := path_of(study, cell, seed, runs)).exists()
    }


def section(study: Study, kept: Kept, seeds: int) -> tuple[str, Results]:
    """A sentence on how many seeds have run, and the figures that the study's report gets."""
    of = {cell: [seed for seed in range(seeds) if (cell, seed) in kept] for cell in study.cells}
    if study.paired:  # a seed without all cells is left out
        complete = [seed for seed in range(seeds) if all((cell, seed) in kept for cell in study.cells)]
        text = f"Not complete: {len(complete)} of {seeds} seeds have run.\n\n" if len(complete) < seeds else ""
        of = dict.fromkeys(study.cells, complete)
    elif all(len(there) == seeds for there in of.values()):
        text = f"{seeds} seeds.\n\n"
    else:
        counts = {len(there) for there in of.values()}
        which = counts.pop() if len(counts) == 1 else "; ".join(f"{cell} {len(there)}" for cell, there in of.items())
        text = f"Not complete. Seeds that have run, of {seeds}: {which}.\n\n"
    found = {cell: [kept[cell, seed]["found"] | {"seed": seed} for seed in there] for cell, there in of.items()}
    return text, {cell: runs for cell, runs in found.items() if runs}


def page(studies: Sequence[Study], preamble: str, seeds: int, runs: Path, out: Path) -> None:
    """Write the page from the files that exist."""
    sections, headlines, seconds, known, told = [], [], 0.0, {}, Told()
    for study in studies:
        kept = kept_of(study, seeds, runs)
        seconds += sum(k["seconds"] for k in kept.values())
        basis, results = section(study, kept, seeds)
        known |= {f"{study.name}: {cell}": runs for cell, runs in results.items()}
        text = f"## {study.title}\n\n{basis}"
        if results:
            known_too = results | {cell: runs for cell, runs in known.items() if cell.partition(":")[0] in study.beside}
            text += study.report(known_too)
            headlines += [(study, study.headline(known_too))] if study.headline else []
            told |= study.told(known_too) if study.told else {}
            if study.plot is not None:
                picture = out.with_name(f"{out.stem}-{study.name}.png")
                study.plot(results, picture)
                text += f"\n![{study.title}]({picture.name})\n"
        sections.append(text + costs(kept))
    given = {"seeds": seeds, "hours": seconds / 3600, "headline": first_table(headlines), "claims": claims(sections)}
    text = preamble.format_map(Told(told | given))
    files.write(out, (text + "\n".join(sections)).encode())


def claims(sections: Sequence[str]) -> str:
    """A table of which claims were seen, with a row for each section that has a `study.verdict`."""
    rows = []
    for text in sections:
        title = text.partition("\n")[0].removeprefix("## ")
        found = re.findall(r"^- \*(.+?)\*: \*\*(.+?)\*\*", text, re.MULTILINE)
        if found:
            missed = [f"{claim} ({word})" if word != "not seen" else claim for claim, word in found if word != "seen"]
            rows.append((title, f"{len(found) - len(missed)} of {len(found)}", "; ".join(missed)))
    return markdown(("experiment", "claims seen", "claims not seen"), rows)


def first_table(headlines: Sequence[tuple[Study, Headline]]) -> str:
    """A table of the headlines of studies."""
    rows = [
        (study.title.partition(":")[0], measured, paper, here, str(seeds))
        for study, headline in headlines
        for measured, paper, here, seeds in headline
    ]
    return markdown(("experiment", "figures", "the paper", "here", "seeds"), rows)


def costs(kept: Kept) -> str:
    """A sentence on tokens and processor time, for studies that count their tokens."""
    scored = [k["found"]["scored"] for k in kept.values() if "scored" in k["found"]]
    if not scored:
        return ""
    return (
        f"\nCost: {len(scored)} units of work, {sum(scored):,} tokens scored, "
        f"{sum(k['seconds'] for k in kept.values()) / 3600:.2f} core-hours.\n"
    )


def options(doc: str | None, studies: Sequence[Study], *, seeds: int, jobs: int, runs: str, out: str):
    """The parser of a command that runs these studies."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a comma-separated choice of " + ", ".join(s.name for s in studies))
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--jobs", type=int, default=jobs, help="processes, one thread each")
    parser.add_argument("--runs", type=Path, default=Path(runs))
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def chosen(parser: argparse.ArgumentParser, a: argparse.Namespace, studies: Sequence[Study]) -> list[Study]:
    """The studies that ``--only`` names; an unknown name ends the command."""
    names = a.only.split(",") if a.only else [s.name for s in studies]
    if unknown := set(names) - {s.name for s in studies}:
        parser.error(f"--only: no experiment is called {', '.join(sorted(unknown))}")
    return [s for s in studies if s.name in names]


def run(package: str, preamble: str, a: argparse.Namespace, chosen: Sequence[Study], given: Sequence[Any] = ()) -> None:
    """Run the units of the chosen studies that have no file yet, write the page of all, exit with 1 if a unit failed.

    :param given: further arguments of a study's ``run``, after cell, seed and ``short``.
    """
    todo = [
        (package, study.name, cell, seed, a.runs, given)
        for seed in range(a.seeds)  # every experiment has a first seed before any has a second
        for study in chosen
        for cell in study.cells
        if not path_of(study, cell, seed, a.runs).exists()
    ]
    failed = 0
    with ProcessPoolExecutor(a.jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(unit, *work) for work in todo]):
            try:
                print(done.result(), flush=True)
            except Exception:  # the others go on
                failed += 1
                traceback.print_exc()
    page(import_module(package).STUDIES, preamble, a.seeds, a.runs, a.out)
    print(f"Written to {a.out}")
    raise SystemExit(failed > 0)
