"""Does a model know when it does not know: docs/uncertainty.md.

    python -m benchmarks.uncertainty --seeds 5

Every unit of work (a cell and a seed) is one JSON file under --runs; the same command goes on where an interrupted one
was.
"""

from __future__ import annotations

from benchmarks import uncertainty
from benchmarks.paper import runner

PREAMBLE = """
"""


def main() -> None:
    studies = uncertainty.STUDIES
    parser = runner.options(__doc__, studies, seeds=5, jobs=1, runs="out/uncertainty", out="docs/uncertainty.md")
    a = parser.parse_args()
    runner.run("benchmarks.uncertainty", PREAMBLE, a, runner.chosen(parser, a, studies))


if __name__ == "__main__":
    main()
