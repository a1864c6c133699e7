"""Which settings train a guide of a pretrained network best? Successive halving at equal time, on validation prompts.

    python -m benchmarks.pretrained_recipes --lm "$(python -m lmppl.pretrained smollm2)" --minutes 10

Every candidate (learning rate, rank, observations x particles, upper layers, objective) trains a guide of each
experiment for the same number of processor minutes. The better half trains again from scratch for twice as long, and
so on. Candidates are compared by the geometric mean over experiments of sd(u) on validation observations (0 at the
posterior). The learning rate rises during a tenth of the time and then falls linearly to zero, however long a step
takes; the time of validation is not counted. Every run is one file under --runs, so that the same command continues
an interrupted one. The winner goes to `lmppl.models.PRETRAINED`. DATA is a folder with prompts.txt and stories.txt;
without --data, prompts and stories are those of the embedded story language model.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from lmppl import LanguageModel, embedded
from lmppl.files import write
from lmppl.inference import Objective, PooledVarGrad, StopTraining, SubTB, VarGrad
from lmppl.models import EXPERIMENTS, Experiment, Recipe
from lmppl.pretrained import SMOLLM2

EMBEDDED = "embedded"  # in place of a checkpoint: to try this program
WARMUP = 0.1  # of the time
FILES = {"continuation": "prompts.txt", "infilling": "stories.txt"}
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "VarGrad": VarGrad,
    "pooled stop, 3": lambda: PooledVarGrad(prefixes=3),
    "SubTB(1), 3": lambda: SubTB(prefixes=3),
}
FIGURES = "sd(u) | log Z | ESS/N"
ON_POLICY = ", on-policy"  # after the name of an objective: every draw is the guide's


@dataclass(frozen=True)
class Candidate:
    """Settings to try; the first ones are what the others differ from."""

    rate: float = 2e-4
    rank: int = 16
    observations: int = 2
    particles: int = 8
    upper: float | None = None  # share of the layers
    objective: str = "VarGrad"

    @property
    def name(self) -> str:
        upper = "all layers" if self.upper is None else f"upper {self.upper:g}"
        size = f"{self.observations} x {self.particles}"
        return f"{self.rate:g}, r {self.rank}, {size}, {upper}, {self.objective}"

    @classmethod
    def of(cls, name: str) -> Candidate:
        """The candidate of a name."""
        rate, rank, size, upper, objective = name.split(", ", 4)
        observations, particles = size.split(" x ")
        share = None if upper == "all layers" else float(upper.removeprefix("upper "))
        return cls(float(rate), int(rank.removeprefix("r ")), int(observations), int(particles), share, objective)

    def recipe(self) -> Recipe:
        """For an experiment."""
        adapter = {"r": self.rank, "lora_alpha": 2 * self.rank, "target_modules": "all-linear"}
        return Recipe(
            observations=self.observations, particles=self.particles, learning_rate=self.rate, adapter=adapter,
            upper_layers=self.upper, objective=OBJECTIVES[self.objective.removesuffix(ON_POLICY)],
        )  # fmt: skip


FIRST = Candidate()
CANDIDATES = [
    *(replace(FIRST, rate=rate) for rate in (5e-5, 2e-4, 5e-4, 1e-3)),
    *(replace(FIRST, rank=rank) for rank in (4, 64)),
    *(replace(FIRST, observations=m, particles=n) for m, n in ((2, 4), (4, 4), (4, 8), (2, 16))),
    *(replace(FIRST, upper=upper) for upper in (0.5, 0.25)),
    *(replace(FIRST, upper=0.5, rate=rate) for rate in (5e-4, 1e-3)),
    *(replace(FIRST, objective=name) for name in ("VarGrad" + ON_POLICY, "pooled stop, 3")),
]


def make(name: str, lm: str, data: Path | None, candidate: Candidate, seed: int) -> Experiment:
    """An experiment on the language model, with the candidate's settings."""
    options: dict[str, Any] = {"recipe": candidate.recipe(), "seed": seed}
    if lm == EMBEDDED:
        return EXPERIMENTS[name](**options)
    network = LanguageModel.from_pretrained(lm)
    with tempfile.TemporaryDirectory() as scratch:
        return EXPERIMENTS[name](network, _data(name, data, Path(scratch)), **options)


def _data(name: str, data: Path | None, scratch: Path) -> Path:
    """The observations' file, of one's own or of the embedded stories."""
    if data is not None:
        return data / FILES[name]
    told = embedded.data("stories", "train")
    lines = [s.x for s in told] if name == "continuation" else [s.x + s.z + s.y for s in told]
    path = scratch / FILES[name]
    path.write_text("\n".join(dict.fromkeys(lines)) + "\n")
    return path


def rate_at(share: float) -> float:
    """Of the learning rate, after a share of the time.

    >>> [round(rate_at(t), 2) for t in (0.0, 0.05, 0.1, 0.55, 1.0, 1.2)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    return max(0.0, min(share / WARMUP, (1 - share) / (1 - WARMUP)))


def train(
    experiment: Experiment, candidate: Candidate, seconds: float, seed: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Train the guide for so many seconds of the clock: how many steps and tokens that were."""
    trainer = experiment.gflownet()
    if candidate.objective.endswith(ON_POLICY):
        trainer.objective.exploration = None
    began = clock()

    def share() -> float:
        return (clock() - began) / seconds

    def over(step: int, metrics: dict[str, Any]) -> None:
        if share() >= 1:
            raise StopTraining

    # It is asked before the first step, whose rate is not to be zero, and after each.
    scheduler = LambdaLR(trainer.optimizer, lambda step: rate_at(max(share(), WARMUP / 10)))
    history = trainer.fit(experiment.batches, 1_000_000, seed=seed, scheduler=scheduler, callback=over, progress=False)
    return {"steps": len(history), "tokens": trainer.training_tokens, "seconds": clock() - began}


def judge(experiment: Experiment, validation: int, draws: int) -> dict[str, float]:
    """The guide on some of the validation observations; all candidates draw from one seed."""
    torch.manual_seed(0)
    some = [x[:validation] for x in experiment.held_out]
    found = experiment.gflownet().evaluate(*some, num_particles=draws)
    return {name.removeprefix("held_out_"): value for name, value in found.items()}


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    lm: str
    data: Path | None
    experiments: tuple[str, ...]
    minutes: float  # of a candidate in the first rung, for each experiment
    validation: int
    draws: int
    seed: int
    runs: Path


def run(setting: Setting, rung: int, name: str, candidate: Candidate) -> dict[str, Any]:
    """One candidate on one experiment in one rung, unless that is there already."""
    minutes = setting.minutes * 2**rung
    path = setting.runs / Path(setting.lm).name / f"{name}, {minutes:g} minutes, {candidate.name}.json"
    if not path.exists():
        import transformers

        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        experiment = make(name, setting.lm, setting.data, candidate, setting.seed)
        figures = train(experiment, candidate, 60 * minutes, setting.seed, time.process_time)
        figures |= judge(experiment, setting.validation, setting.draws)
        kept = {k: v if math.isfinite(v) else None for k, v in figures.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps({"experiment": name, "minutes": minutes, "candidate": candidate.name} | kept).encode())
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def score(runs: Sequence[dict[str, Any]]) -> float:
    """The geometric mean of sd(u) over experiments; infinite where one has none."""
    if any(r["sd_u"] is None for r in runs):
        return math.inf
    return math.exp(sum(math.log(max(r["sd_u"], 1e-9)) for r in runs) / len(runs))


def halve(
    candidates: Sequence[Candidate], rungs: int, runs: Callable[[int, Sequence[Candidate]], dict[str, list[dict]]]
) -> list[list[tuple[Candidate, list[dict[str, Any]]]]]:
    """The rungs' candidates with their runs, the best first; each rung has the better half of the one before."""
    left, found = list(candidates), []
    for rung in range(rungs):
        of = runs(rung, left)
        ranked = sorted(left, key=lambda c: score(of[c.name]))
        found.append([(c, of[c.name]) for c in ranked])
        left = ranked[: math.ceil(len(ranked) / 2)]
        if len(ranked) == 1:
            break
    return found


def markdown(rungs: Sequence[Sequence[tuple[Candidate, list[dict[str, Any]]]]], setting: Setting) -> str:
    """A table a rung."""
    lines = []
    for i, ranked in enumerate(rungs):
        lines += [
            f"**Rung {i + 1}: {setting.minutes * 2**i:g} processor minutes for each experiment**", "",
            "| settings | " + " | ".join(f"{name}: steps | {FIGURES}" for name in setting.experiments) + " |",
            "|---|" + "---:|" * 4 * len(setting.experiments),
        ]  # fmt: skip
        for candidate, runs in ranked:
            cells = [f"{r['steps']:,} | {_shown(r['sd_u'])} | {_shown(r['log_z'])} | {_shown(r['ess'])}" for r in runs]
            lines.append(f"| {candidate.name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", default=str(SMOLLM2.default_directory), help=f"a checkpoint, or {EMBEDDED!r}")
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--experiments", default="continuation,infilling")
    parser.add_argument("--minutes", type=float, default=10.0, help="of a candidate in the first rung, an experiment")
    parser.add_argument("--rungs", type=int, default=4)
    parser.add_argument("--candidate", action="append", help=f"instead of all of them, as {FIRST.name!r}; repeat it")
    parser.add_argument("--validation", type=int, default=8, help="observations to judge on")
    parser.add_argument("--draws", type=int, default=32, help="of the guide, for each of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("out/pretrained_recipes"))
    a = parser.parse_args(arguments)
    names = tuple(name.strip() for name in a.experiments.split(","))
    setting = Setting(a.lm, a.data, names, a.minutes, a.validation, a.draws, a.seed, a.runs)
    candidates = [Candidate.of(name) for name in a.candidate] if a.candidate else CANDIDATES
    with ProcessPoolExecutor(a.jobs, mp_context=get_context("spawn")) as pool:

        def runs(rung: int, left: Sequence[Candidate]) -> dict[str, list[dict[str, Any]]]:
            begun = {c.name: [pool.submit(run, setting, rung, name, c) for name in names] for c in left}
            return {name: [one.result() for one in of] for name, of in begun.items()}

        print(markdown(halve(candidates, a.rungs, runs), setting))


if __name__ == "__main__":
    main()
