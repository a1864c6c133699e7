"""The paper's experiments on a pretrained language model and the paper's data: docs/results-pretrained.md.

    python -m benchmarks.paper_pretrained --lm "$(python -m lmppl.pretrained smollm2)" --data ../shared/data

Every unit of work (a study's cell and a seed) is one JSON file under --runs. By default these are the committed
records, from which the page is made. The same command runs the units that have no file yet. The cost of a study is in
its file.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import paper_pretrained
from benchmarks.paper import runner

from . import Place

RECORDS = Path(__file__).with_name("records")
PREAMBLE = """# Results on a pretrained language model

The paper's experiments (Hu et al. 2024) on SmolLM2-135M-Instruct and the paper's own data.

{headline}
{claims}
How to read this page, and how far the figures can be trusted:

- Each section says what was asked, the setting and what each column means. Then come tables and verdicts: a claim, and
  whether it was seen.
- Figures are means over at most {seeds} seeds; each section says how many have run. A single number in brackets is the
  standard deviation over seeds.
- ± and ranges are 95% intervals over the test sentences, prompts or questions of these runs. They do not include the
  differences between trainings.
- The paper's models are larger, and other ones.
- Prompts and recipes were chosen on training data and on seeds from 100 on, before a test sentence was read and before
  the seeds of this page ran. The exception is longer EM, which was planned after the other figures had been read.
- The distance log Z - ELBO takes the largest estimate of log Z of all methods. It took each method's own estimate until
  the first figures of GRPO were read: all draws of a policy with one text agree, so that its own distance was 0.

Written by `make paper-pretrained` in {hours:.1f} core-hours. Results on small language models, where the exact optimum
is known: [results.md](results.md).

"""


def main() -> None:
    studies = paper_pretrained.STUDIES
    out = "docs/results-pretrained.md"
    parser = runner.options(__doc__, studies, seeds=3, jobs=1, runs=str(RECORDS), out=out)
    parser.add_argument("--lm", type=Path, required=True, help="a Hugging Face checkpoint")
    parser.add_argument("--data", type=Path, help="a folder with subj/, prompts/, arithmetic/; some studies need none")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    a = parser.parse_args()
    chosen = runner.chosen(parser, a, studies)
    if not (a.lm / "config.json").is_file():
        parser.error(f"--lm: there is no checkpoint at {a.lm}; `make smollm2` prints where one is")
    for study in chosen:
        for name in study.needs:
            if a.data is None or not (a.data / name).is_file():
                parser.error(f"--data: {study.name} needs {name} below it, got {a.data}; --only leaves it out")
    runner.run("benchmarks.paper_pretrained", PREAMBLE, a, chosen, (Place(a.lm, a.data, a.device),))


if __name__ == "__main__":
    main()
