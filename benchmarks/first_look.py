"""The picture at the top of the README: posteriors of one story by the quickstart's samplers, and the exact one.

    python -m benchmarks.first_look        # writes docs/first-look.png; half a minute on one core

The program is `examples/quickstart.py`.  Its two posteriors have 512 particles each; the exact one is enumerated.
"""

from __future__ import annotations

import contextlib
import io
import runpy
from pathlib import Path
from typing import Any

import torch

from lmppl.inference import Enumeration, Posterior

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 12
TITLE = "Tom went to the kitchen.  ___  He sliced it."


def run(seed: int = 0) -> dict[str, Posterior]:
    """The quickstart's posteriors and the exact one, by their names in the picture."""
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        program: dict[str, Any] = runpy.run_path(str(ROOT / "examples" / "quickstart.py"))
    return {
        "exact": Enumeration(program["model"]).run(program["x"], program["y"]),
        "trained guide, 512 draws": program["amortised"],
        "prior proposals, 512 draws": program["prior"],
    }


def draw(posteriors: dict[str, Posterior], path: Path) -> None:
    """The most probable middles of the exact posterior, and what each sampler says of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = {name: dict(p.table("z", 0)) for name, p in posteriors.items()}
    texts = list(tables["exact"])[:SHOWN][::-1]
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    height, colours = 0.27, ("#4d4d4d", "#1b7837", "#d6604d")
    for k, (name, table) in enumerate(tables.items()):
        ess = "" if name == "exact" else f", ESS {posteriors[name].ess.item():.0f}"
        places = [i + (1 - k) * height for i in range(len(texts))]
        axes.barh(places, [table.get(t, 0.0) for t in texts], height, label=name + ess, color=colours[k])
    axes.set_yticks(range(len(texts)), [t.strip() for t in texts])
    axes.set_xlabel("posterior probability of the missing sentence")
    axes.set_title(TITLE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    posteriors = run()
    draw(posteriors, ROOT / "docs" / "first-look.png")
    for name, posterior in posteriors.items():
        print(f"{name}: log evidence {posterior.log_evidence.item():.2f}")


if __name__ == "__main__":
    main()
