"""Every experiment of the paper on the embedded language models, beside the exact optimum: docs/results.md.

    python -m benchmarks.paper --jobs 2 --seeds 5

Every unit of work (an experiment's cell and a seed) is one JSON file under --runs; the same command goes on where an
interrupted one was. The page is written from the seeds that all cells of an experiment have.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from lmppl import files

from . import STUDIES
from .study import Results, Study

PREAMBLE = """# Results

The paper's experiments (Hu et al. 2024) on the embedded language models, where the exact optimum is known. Written by
`make paper`; figures are means over {seeds} seeds with their standard deviation in brackets, or over fewer where a
section says that it is not complete: intervals are then wide, and a claim that rests on one may read "not seen" for
want of seeds. All of it took {hours:.1f} core-hours.

"""


def path_of(study: Study, cell: str, seed: int, runs: Path) -> Path:
    return runs / study.name / f"{cell}.{seed}.json"


def unit(name: str, cell: str, seed: int, runs: Path) -> str:
    """Run one cell with one seed and keep what it found."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    study = next(s for s in STUDIES if s.name == name)
    torch.manual_seed(seed)
    started = time.process_time()
    found = study.run(cell, seed, False)
    seconds = time.process_time() - started
    path = path_of(study, cell, seed, runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps({"seconds": seconds, "found": found}).encode())
    return f"{name}: {cell}, seed {seed}: {seconds:.0f} s"


def page(studies: tuple[Study, ...], seeds: int, runs: Path, out: Path) -> None:
    """Write the page from the files that are there."""
    sections, seconds = [], 0.0
    for study in studies:
        kept = {
            (cell, seed): json.loads(path.read_text())
            for cell in study.cells
            for seed in range(seeds)
            if (path := path_of(study, cell, seed, runs)).exists()
        }
        seconds += sum(k["seconds"] for k in kept.values())
        # Figures are paired by seed: one that lacks a cell waits.
        complete = [seed for seed in range(seeds) if all((cell, seed) in kept for cell in study.cells)]
        results: Results = {cell: [kept[cell, seed]["found"] for seed in complete] for cell in study.cells}
        text = f"## {study.title}\n\n"
        if len(complete) < seeds:
            text += f"Not complete: {len(complete)} of {seeds} seeds.\n\n"
        if complete:
            text += study.report(results)
            if study.plot is not None:
                picture = out.with_name(f"{out.stem}-{study.name}.png")
                study.plot(results, picture)
                text += f"\n![{study.title}]({picture.name})\n"
        sections.append(text)
    files.write(out, (PREAMBLE.format(seeds=seeds, hours=seconds / 3600) + "\n".join(sections)).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a comma-separated choice of " + ", ".join(s.name for s in STUDIES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("out/paper"))
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    a = parser.parse_args()
    chosen = a.only.split(",") if a.only else [s.name for s in STUDIES]
    if unknown := set(chosen) - {s.name for s in STUDIES}:
        parser.error(f"--only: no experiment is called {', '.join(sorted(unknown))}")
    todo = [
        (study.name, cell, seed, a.runs)
        for seed in range(a.seeds)  # every experiment has a first seed before any has a second
        for study in STUDIES
        if study.name in chosen
        for cell in study.cells
        if not path_of(study, cell, seed, a.runs).exists()
    ]
    from benchmarks.paper.__main__ import unit  # a spawned process finds nothing in a package's "__main__"

    failed = 0
    with ProcessPoolExecutor(a.jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(unit, *work) for work in todo]):
            try:
                print(done.result(), flush=True)
            except Exception:  # the others go on
                failed += 1
                traceback.print_exc()
    page(STUDIES, a.seeds, a.runs, a.out)
    print(f"Written to {a.out}")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    from benchmarks.paper.__main__ import main  # by its name: new processes do not import a package's __main__ anew

    main()
