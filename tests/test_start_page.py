"""The program of docs/start.md runs as it is written, and prints what the page shows."""

from __future__ import annotations

import re

import pytest
from paths import ROOT

PAGE = ROOT / "docs" / "start.md"
STEP = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def numbers(printed: str) -> list[float]:
    return [float(found) for found in NUMBER.findall(printed)]


def test_the_start_page_prints_what_it_shows(capsys):
    """Word for word; numbers to 10%, because another processor rounds otherwise."""
    names: dict = {"__name__": "page"}
    steps = STEP.findall(PAGE.read_text())
    assert len(steps) == 7 and sum(bool(shown) for _, shown in steps) == 6
    for program, shown in steps:
        exec(compile(program, str(PAGE), "exec"), names)
        printed = capsys.readouterr().out
        if shown:
            printed = "".join(printed.splitlines(keepends=True)[-len(shown.splitlines()) :])  # without a progress bar
            assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
            assert numbers(printed) == pytest.approx(numbers(shown), rel=0.1, abs=0.01)
