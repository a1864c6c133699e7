"""The program of docs/training.md runs as it is written."""

from __future__ import annotations

import re

import pytest
from paths import ROOT

PAGE = ROOT / "docs" / "training.md"
LOOKS = re.compile(r"\b(\d+)(, held_out=\(x, y\), evaluate_every=)(\d+)\b")


def shortened(program: str) -> str:
    """As many looks of what is held out, or half of them, two steps apart."""
    looks = {"20": "6", "5": "8"}  # by how far they are apart
    program, found = LOOKS.subn(lambda m: f"{looks[m[3]]}{m[2]}2", program)
    assert found == 2
    return program


@pytest.mark.parametrize("read", [shortened, pytest.param(str, id="as it is", marks=pytest.mark.slow)])
def test_the_page_of_training_runs(read, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 9
    exec(compile(read("\n".join(blocks)), str(PAGE), "exec"), {"__name__": "page"})
    assert "the best look after step" in capsys.readouterr().out
