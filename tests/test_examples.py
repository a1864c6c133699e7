"""Every example runs, and the README shows the quickstart as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES, PRETRAINED = (sorted((ROOT / "examples").glob(p)) for p in ("*.py", "pretrained/*.py"))


def run(path: Path, *args: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path), *args]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs(path):
    printed = run(path)
    if path.stem == "quickstart":
        ess = [int(line.split("ESS ")[1].split()[0]) for line in printed.splitlines() if "ESS" in line]
        prior, trained = ess  # of 512: what training is for
        assert trained > 5 * prior


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
