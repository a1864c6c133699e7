"""Draws docs/index.png: the posterior of docs/start.md, exact, by a trained guide and by proposals from the prior.

python docs/picture.py
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

DOCS = Path(__file__).parent
SHOWN = 12


def main() -> None:
    names: dict = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", (DOCS / "start.md").read_text(), re.DOTALL)), names)
    exact, trained, prior = (dict(names[run].table("z", 0)) for run in ("exact", "trained", "posterior"))
    texts = list(exact)[:SHOWN]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    axes.barh(texts, [exact[t] for t in texts], color="#c9ced6", label="exact posterior")
    axes.plot([trained.get(t, 0.0) for t in texts], texts, "o", color="#1f77b4", label="500 particles, trained guide")
    axes.plot([prior.get(t, 0.0) for t in texts], texts, "x", color="#d62728", label="500 particles, prior proposals")
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("posterior probability of the middle sentence")
    axes.set_title("Tom went to the kitchen. [ ? ] He sliced it.", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(DOCS / "index.png", dpi=120)


if __name__ == "__main__":
    main()
