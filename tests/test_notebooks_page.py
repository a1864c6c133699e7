"""The programs of docs/notebooks.md run as they are written, in a notebook too: it gets HTML, pictures and bars."""

from __future__ import annotations

import re

import matplotlib
import pytest
from html_tables import Page
from paths import ROOT

PAGE = ROOT / "docs" / "notebooks.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page_of_notebooks_runs(capsys):
    from matplotlib import pyplot

    matplotlib.use("agg")
    names: dict = {"__name__": "page"}
    exec(compile("\n".join(BLOCKS), str(PAGE), "exec"), names)
    assert pyplot.get_fignums() and names["smc"].ancestry
    pyplot.close("all")
    said, posterior = capsys.readouterr().out, names["posterior"]
    best = max((p, i, s) for i in (0, 1) for s, p in posterior.table("z", i))
    assert f"p(long) = {float(names['mean']):.2f} ± " in said and best[2] in said
    assert f"{best[0]:.6f}" in said  # pandas' first row
    assert "one_hot(z)[" in said


@pytest.mark.slow
def test_a_notebook_shows_html_pictures_and_progress(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    train = """
import torch
from peft import LoraConfig
from lmppl.inference import AutoGuide, GFlowNet

q = lm.with_adapter(LoraConfig(r=2, target_modules="all-linear"))


def guide(x, y):
    with pyro.plate("stories", len(x)):
        pyro.sample("z", Completion(q, x, max_tokens=7, stop="."))


gflownet = GFlowNet(model, guide, optimizer=torch.optim.AdamW(q.trainable_parameters(), lr=1e-3))
found = gflownet.fit([(x, y)], steps=3)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(block) for block in [*BLOCKS[:3], train]])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=300).execute()
    shown, _, pictures, training = [cell.outputs for cell in notebook.cells]
    html = next(o.data["text/html"] for o in shown if "text/html" in o.get("data", {}))
    assert "Posterior(z: 512 particles, stories 2)" in Page(html).shown
    assert sum("image/png" in o.get("data", {}) for o in pictures) == 2
    assert any("3/3" in str(o.get("text", "")) + str(o.get("data", "")) for o in training), training
