"""The program of docs/training.md runs as it is written."""

from __future__ import annotations

import re

from paths import ROOT

PAGE = ROOT / "docs" / "training.md"


def test_the_page_of_training_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 9
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "page"})
    assert "the best look after step" in capsys.readouterr().out
