"""Every experiment of the paper on the embedded language models, compared with the exact optimum: docs/results.md.

    python -m benchmarks.paper --jobs 2 --seeds 5

Every unit of work (an experiment's cell and a seed) is one JSON file under --runs: the committed records, unless
another folder is named. The same command runs what is not there yet, and writes the page from what has run.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import diffusion, paper

from . import preferences, runner, thoughts, transfer
from .study import Told, markdown

RECORDS = Path(__file__).with_name("records")
PREAMBLE = """# Results

The paper's experiments (Hu et al. 2024) on the embedded language models, where the exact optimum is known.

{claims}
@BEYOND@
How to read this page:

- A number is a mean over {seeds} seeds, or over fewer if its section says so. The number in brackets after it is the
  standard deviation over seeds.
- An interval is given as ±. With few seeds it is wide, and a claim may be "not seen" for this reason alone.
- Each section says what was asked, the setting and what each column means. Then come tables and verdicts: a claim, and
  whether it was seen.
- TV, total variation, is half of the summed absolute differences of two distributions: 0 if they are equal, 1 if they
  share no text.

Written by `make paper` in {hours:.1f} core-hours. Results on a pretrained language model and the paper's data:
[results-pretrained.md](results-pretrained.md).

"""
BEYOND = (  # page, question, result; the figures are those of the page, by name if its study tells them
    (
        "uncertainty",
        "does a model that reasons know when it does not know?",
        "AUROC of its errors 0.81 by all chains of five adapters, 0.70 by their direct answers (10 labels, five seeds: "
        "+0.11 ± 0.21). Every part of the entropy finds errors equally well",
    ),
    ("diffusion", "can a masked language model be a sample site?", diffusion.FOUND),
    ("preferences", "can texts be drawn for people who disagree?", preferences.FOUND),
    ("transfer", "can one guide serve many posteriors, and can guides be combined?", transfer.FOUND),
    ("thoughts", "are trees of thoughts better than chains?", thoughts.FOUND),
)


def beyond() -> str:
    """A table of the pages on questions that the paper leaves open.

    Figures of studies of this package are still names, which `runner.page` replaces.
    """
    results = runner.section(diffusion.STUDY, runner.kept_of(diffusion.STUDY, 3, diffusion.RECORDS), 3)[1]
    told = diffusion.told(results)
    found = {name: text.format_map(Told(told)) if name == "diffusion" else text for name, _, text in BEYOND}
    rows = [(f"[{name}.md]({name}.md)", asked, found[name]) for name, asked, _ in BEYOND]
    return markdown(("beyond the paper", "question", "result"), rows)


def main() -> None:
    parser = runner.options(__doc__, paper.STUDIES, seeds=5, jobs=2, runs=str(RECORDS), out="docs/results.md")
    a = parser.parse_args()
    runner.run("benchmarks.paper", PREAMBLE.replace("@BEYOND@", beyond()), a, runner.chosen(parser, a, paper.STUDIES))


if __name__ == "__main__":
    main()
