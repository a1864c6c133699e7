"""Every example runs, and the README shows the quickstart as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs(path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    if path.stem == "quickstart":
        ess = [int(line.split("ESS ")[1].split()[0]) for line in run.stdout.splitlines() if "ESS" in line]
        prior, trained = ess  # of 512: what training is for
        assert trained > 5 * prior


def test_the_readme_shows_the_quickstart():
    readme = (ROOT / "README.md").read_text()
    assert f"```python\n{(ROOT / 'examples' / 'quickstart.py').read_text()}```" in readme
