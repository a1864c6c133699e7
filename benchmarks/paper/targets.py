"""Measures of the studies of explicit targets: samplers of texts compared with the enumerated target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pyro
import torch

from lmppl.inference import SMC, Enumerated, Importance, PolicyGradient, Posterior
from lmppl.inference.core.programs import Program, Substitute, trace
from lmppl.inference.judging.compare import Meter, particles_within
from lmppl.inference.judging.quality import density_quality, draw_quality
from lmppl.inference.posterior.algorithm import sized
from lmppl.models import EXPERIMENTS, Experiment

from .study import Figures

PARTICLES = 64  # of the guide; the other samplers get as many tokens per query
REPETITIONS = 4
PPO_RATE = 3e-4  # four updates on the same draws; chosen of 1e-4 and 3e-4 on another seed of the random number


def mean(x: torch.Tensor) -> float | None:
    """The mean, or None if it is not finite."""
    found = float(x.double().mean())
    return found if found < float("inf") else None


def programs(e: Experiment) -> Any:
    """The object of which the two programs are methods."""
    return e.model.__self__


@cache
def enumerated(name: str, observations: int | None, **options: Any) -> Enumerated:
    """The exact target of an experiment's first test observations (None: all); computed once per process."""
    e = EXPERIMENTS[name](**options)
    return e.exact.run(*(given[:observations] for given in e.test))


def power(exact: Enumerated, temperature: float) -> Enumerated:
    """The same texts with their joint probability to the power 1 / temperature."""
    log_weights = exact.log_weights / temperature
    return replace(exact, log_weights=log_weights, log_evidence=log_weights.logsumexp(0))


def ppo(e: Experiment, matched: bool = False, **options: Any) -> PolicyGradient:
    """PPO on the guide: for the reward only, or with the KL penalty for which the optimum is the target."""
    reward: dict[str, Any] = {"reward": "likelihood", "kl": 1.0} if matched else {"reward": "joint", "kl": 0.0}
    given = {"optimizer": e.optimizer(PPO_RATE), "num_particles": e.recipe.particles} | reward | options
    return PolicyGradient(e.model, e.guide, algorithm="ppo", **given)


@torch.no_grad()
def of_density(exact: Posterior, guide: Program, args: tuple[Any, ...]) -> Figures:
    """TV of a guide's distribution to the target, its mass on the target's support, and perplexities of both.

    ``perplexity`` is exp of the entropy of the guide's distribution on the support: its effective number of texts.
    """
    quality = density_quality(exact, guide, args, {})
    q = log_q_on_support(exact, guide, args).exp()
    return {
        "tv": mean(quality.total_variation),
        "inside": mean(q.sum(0)),
        "perplexity": mean(perplexity(q / q.sum(0))),
        "target_perplexity": mean(perplexity(exact.probabilities)),
    }


def log_q_on_support(exact: Posterior, guide: Program, args: tuple[Any, ...]) -> torch.Tensor:
    """log q of the texts of the support, (K, B); -inf at padding."""
    run = trace(guide, args, {}, Substitute(exact.values), nesting=1, particles=exact.num_particles)
    node = next(n for n in run.nodes.values() if n["type"] == "sample" and n["name"] in exact.values)
    log_q = node["fn"].log_prob(node["value"])
    return log_q.masked_fill(exact.log_weights == -torch.inf, -torch.inf)


def perplexity(p: torch.Tensor) -> torch.Tensor:
    """exp of the entropy over axis 0."""
    return (-torch.where(p > 0, p * p.log(), torch.zeros_like(p)).sum(0)).exp()


def of_draws(exact: Posterior, run: Callable[[], Posterior]) -> Figures:
    """TV of weighted draws, ESS/N and the error of the log evidence, means over repetitions."""
    answers = [run() for _ in range(REPETITIONS)]
    alive = [a for a in answers if bool((a.log_weights.amax(0) > -torch.inf).all())]
    return {
        "particles": answers[0].num_particles,
        "draws_tv": mean(torch.stack([draw_quality(exact, a) for a in alive])) if len(alive) == len(answers) else None,
        "ess": mean(torch.stack([(a.ess / a.num_particles).nan_to_num(0.0) for a in answers])),
        "log_z_error": mean(torch.stack([(a.log_evidence - exact.log_evidence).abs() for a in answers])),
    }


def trained(e: Experiment, method: str, steps: int, seed: int, exact: Posterior, args: tuple[Any, ...]) -> Figures:
    """Train a guide by "GFlowNet" or "PPO" (reward only), and measure its distribution and its weighted draws."""
    trainer = e.gflownet() if method == "GFlowNet" else ppo(e, floor=18.0)
    trainer.fit(e.batches, steps, seed=seed, progress=False)
    draws = of_draws(exact, lambda: trainer.run(*args, num_particles=PARTICLES))
    return of_density(exact, e.guide, args) | draws | {"tokens": trainer.training_tokens}


def untrained(e: Experiment, exact: Posterior, args: tuple[Any, ...]) -> dict[str, Figures]:
    """The language model itself, importance sampling and SMC from it, at the cost in tokens of a query of the guide."""
    completion = programs(e).completion

    def prior(x: torch.Tensor, *given: torch.Tensor) -> None:
        with pyro.plate("prompts", len(x)):
            pyro.sample("z", completion(e.lm, x))

    meter = Meter([e.lm.network])
    tokens = meter(lambda: Importance(e.model, e.guide, PARTICLES).run(*args))[1] / len(args[0])
    found = {"language model": of_density(exact, prior, args)}
    for name, algorithm in {
        "importance sampling": Importance(e.model),
        "SMC": SMC(e.model),
        "SMC, stop twist": SMC(e.model, twist="stop"),
    }.items():
        n = particles_within(algorithm, tokens, meter, args=args)
        found[name] = of_draws(exact, partial(sized(algorithm, n).run, *args))
    draws = [draw_quality(exact, exact.resample(PARTICLES, "multinomial")) for _ in range(8)]
    return found | {"exact draws": {"draws_tv": mean(torch.stack(draws)), "particles": PARTICLES}}
