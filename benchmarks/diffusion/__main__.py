"""Infilling by unmasking beside the exact posterior of texts: docs/diffusion.md.

    python -m benchmarks.diffusion

Every unit of work (a cell and a seed) is one JSON file under --runs: the committed records, from which the page is
made, unless another folder is named. The same command runs what is not there yet.
"""

from __future__ import annotations

from benchmarks import diffusion
from benchmarks.paper import runner

PREAMBLE = ""


def main() -> None:
    studies = diffusion.STUDIES
    parser = runner.options(__doc__, studies, seeds=3, jobs=1, runs=str(diffusion.RECORDS), out="docs/diffusion.md")
    a = parser.parse_args()
    runner.run("benchmarks.diffusion", PREAMBLE, a, runner.chosen(parser, a, studies))


if __name__ == "__main__":
    main()
