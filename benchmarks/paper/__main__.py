"""Every experiment of the paper on the embedded language models, beside the exact optimum: docs/results.md.

    python -m benchmarks.paper --jobs 2 --seeds 5

Every unit of work (an experiment's cell and a seed) is one JSON file under --runs; the same command goes on where an
interrupted one was. The page is written from the seeds that all cells of an experiment have.
"""

from __future__ import annotations

from benchmarks import diffusion, paper

from . import runner
from .study import Told, markdown

PREAMBLE = """# Results

The paper's experiments (Hu et al. 2024) on the embedded language models, where the exact optimum is known.

{claims}
@BEYOND@
Written by `make paper`. Figures are means over {seeds} seeds with their standard deviation in brackets, or over fewer
if a section says that it is not complete; intervals are then wide, and a claim that rests on one may read "not seen"
because there are too few seeds. All of it took {hours:.1f} core-hours. Results on a pretrained language model and the
paper's data: [results-pretrained.md](results-pretrained.md).

"""
BEYOND = (  # page, question, what came out: figures of these pages, by name where the page's study tells them
    (
        "uncertainty",
        "does a model that reasons know when it does not know?",
        "AUROC of its errors 0.81 by all chains of five adapters, 0.70 by their direct answers (10 labels, five seeds: "
        "+0.11 ± 0.21); the parts of the entropy find the same errors",
    ),
    (
        "diffusion",
        "can a masked language model be a sample site?",
        diffusion.FOUND,
    ),
    (
        "preferences",
        "can texts be drawn for people who disagree?",
        "yes, each in their share: TV to the exact mixture 0.010; the one utility that all choices are most probable "
        "under is at 0.383, its nearest power at 0.194, with half or less of the minority's texts (three seeds)",
    ),
    (
        "transfer",
        "can one guide serve many posteriors, and can guides be put together?",
        "TV 0.006 to 0.10 on four families, 0.93 on words it never met; on a fifth, two observations at once, 0.191 "
        "by its description, 0.037 as a product of the guide's answers to each over the prior, untrained (three seeds)",
    ),
    (
        "thoughts",
        "what does a tree of thoughts buy beside a chain?",
        "a start: votes right in 0.36 against 0.18 with 100 tokens a question, level with 300; with 1,000 SMC over "
        "chains is closer to the posterior, error 0.10 against 0.15; unweighted trees are no posterior (three seeds)",
    ),
)


def beyond() -> str:
    """A row for each page on what the paper leaves open."""
    results = runner.section(diffusion.STUDY, runner.kept_of(diffusion.STUDY, 3, diffusion.RECORDS), 3)[1]
    told = Told(diffusion.told(results))
    rows = [(f"[{name}.md]({name}.md)", asked, found.format_map(told)) for name, asked, found in BEYOND]
    return markdown(("beyond the paper", "question", "result"), rows)


def main() -> None:
    parser = runner.options(__doc__, paper.STUDIES, seeds=5, jobs=2, runs="out/paper", out="docs/results.md")
    a = parser.parse_args()
    runner.run("benchmarks.paper", PREAMBLE.replace("@BEYOND@", beyond()), a, runner.chosen(parser, a, paper.STUDIES))


if __name__ == "__main__":
    main()
