"""The tutorials' notebooks show what their sources say, and executing the sources anew raises nothing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from paths import ROOT

from lmppl.pretrained import SMOLLM2

SCRIPT = ROOT / "docs" / "execute.py"
PRETRAINED = {"reasoning"}
specification = importlib.util.spec_from_file_location("execute", SCRIPT)
execute = importlib.util.module_from_spec(specification)
specification.loader.exec_module(execute)
NAMES = execute.names()


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def run(*arguments: object, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_source_gave(name):
    notebook = read(execute.TUTORIALS / f"{name}.ipynb")
    assert execute.cells(notebook) == execute.cells(execute.source(name)), f'make tutorials TUTORIALS="{name}"'
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def test_every_notebook_has_a_source():
    assert sorted(path.stem for path in execute.TUTORIALS.glob("*.ipynb")) == NAMES


@pytest.mark.slow
def test_execution_writes_outputs_and_nothing_after_an_error(tmp_path):
    script, folder = tmp_path / "docs" / "execute.py", tmp_path / "docs" / "tutorials"
    folder.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    good = ["# %% [markdown]", "# Numbers", "", "# %%", "import os, sys", "print(os.listdir())"]
    good += ["print('a warning', file=sys.stderr)", "os.environ['OMP_NUM_THREADS']", ""]
    (folder / "good.py").write_text("\n".join(good))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    found = run(script=script, TMPDIR=str(temporary))
    assert not list(temporary.iterdir())  # no connection file, which has the kernel's key
    assert found.returncode == 0
    assert "good ..." in found.stdout and "a warning" in found.stderr
    written = (folder / "good.ipynb").read_bytes()
    _, cell = read(folder / "good.ipynb").cells
    assert [output.get("text", output.get("data")) for output in cell.outputs] == ["[]\n", {"text/plain": "'1'"}]
    assert run(script=script).stdout == ""  # nothing is left to do
    run("good", script=script)
    assert (folder / "good.ipynb").read_bytes() == written
    (folder / "good.py").write_text("\n".join(good).replace("# Numbers", "# Figures"))
    assert run(script=script).stdout == "good: prose alone\n"
    assert (folder / "good.ipynb").read_bytes() == written.replace(b"Numbers", b"Figures") != written
    written = (folder / "good.ipynb").read_bytes()
    (folder / "good.py").write_text("# %%\nprint(1)\n\n# %%\n1 / 0\n")
    found = run(script=script)
    assert found.returncode == 1
    assert "ZeroDivisionError" in found.stderr
    assert (folder / "good.ipynb").read_bytes() == written
    assert sorted(path.name for path in folder.iterdir()) == ["good.ipynb", "good.py"]


def test_a_name_that_is_no_tutorial_is_refused():
    found = run("none_of_them")
    assert found.returncode == 2
    assert "none_of_them" in found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in PRETRAINED])
def test_a_tutorial_executes(name, tmp_path):
    found = run("--out", tmp_path, name)
    assert found.returncode == 0, found.stderr[-3000:]
    assert read(tmp_path / f"{name}.ipynb").cells


@pytest.mark.pretrained
@pytest.mark.parametrize("name", [name for name in NAMES if name in PRETRAINED])
def test_a_tutorial_on_a_pretrained_model_executes(name, tmp_path, smollm2):
    if smollm2.name != SMOLLM2.name:
        pytest.skip(f"tutorials look for {SMOLLM2.name} where `lmppl.pretrained.smollm2()` puts it, not at {smollm2}")
    found = run("--out", tmp_path, name, LMPPL_CACHE=str(smollm2.parent))
    assert found.returncode == 0, found.stderr[-3000:]
    assert read(tmp_path / f"{name}.ipynb").cells
