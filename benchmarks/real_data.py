"""Every model on a language model and data of your own: does it run, and does training bring the guide closer?

    python -m benchmarks.real_data --lm LM --data DATA --steps 20 --out docs/real_data.md

On a large language model, with smaller numbers: ``--observations 2 --particles 8 --test 4 --draws 8``.

LM is a Hugging Face checkpoint. DATA is a folder with prompts/prompts.txt (one prompt per line), subj/ (train.10.jsonl
and others) and arithmetic/ (the paper's files). Stories are sampled from the language model itself, three sentences
each. The posterior is not known here. A guide is judged by sd(u) on observations that it was not trained on (0 at the
posterior) and by ESS/N of importance samples from it, compared with the same figures of the prior. This is a smoke run:
short, with one seed, without a claim.
"""

from __future__ import annotations

import random
import re
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.files import write
from lmppl.inference import Importance
from lmppl.models import EXPERIMENTS, Experiment
from lmppl.models.data_files import read_lines

PROMPTS, STORIES, DRAWS = 64, 64, 32
LONGEST = 24  # tokens of a prompt
SHOWN = 60  # characters of a text
DEFAULTS = {"observations": 0, "particles": 0, "test": 16, "draws": DRAWS}
PAGE = """# On real data

Do the models run on a language model and data that the project did not make, and does training bring the guide closer
to the posterior?

`{command}`: a language model with {parameters:.1f} million
parameters, {steps} training steps for each model, one seed, {draws} draws for each of {test} unseen observations.
This is a smoke run and no evidence for a claim, because the posterior is not known.

- sd(u): standard deviation of the log weights on unseen observations, nats; 0 at the posterior; a dash if some draw has
  probability 0.
- ESS/N: effective sample size of importance samples as a share of N, mean over the observations that some draw
  explains.
- prior, before, after: proposals of the model's prior, of the guide before training and of the guide after it.
- seconds: processor seconds of everything in the row.
- a draw: a text of the trained guide.

{table}
"""


def stories(lm: LanguageModel) -> list[str]:
    """Stories of three sentences, sampled from the language model."""
    x = lm.encode(["Once upon a time"] * STORIES)
    for _ in range(3):
        x = lm.join(x, Completion(lm, x, max_tokens=20, min_tokens=3, stop=".").sample())
    told = [" ".join(s.split()) for s in lm.decode(x)]
    return [s for s in told if len(re.split(r"(?<=[.!?])\s+", s)) == 3]


def inputs(lm: LanguageModel, data: Path, folder: Path) -> dict[str, tuple[Path | None, dict[str, Any]]]:
    """The data and the options of each model; files are written to ``folder``."""
    lines = [line.strip() for _, line in read_lines(data / "prompts" / "prompts.txt")]
    short = [s for s in lines if lm.encode(s).shape[0] <= LONGEST][: 2 * PROMPTS]

    def file(name: str, content: list[str]) -> Path:
        path = folder / name
        path.write_text("\n".join(content) + "\n", encoding="utf-8")
        return path

    prompts = file("prompts.txt", short[:PROMPTS])
    told = file("stories.txt", stories(lm))
    pairs = file("pairs.txt", [f"{a}\t{b}" for a, b in zip(short[:PROMPTS], short[PROMPTS:], strict=True)])
    return {
        "continuation": (prompts, {"temperature": 0.8, "max_tokens": 12}),
        "contrastive": (pairs, {"max_tokens": 12}),
        "constrained": (prompts, {"words": "was, to", "max_tokens": 12}),
        "infilling": (told, {}),
        "reverse": (told, {}),
        "random_number": (None, {}),
        "subjectivity": (data / "subj", {}),
        "arithmetic": (data / "arithmetic", {}),
    }


@torch.no_grad()
def figures(e: Experiment, guide: Any, test: tuple[Any, ...], draws: int) -> tuple[float, float]:
    """sd(u) and ESS/N on the test observations, means over those that some draw explains."""
    found = Importance(e.model, guide, num_particles=draws).run(*test)
    explained = (found.log_weights > -torch.inf).any(0)
    spread = found.log_weights.std(0)
    sd = spread.mean().item() if bool(spread.isfinite().all()) else float("nan")
    share = (found.ess / draws)[explained]
    return sd, share.mean().item() if len(share) else 0.0


def row(
    name: str, lm: LanguageModel, data: Path | None, options: dict[str, Any], steps: int, size: dict[str, int]
) -> list[str]:
    """Train one model for ``steps`` and return its row of the table."""
    start, make = time.process_time(), partial(EXPERIMENTS[name], lm, data, seed=0, **options)
    e = make()
    smaller = {key: size[key] for key in ("observations", "particles") if size[key]}
    if smaller:
        e = make(recipe=replace(e.recipe, **smaller))
    test = tuple(x[: size["test"]] if isinstance(x, torch.Tensor) and x.dim() else x for x in e.test)
    torch.manual_seed(0)
    prior, before = figures(e, None, test, size["draws"]), figures(e, e.guide, test, size["draws"])
    e.gflownet().fit(e.batches, steps, seed=0, progress=False)
    after = figures(e, e.guide, test, size["draws"])
    drawn = Importance(e.model, e.guide, num_particles=size["draws"]).run(*test)
    text = lm.decode(drawn.samples[e.site][0].reshape(-1, drawn.samples[e.site].shape[-1])[0])
    text = " ".join(text.split()).replace("|", "/")[:SHOWN]
    sd = ["-" if s != s else f"{s:.2f}" for s, _ in (prior, before, after)]
    shares = [f"{share:.2f}" for _, share in (prior, before, after)]
    taken = f"{time.process_time() - start:.0f}"
    return [name, e.target.replace("|", "\\|"), *sd, *shares, taken, text]


def main(
    lm: Annotated[Path, typer.Option(help="A Hugging Face checkpoint.")],
    data: Annotated[Path, typer.Option(help="A folder with prompts/, subj/ and arithmetic/.")],
    out: Annotated[Path | None, typer.Option(help="Write the page here.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps of each model.")] = 20,
    observations: Annotated[int, typer.Option(help="Observations per step; 0: the recipe's.")] = 0,
    particles: Annotated[int, typer.Option(help="Particles per step; 0: the recipe's.")] = 0,
    test: Annotated[int, typer.Option(help="Unseen observations.")] = 16,
    draws: Annotated[int, typer.Option(help="Draws for each of them.")] = DRAWS,
    only: Annotated[str | None, typer.Option(help="A comma-separated choice of models.")] = None,
) -> None:
    """Run every model and print the table."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    head = [
        "model",
        "target",
        *(f"{f}, {w}" for f in ("sd(u)", "ESS/N") for w in ("prior", "before", "after")),
        "seconds",
        "a draw",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    torch.manual_seed(0)
    random.seed(0)
    size = {"observations": observations, "particles": particles, "test": test, "draws": draws}
    with tempfile.TemporaryDirectory() as folder:
        base = LanguageModel.from_pretrained(lm)
        parameters = sum(p.numel() for p in base.trainable_parameters()) / 1e6
        for name, (path, options) in inputs(base, data, Path(folder)).items():
            if only is None or name in only.split(","):
                # A fresh language model for each, because the adapters of the others would only take memory.
                cells = row(name, LanguageModel.from_pretrained(lm), path, options, steps, size)
                lines.append("| " + " | ".join(cells) + " |")
                print(lines[-1], flush=True)
    command = f"python -m benchmarks.real_data --lm LM --data DATA --steps {steps}"
    command += "".join(f" --{key} {value}" for key, value in size.items() if value != DEFAULTS[key])
    page = PAGE.format(
        command=command, parameters=parameters, steps=steps, draws=draws, test=test, table="\n".join(lines)
    )
    if out is not None:
        write(out, page.encode())


if __name__ == "__main__":
    typer.run(main)
