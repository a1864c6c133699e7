"""Every example runs, the README shows the quickstart as it is, and what the pages say of extensions is so."""

from __future__ import annotations

import inspect
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
from forked import forked
from paths import ROOT

from lmppl.testing import TextContract

EXAMPLES, PRETRAINED = (sorted((ROOT / "examples").glob(p)) for p in ("*.py", "pretrained/*.py"))
SLOW = {"local_and_global", "own_objective", "quickstart"}


def programs(page: Path) -> dict[str, str]:
    """The code of each section of a page that has any."""
    sections = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]
    code = {s.splitlines()[0]: "\n".join(re.findall(r"^```python\n(.*?)^```", s, re.DOTALL | re.M)) for s in sections}
    return {title: program for title, program in code.items() if program}


EXTENSIONS = programs(ROOT / "docs" / "extending.md")
del EXTENSIONS["An objective"]  # it is examples/own_objective.py


def run(path: Path, *args: str) -> str:
    (found,) = forked(partial(main, path, *args))
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


def main(path: Path, *args: str) -> None:
    sys.argv[:] = [str(path), *args]
    runpy.run_path(str(path), run_name="__main__")


def of_the_quickstart(printed: str) -> None:
    ess = [int(line.split("ESS ")[1].split()[0]) for line in printed.splitlines() if "ESS" in line]
    prior, trained = ess  # of 512: what training is for
    assert trained > 5 * prior


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in EXAMPLES]
)
def test_an_example_runs(path):
    printed = run(path)
    if path.stem == "quickstart":
        of_the_quickstart(printed)


def test_the_quickstart_trains_in_fewer_steps(tmp_path):
    program = (ROOT / "examples" / "quickstart.py").read_text()
    assert program.count("steps=150") == 1
    (tmp_path / "shorter.py").write_text(program.replace("steps=150", "steps=60"))
    of_the_quickstart(run(tmp_path / "shorter.py"))


@pytest.mark.pretrained
@pytest.mark.parametrize("path", PRETRAINED, ids=lambda p: p.stem)
def test_an_example_on_a_pretrained_model_runs(path, smollm2):
    assert "log p(y | x)" in run(path, str(smollm2))


def test_the_readme_shows_the_quickstart():
    readme = (ROOT / "README.md").read_text()
    assert f"```python\n{(ROOT / 'examples' / 'quickstart.py').read_text()}```" in readme


def test_the_page_on_extending_shows_the_example():
    page = (ROOT / "docs" / "extending.md").read_text()
    assert f"```python\n{(ROOT / 'examples' / 'own_objective.py').read_text()}```" in page


@pytest.mark.parametrize("title", EXTENSIONS)
def test_a_section_on_extensions_runs(title):
    """Its assertions hold, and so does the contract of a text distribution."""
    program = EXTENSIONS[title]
    assert len([line for line in program.splitlines() if line]) <= 40
    names: dict = {"__name__": "extending"}
    exec(compile(program, f"docs/extending.md: {title}", "exec"), names)
    classes = [c for c in names.values() if inspect.isclass(c)]
    contracts = [c for c in classes if issubclass(c, TextContract) and c is not TextContract]
    for contract in contracts:
        for name, test in inspect.getmembers(contract(), inspect.ismethod):
            if name.startswith("test_"):
                test(contract().distribution())
    assert bool(contracts) == ("TextContract" in program)
