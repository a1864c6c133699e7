"""Infilling by unmasking on the embedded stories: guides, samplers and bounds beside posteriors summed over all paths.

    python -m benchmarks.diffusion CELL [--seed 0] [--stories 8] [--steps 500] [--out out/diffusion]
    python -m benchmarks.diffusion report

A cell takes a minute or a few; it writes its figures to OUT/CELL-SEED.json, and `report` prints all that are there.

untrained       the masked language model itself: without the ending (prior) and with it behind the gap (native), each
                by importance sampling and by SMC over denoising steps
random, learned a guide trained by VarGrad, of that order
sleep           a guide of random order trained by maximum likelihood on as many stories that the model tells
causal          the guide of the experiment `infilling` after as many steps, beside its own enumerated posterior
bounds          log p of middles between its bounds, by the number of particles
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from benchmarks.paper.study import markdown
from lmppl import embedded, files
from lmppl.distributions import Unmasking
from lmppl.embedded.stories import middles
from lmppl.inference import (
    SMC,
    Importance,
    Query,
    Sandwich,
    SupervisedFineTuning,
    Trainer,
    dreams,
    simulate,
    weigh,
)
from lmppl.inference.core.programs import Program
from lmppl.inference.judging.quality import density_quality
from lmppl.models import Experiment, diffusion, infilling
from lmppl.models.diffusion import RECIPE, text_log_joint

CELLS = "untrained", "random", "learned", "sleep", "causal", "bounds"
DRAWS, RUNS, TOLD = 64, 8, 200


class Stories:
    """Test stories, their grammatical middles, and the exact posterior of these."""

    def __init__(self, experiment: Experiment, count: int):
        self.task: Any = experiment.model.__self__  # type: ignore[attr-defined]
        self.x, self.y = (v[:count] for v in experiment.test)
        told = embedded.data("stories", "test")[:count]
        self.middles = torch.stack([experiment.lm.encode(middles(s.x)) for s in told], 1)  # (K, B, 6)
        log_joint = text_log_joint(self.task, self.x, self.y, self.middles)
        self.log_z = log_joint.logsumexp(0)  # (B,)
        self.log_p = log_joint - self.log_z  # (K, B)

    def tv(self, log_q: Tensor) -> Tensor:
        """Total variation of texts, (B,); q's mass on other texts counts in full."""
        p, q = self.log_p.exp(), log_q.exp()
        return 0.5 * ((p - q).abs().sum(0) + (1 - q.sum(0)).clamp(min=0))


def tokens(experiment: Experiment) -> int:
    task: Any = experiment.model.__self__  # type: ignore[attr-defined]
    return int(experiment.lm.tokens_scored + task.reader.tokens_scored)


def weights(model: Program, guide: Program | None, args: tuple[Tensor, ...], log_z: Tensor) -> dict[str, float]:
    """sd(u), ESS/N and the error of log Z of draws of a guide, means over stories and runs."""
    found = []
    for run in range(RUNS):
        pyro.set_rng_seed(run)
        u = weigh(Query(model, guide, args), DRAWS).u  # (N, B)
        error = (u.logsumexp(0) - math.log(DRAWS) - log_z).abs()
        found.append(torch.stack([u.clamp(min=-50.0).std(0), 1 / (u.softmax(0) ** 2).sum(0) / DRAWS, error]))
    return dict(zip(("sd", "ess", "error"), torch.stack(found).mean((0, 2)).tolist(), strict=True))


def outside(stories: Stories, posterior: Any) -> float:
    """The share of weighted draws whose text is no grammatical middle."""
    d = stories.task.prior(stories.x)
    words = d.words(posterior.samples["z"])  # (N, B, 6)
    known = (words[:, None] == stories.middles).all(-1).any(1)
    return float((posterior.probabilities * ~known).sum(0).mean())


def judged(e: Experiment, stories: Stories, guide: Program | None) -> dict[str, float]:
    """A guide, None: the prior, beside the exact posterior of texts."""
    q = stories.task.prior(stories.x) if guide is None else stories.task.posterior(stories.x, stories.y)
    with torch.no_grad():
        tv = stories.tv(q.text_log_prob(stories.middles))
    return {"tv": float(tv.mean())} | weights(e.model, guide, (stories.x, stories.y), stories.log_z)


def untrained(seed: int, count: int, steps: int) -> dict[str, Any]:
    """The prior and the untrained guide, and SMC by each."""
    e = diffusion.experiment(seed=seed)
    stories = Stories(e, count)
    found: dict[str, Any] = {}
    for name, guide in (("prior", None), ("native", e.guide)):
        found[name] = judged(e, stories, guide)
        answers = []
        for run in range(RUNS):
            pyro.set_rng_seed(run)
            answers.append(SMC(e.model, guide, num_particles=DRAWS).run(stories.x, stories.y))
        errors = torch.stack([(a.log_evidence - stories.log_z).abs() for a in answers])
        found[f"{name}, SMC"] = {
            "error": float(errors.mean()),
            "ess": float(torch.stack([a.ess for a in answers]).mean()) / DRAWS,
        }
    pyro.set_rng_seed(seed)
    found["native"]["outside"] = outside(stories, Importance(e.model, e.guide, 1000).run(stories.x, stories.y))
    return found


def trained(cell: str, seed: int, count: int, steps: int) -> dict[str, float]:
    """A masked language model trained by VarGrad, or asleep: a step has as many draws."""
    asleep = cell == "sleep"
    recipe = replace(RECIPE, steps=steps, observations=RECIPE.observations * (RECIPE.particles if asleep else 1))
    e = diffusion.experiment(seed=seed, recipe=recipe, guide_order="learned" if cell == "learned" else "random")
    before, began = tokens(e), time.process_time()
    pyro.set_rng_seed(seed)
    if asleep:
        trainer: Trainer = SupervisedFineTuning(e.model, e.guide, optimizer=e.optimizer(), examples=dreams(e.model))
    else:
        trainer = e.gflownet()
    trainer.fit(e.batches, steps, seed=seed, progress=False)
    cost = {"tokens": tokens(e) - before, "seconds": time.process_time() - began}
    print(cell, cost, flush=True)
    return cost | judged(e, Stories(e, count), e.guide)


def causal(seed: int, count: int, steps: int) -> dict[str, float]:
    """The guide of the experiment `infilling` after as many steps."""
    e = infilling.experiment(seed=seed, recipe=replace(RECIPE, steps=steps))
    before, began = e.lm.tokens_scored, time.process_time()
    pyro.set_rng_seed(seed)
    e.gflownet().fit(e.batches, steps, seed=seed, progress=False)
    found = {"tokens": e.lm.tokens_scored - before, "seconds": time.process_time() - began}
    args = tuple(v[:count] for v in e.test)
    assert e.exact is not None
    exact = e.exact.run(*args)
    tv = density_quality(exact, e.guide, args, {}).total_variation
    return found | {"tv": float(tv.mean())} | weights(e.model, e.guide, args, exact.log_evidence)


def bounds(seed: int, count: int, steps: int) -> dict[str, float]:
    """log p(z | x) of middles that the masked language model wrote: their paths are exact samples of the order."""
    e = diffusion.experiment(seed=seed)
    task: Any = e.model.__self__  # type: ignore[attr-defined]
    x = e.test[0][:1].expand(TOLD, -1)

    def write() -> Tensor:
        with pyro.plate("stories", TOLD):
            return pyro.sample("z", task.prior(x))

    def writes(words: Tensor) -> None:
        with pyro.plate("stories", TOLD):
            d = task.prior(x)
            z = pyro.sample("z", d)
            pyro.factor("writes", torch.where((d.words(z) == words).all(-1), 0.0, -torch.inf))

    def order(words: Tensor) -> None:
        only = one_hot(words, task.lm.vocab_size).bool()
        with pyro.plate("stories", TOLD):
            pyro.sample("z", Unmasking(task.lm, x, allowed=only))

    pyro.set_rng_seed(seed)
    path = simulate(write).values["z"]
    words = task.prior(x).words(path)
    with torch.no_grad():
        exact = task.prior(x).text_log_prob(words)  # (TOLD,)
    found = {"exact": float(exact.mean()), "path": float(task.prior(x).log_prob(path).detach().mean())}
    for threshold in (0.0, 0.5):  # importance sampling, and resampling between steps
        for n in (1, 4, 16, 64):
            sandwich = Sandwich(writes, order, n, threshold).run(words, exact_sample={"z": path})
            for name, slack in (("below", exact - sandwich.lower), ("above", sandwich.upper - exact)):
                at = f"{name}, {n} particles, resampled below {threshold:g} N"
                found |= {at: float(slack.mean()), f"  its standard error, {at}": float(slack.std()) / TOLD**0.5}
    return found


def report(out: Path) -> str:
    """All figures that are there, in Markdown."""
    rows: dict[str, list[dict[str, float]]] = {}
    others = ""
    for file in sorted(out.glob("*.json")):
        cell, run = file.stem.split("-")[0], json.loads(file.read_text())
        if cell == "bounds":
            others += f"\n{file.stem}\n\n" + markdown(("figure", "nats"), [(k, f"{v:.4f}") for k, v in run.items()])
            continue
        for name, figures in run.items() if cell == "untrained" else [(cell, run)]:
            rows.setdefault(name, []).append(figures)
    columns = {"tv": 3, "sd": 3, "ess": 3, "error": 3, "outside": 4, "tokens": 0, "seconds": 0}

    def shown(runs: list[dict[str, float]], key: str) -> str:
        values = [r[key] for r in runs if key in r]
        return " ".join(f"{v:,.{columns[key]}f}" for v in values)

    head = ("guide", "TV of texts", "sd(u)", "ESS/N", "error of log Z", "outside", "training tokens", "seconds")
    return markdown(head, [(name, *(shown(runs, k) for k in columns)) for name, runs in rows.items()]) + others


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diffusion", description=__doc__)
    parser.add_argument("cell", choices=(*CELLS, "report"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stories", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("out/diffusion"))
    options = parser.parse_args(argv)
    if options.cell == "report":
        print(report(options.out))
        return
    torch.set_num_threads(1)
    cell, given = options.cell, (options.seed, options.stories, options.steps)
    others: dict[str, Any] = {"untrained": untrained, "causal": causal, "bounds": bounds}
    found = others[cell](*given) if cell in others else trained(cell, *given)
    options.out.mkdir(parents=True, exist_ok=True)
    files.write(options.out / f"{cell}-{options.seed}.json", (json.dumps(found, indent=1) + "\n").encode())
    print(cell, found)


if __name__ == "__main__":
    main()
