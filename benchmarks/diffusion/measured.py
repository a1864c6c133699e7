"""Measures of a guide of infilling by unmasking, compared with the exact posterior of texts, for a cell and a seed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lmppl import embedded
from lmppl.distributions import Unmasking
from lmppl.embedded import Story
from lmppl.embedded.stories import middles
from lmppl.inference import (
    SMC,
    Importance,
    Linex,
    Query,
    Sandwich,
    VarGrad,
    simulate,
    weigh,
)
from lmppl.inference.core.programs import Program
from lmppl.inference.judging.quality import density_quality
from lmppl.models import Experiment, diffusion, infilling
from lmppl.models.diffusion import LEFT_TO_RIGHT, RECIPE, text_log_joint

from ..paper.study import Figures

UNTRAINED, VARIANCE, BOUNDED, FEW, CAUSAL, BOUNDS = (
    "untrained", "VarGrad", "Linex", "eight stories", "causal guide", "bounds",
)  # fmt: skip
CELLS = (UNTRAINED, VARIANCE, BOUNDED, FEW, CAUSAL, BOUNDS)
STORIES, SUMMED = 16, 2  # unseen stories a seed, as many with pairs that were trained on; fewer in random order
STEPS = 300
DRAWS, RUNS, TOLD = 64, 4, 100


class Stories:
    """Stories, their grammatical middles, and the exact posterior of the middles."""

    def __init__(self, e: Experiment, stories: list[Story]):
        self.task = programs(e)
        self.x, self.y = self.task.encode(stories)
        self.middles = torch.stack([e.lm.encode(middles(s.x)) for s in stories], 1)  # (K, B, 6)
        log_joint = text_log_joint(self.task, self.x, self.y, self.middles)
        self.log_z = log_joint.logsumexp(0)  # (B,)
        self.log_p = log_joint - self.log_z  # (K, B)

    @torch.no_grad()
    def tv(self, guide: Unmasking) -> list[float]:
        """Total variation of texts for each story; the guide's mass on other texts counts in full."""
        p, q = self.log_p.exp(), guide.text_log_prob(self.middles).exp()
        return (0.5 * ((p - q).abs().sum(0) + (1 - q.sum(0)).clamp(min=0))).tolist()

    def guide(self) -> Unmasking:
        return self.task.posterior(self.x, self.y)

    def prior(self) -> Unmasking:
        return self.task.prior(self.x)

    def weights(self, e: Experiment, guide: Program | None) -> Figures:
        """sd(u), ESS/N and the error of log Z of draws of a guide (None: the prior), means over stories and runs."""
        found = []
        for run in range(RUNS):
            pyro.set_rng_seed(run)
            u = weigh(Query(e.model, guide, (self.x, self.y)), DRAWS).u  # (N, B)
            error = (u.logsumexp(0) - math.log(DRAWS) - self.log_z).abs()
            found.append(torch.stack([u.clamp(min=-50.0).std(0), 1 / (u.softmax(0) ** 2).sum(0) / DRAWS, error]))
        return dict(zip(("sd", "ess", "error"), torch.stack(found).mean((0, 2)).tolist(), strict=True))

    def outside(self, e: Experiment) -> float:
        """The share of weighted draws of the guide whose text is no grammatical middle."""
        posterior = Importance(e.model, e.guide, 500).run(self.x, self.y)
        words = self.prior().words(posterior.samples["z"])  # (N, B, 6)
        known = (words[:, None] == self.middles).all(-1).any(1)
        return float((posterior.probabilities * ~known).sum(0).mean())


def unseen(seed: int, count: int) -> list[Story]:
    """A seed's own test stories: their pairs of place and verb are in no training story."""
    return embedded.data("stories", "test")[seed * STORIES :][:count]


def seen(seed: int, count: int) -> list[Story]:
    """A seed's own stories among those that guides are trained on."""
    return embedded.data("stories", "train")[seed * STORIES :][:count]


def programs(e: Experiment) -> Any:
    """The object of which the two programs are methods."""
    return e.model.__self__  # type: ignore[attr-defined]


def tokens(e: Experiment) -> int:
    return int(e.lm.tokens_scored + programs(e).reader.tokens_scored)


def made(seed: int, order: str = LEFT_TO_RIGHT, **changes: Any) -> Experiment:
    return diffusion.experiment(seed=seed, recipe=replace(RECIPE, **changes), order=order)


def untrained(seed: int, count: int) -> Figures:
    """The prior, the untrained guide, and SMC with each."""
    e = made(seed)
    stories = Stories(e, unseen(seed, count))
    found: Figures = {"prior": {"tv": stories.tv(stories.prior())} | stories.weights(e, None)}
    found["guide"] = judged(e, stories, seed, count)
    for name, guide in (("prior", None), ("guide", e.guide)):
        errors = []
        for run in range(RUNS):
            pyro.set_rng_seed(run)
            answer = SMC(e.model, guide, num_particles=DRAWS).run(stories.x, stories.y)
            errors.append(answer.log_evidence - stories.log_z)
        found[name]["smc error"] = float(torch.stack(errors).abs().mean())
    pyro.set_rng_seed(seed)
    found["guide"]["outside"] = stories.outside(e)
    few = min(count // 2, SUMMED)
    shuffled = Stories(made(seed, "random"), unseen(seed, few))
    return found | {"random order": {"tv": shuffled.tv(shuffled.guide()), "left to right": found["guide"]["tv"][:few]}}


def judged(e: Experiment, stories: Stories, seed: int, count: int) -> Figures:
    """Measures of the guide on unseen stories of a seed, and on stories that it was trained on."""
    known = Stories(e, seen(seed, count))
    return {"tv": stories.tv(stories.guide()), "seen tv": known.tv(known.guide())} | stories.weights(e, e.guide)


def trained(cell: str, seed: int, count: int, steps: int) -> Figures:
    """A trained guide that unmasks from left to right; in `FEW` on eight of the seed's seen stories only."""
    e = made(seed, objective=VarGrad if cell == VARIANCE else Linex)
    batches, known = e.batches, count
    if cell == FEW:
        known = count // 2
        batches = e.recipe.batches(*programs(e).encode(seen(seed, known)), seed=seed)
    before = tokens(e)
    pyro.set_rng_seed(seed)
    e.gflownet().fit(batches, steps, seed=seed, progress=False)
    return {"tokens": tokens(e) - before} | judged(e, Stories(e, unseen(seed, count)), seed, known)


def causal(seed: int, count: int, steps: int) -> Figures:
    """The guide of the experiment `infilling`, trained as long, compared with its own posterior."""
    e = infilling.experiment(seed=seed, recipe=RECIPE)
    before = e.lm.tokens_scored
    pyro.set_rng_seed(seed)
    e.gflownet().fit(e.batches, steps, seed=seed, progress=False)
    found: Figures = {"tokens": e.lm.tokens_scored - before}
    task = programs(e)
    assert e.exact is not None
    for name, stories in (("tv", unseen(seed, count)), ("seen tv", seen(seed, count))):
        args = task.encode(stories)
        found[name] = density_quality(e.exact.run(*args), e.guide, args, {}).total_variation.tolist()
    return found


def bounds(seed: int, count: int, most: int) -> Figures:
    """log p(z | x) of middles that the masked language model wrote in random order, and its bounds."""
    e = made(seed, "random")
    task = programs(e)
    x = task.encode(unseen(seed, 1))[0].expand(count, -1)

    def write() -> Tensor:
        with pyro.plate("stories", count):
            return pyro.sample("z", task.prior(x))

    def writes(words: Tensor) -> None:
        with pyro.plate("stories", count):
            d = task.prior(x)
            z = pyro.sample("z", d)
            pyro.factor("writes", torch.where((d.words(z) == words).all(-1), 0.0, -torch.inf))

    def order(words: Tensor) -> None:
        only = one_hot(words, task.lm.vocab_size).bool()
        with pyro.plate("stories", count):
            pyro.sample("z", Unmasking(task.lm, x, allowed=only))

    pyro.set_rng_seed(seed)
    path = simulate(write).values["z"]
    words = task.prior(x).words(path)
    with torch.no_grad():
        exact = task.prior(x).text_log_prob(words)  # (count,)
    found: Figures = {"text": float(exact.mean()), "path": float(task.prior(x).log_prob(path).detach().mean())}
    for method, threshold in (("importance sampling", 0.0), ("SMC, resampled below N/2", 0.5)):
        for n in (1, most) if not threshold else (most,):
            sandwich = Sandwich(writes, order, n, threshold).run(words, exact_sample={"z": path})
            gaps = {"below": exact - sandwich.lower, "above": sandwich.upper - exact}
            found[f"{method}, {n}"] = {name: float(slack.mean()) for name, slack in gaps.items()}
    return found


def run(cell: str, seed: int, short: bool) -> Figures:
    """Run one cell; if short, on two stories with two steps."""
    count, steps = (2, 2) if short else (STORIES, STEPS)
    if cell == UNTRAINED:
        return untrained(seed, count)
    if cell == CAUSAL:
        return causal(seed, count, steps)
    if cell == BOUNDS:
        return bounds(seed, 3 if short else TOLD, 4 if short else 64)
    return trained(cell, seed, count, steps)
