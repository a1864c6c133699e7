"""Executes the tutorials: ``tutorials/NAME.py``, in jupytext's percent format, becomes ``NAME.ipynb`` with outputs.

python docs/execute.py                  # those whose notebook has other code than the source; other prose is copied
python docs/execute.py NAME ...         # these
python docs/execute.py --out DIR NAME   # notebooks into another directory
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from lmppl import files

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
CELL_TIMEOUT = 1800  # seconds: of a busy machine
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


def names() -> list[str]:
    return sorted(path.stem for path in TUTORIALS.glob("*.py"))


def source(name: str) -> NotebookNode:
    """The notebook that a source describes, without outputs, and with metadata that only the source changes."""
    notebook = jupytext.reads((TUTORIALS / f"{name}.py").read_text(encoding="utf-8"), fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext's are random
        cell.metadata = nbformat.from_dict({"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {})
    return notebook


def cells(notebook: NotebookNode) -> list[tuple[str, str, dict]]:
    """What a notebook says, outputs apart."""
    return [(cell.cell_type, cell.source, dict(cell.metadata)) for cell in notebook.cells]


def is_current(name: str, directory: Path) -> bool:
    """Whether there is a notebook with the cells of the source."""
    path = directory / f"{name}.ipynb"
    return path.exists() and cells(nbformat.read(path, as_version=4)) == cells(source(name))


def retold(name: str, directory: Path) -> NotebookNode | None:
    """The source with the outputs that its notebook has; None where the notebook is of other code."""
    path = directory / f"{name}.ipynb"
    if not path.exists():
        return None
    notebook = source(name)
    new, old = ([c for c in n.cells if c.cell_type == "code"] for n in (notebook, nbformat.read(path, as_version=4)))
    if [cell.source for cell in new] != [cell.source for cell in old]:
        return None
    for cell, executed in zip(new, old, strict=True):
        cell.outputs, cell.execution_count = executed.outputs, executed.execution_count
    return notebook


def execute(name: str) -> NotebookNode:
    """Runs a source in a kernel of its own.

    The kernel is this interpreter with one thread, in an empty directory that is removed.

    :raises nbclient.exceptions.CellExecutionError: where a cell raises.
    """
    notebook = source(name)
    with tempfile.TemporaryDirectory() as folder:
        here, profile = Path(folder, "here"), Path(folder, "ipython")  # no history and no start-up files of the user
        here.mkdir()
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "IPYTHONDIR": str(profile),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        }
        # Without directories to look in, the one kernel known is that of this interpreter.
        kernel = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
            connection_file=str(Path(folder, "kernel.json")),  # its own would stay, with the key of the kernel
        )
        options = {"timeout": CELL_TIMEOUT, "record_timing": False, "extra_arguments": ["--log-level=ERROR"]}
        client = NotebookClient(notebook, km=kernel, **options)
        client.execute(cwd=str(here), env=environment)
    clean(notebook)
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    """Writes a notebook, whole or not at all."""
    nbformat.validate(notebook)
    files.write(path, (nbformat.writes(notebook) + "\n").encode())


def clean(notebook: NotebookNode) -> None:
    """Takes out what would differ in another execution: metadata, and what went to stderr, which is printed here."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for output in cell.outputs:
                if output.get("name") == "stderr":
                    print(output.text, end="", file=sys.stderr)
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Executes tutorials and writes their notebooks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="these, whether or not their notebooks are current")
    parser.add_argument("--out", type=Path, default=TUTORIALS, metavar="DIR", help="where the notebooks go")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(names())):
        parser.error(f"no tutorial is called {', '.join(unknown)}; there are {', '.join(names())}")
    for name in options.names or [n for n in names() if not is_current(n, options.out)]:
        path, start = options.out / f"{name}.ipynb", time.perf_counter()
        if name not in options.names and (notebook := retold(name, options.out)):
            write(notebook, path)
            print(f"{name}: prose alone", flush=True)
        else:
            print(f"{name} ...", flush=True)
            write(execute(name), path)
            print(f"{name}: {time.perf_counter() - start:.0f} seconds", flush=True)


if __name__ == "__main__":
    main()
