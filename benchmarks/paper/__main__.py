"""Every experiment of the paper on the embedded language models, beside the exact optimum: docs/results.md.

    python -m benchmarks.paper --jobs 2 --seeds 5

Every unit of work (an experiment's cell and a seed) is one JSON file under --runs; the same command goes on where an
interrupted one was. The page is written from the seeds that all cells of an experiment have.
"""

from __future__ import annotations

from benchmarks import paper

from . import runner

PREAMBLE = """# Results

The paper's experiments (Hu et al. 2024) on the embedded language models, where the exact optimum is known. Written by
`make paper`; figures are means over {seeds} seeds with their standard deviation in brackets, or over fewer where a
section says that it is not complete: intervals are then wide, and a claim that rests on one may read "not seen" for
want of seeds. All of it took {hours:.1f} core-hours. On a pretrained language model and the paper's data:
[results-pretrained.md](results-pretrained.md). Beyond the paper, whether a model that reasons knows when it does not
know: [uncertainty.md](uncertainty.md).

"""


def main() -> None:
    parser = runner.options(__doc__, paper.STUDIES, seeds=5, jobs=2, runs="out/paper", out="docs/results.md")
    a = parser.parse_args()
    runner.run("benchmarks.paper", PREAMBLE, a, runner.chosen(parser, a, paper.STUDIES))


if __name__ == "__main__":
    main()
