"""One contract for every algorithm: on random small models, its answers are those of enumeration."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_lm
from torch import Tensor

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.inference import (
    SMC,
    DirectPreferenceOptimization,
    Enumeration,
    GFlowNet,
    Importance,
    MetropolisHastings,
    PolicyGradient,
    Posterior,
    Prompting,
    ReweightedWakeSleep,
    SupervisedFineTuning,
    ZeroEvidence,
)

COPIES = 100  # of one observation in a plate: as many independent runs of an algorithm in one
VOCAB = 5


class Sized:
    """A trainer, with the number of particles of its answers."""

    def __init__(self, kind: Callable, model: Callable, guide: Callable, n: int):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.0)
        self.trainer, self.n = kind(model, guide, optimizer=optimizer), n

    def run(self, *args) -> Posterior:
        return self.trainer.run(*args, num_particles=self.n)


def last_token(prefix: Tensor) -> Tensor:
    """A twist that means nothing: 0.6 nats for an odd last token."""
    return 0.6 * (prefix[..., -1] % 2).double() if prefix.shape[-1] else torch.zeros(prefix.shape[:-1]).double()


ALGORITHMS: dict[str, Callable] = {
    "importance, prior": lambda m, g, n: Importance(m, num_particles=n),
    "importance, guide": lambda m, g, n: Importance(m, g, num_particles=n),
    "SMC, prior": lambda m, g, n: SMC(m, num_particles=n, ess_threshold=0.8),
    "SMC, guide, residual": lambda m, g, n: SMC(m, g, num_particles=n, ess_threshold=1.0, resampling="residual"),
    # Any positive twist is unbiased; one that hardly ever keeps a mode needs more than these runs to show it.
    "SMC, twisted": lambda m, g, n: SMC(m, g, num_particles=n, ess_threshold=1.0, twist=last_token),
    "Metropolis, prior": lambda m, g, n: MetropolisHastings(m, num_chains=1, num_samples=n, warmup=60),
    "Metropolis, guide": lambda m, g, n: MetropolisHastings(
        m, g, num_chains=1, num_samples=n, warmup=60, moves={"regrowth": 0.4, "branch": 0.3, "independence": 0.3}
    ),
}

# These draw from their guide and weigh it: their answers are those of importance sampling with that guide.
GUIDED: dict[str, Callable] = {
    "prompting, weighted": lambda m, g, n: Prompting(m, g, n, weighted=True),
    "GFlowNet": lambda m, g, n: Sized(GFlowNet, m, g, n),
    "policy gradient": lambda m, g, n: Sized(PolicyGradient, m, g, n),
    "wake-sleep": lambda m, g, n: Sized(ReweightedWakeSleep, m, g, n),
    "supervised": lambda m, g, n: Sized(SupervisedFineTuning, m, g, n),
    "preferences": lambda m, g, n: Sized(DirectPreferenceOptimization, m, g, n),
}


@cache
def language_model(seed: int) -> LanguageModel:
    return tiny_lm(vocab=VOCAB, seed=seed, dtype=torch.float64)


class Problem:
    """z ~ LM(x), perhaps after a category or before another text; y ~ LM(x z); perhaps a factor on z."""

    def __init__(self, seed, x, y, max_tokens, min_tokens, stop, kind):
        self.lm, self.kind = language_model(seed), kind
        eos = self.lm.eos_id
        self.x, self.y = torch.tensor([x], dtype=torch.long), torch.tensor([[*y, eos]])
        self.limits = {"max_tokens": max_tokens, "min_tokens": min(min_tokens, max_tokens), "stop": stop}

    def program(self, lm: LanguageModel, heat: float, observe: bool) -> Callable:
        def run(x: Tensor, y: Tensor) -> None:
            with pyro.plate("copies", len(x)):
                prompt = x
                if self.kind == "category":
                    c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)))
                    prompt = lm.join(x, (c + 1)[..., None])
                z = pyro.sample("z", Completion(lm, prompt, temperature=heat, **self.limits))
                told = lm.join(prompt, z)
                if self.kind == "two texts":
                    w = pyro.sample("w", Completion(lm, told, max_tokens=1, temperature=heat))
                    told = lm.join(told, w)
                if not observe:
                    return
                if self.kind == "factor":
                    pyro.factor("f", torch.where(z[..., 0] == 2, -1.5, 0.5).double())
                pyro.sample("y", Completion(self.lm, told, max_tokens=3), obs=y)

        return run

    @property
    def model(self) -> Callable:
        return self.program(self.lm, 1.0, True)

    @property
    def guide(self) -> Callable:
        return self.program(self.lm, 1.5, False)


problems = st.builds(
    Problem,
    seed=st.integers(0, 9),
    x=st.lists(st.integers(1, VOCAB - 1), min_size=0, max_size=3),
    y=st.lists(st.integers(1, VOCAB - 1), min_size=0, max_size=2),
    max_tokens=st.integers(1, 2),
    min_tokens=st.integers(0, 1),
    stop=st.sampled_from(["eos", (0, 1)]),
    kind=st.sampled_from(["one text", "category", "two texts", "factor"]),
)


SLOW = {"Metropolis, prior", "Metropolis, guide"}


@pytest.mark.parametrize("name", [pytest.param(a, marks=pytest.mark.slow) if a in SLOW else a for a in ALGORITHMS])
@settings(max_examples=8)
@given(problem=problems, seed=st.integers(0, 99))
def test_answers_are_those_of_enumeration(name, problem, seed):
    check_against_enumeration(name, problem, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
@settings(max_examples=40)
@given(problem=problems, seed=st.integers(100, 999))
def test_answers_are_those_of_enumeration_on_more_examples(name, problem, seed):
    check_against_enumeration(name, problem, seed)


def check_against_enumeration(name: str, problem: Problem, seed: int) -> None:
    """The mean over independent runs of an unbiased estimate is within 5 standard errors of the truth.

    Importance sampling and SMC: of sum_n w_n 1[z_n = value] for Z p(value | y), and of Z itself.  Markov chains: of the
    share of draws, for p(value | y).  Every value of posterior probability 0.05 and more that is no rarer than 0.02 in
    the prior: of others there may be no draw among the 1,600, and no standard error then.
    """
    exact = Enumeration(problem.model).run(problem.x, problem.y)
    prior = Enumeration(problem.program(problem.lm, 1.0, False)).run(problem.x, problem.y)
    common = {value_of(prior, k) for k in (prior.probabilities[:, 0] >= 0.02).nonzero()[:, 0]}
    pyro.set_rng_seed(seed)
    x, y = (t.expand(COPIES, -1) for t in (problem.x, problem.y))
    n = 16
    found = ALGORITHMS[name](problem.model, problem.guide, n).run(x, y)
    assert found.log_weights.shape == (n, COPIES) and found.log_evidence.shape == (COPIES,)
    assert set(found.samples) == set(exact.samples)
    assert all(v.shape[:2] == (n, COPIES) for v in found.samples.values())
    chains = bool(found.log_evidence.isnan().all())
    if not chains:
        assert torch.allclose(found.log_weights.logsumexp(0), found.log_evidence)
        assert_near((found.log_evidence - exact.log_evidence).exp(), 1.0)
    scale = 0.0 if chains else exact.log_evidence
    for k in (exact.probabilities[:, 0] >= 0.05).nonzero()[:, 0]:
        if value_of(exact, k) not in common:
            continue
        same = torch.ones(n, COPIES, dtype=torch.bool)
        for site, values in exact.samples.items():
            mine, value = found.samples[site], values[k, 0]
            if mine.dim() > 2:
                width = min(mine.shape[-1], value.shape[-1])
                assert (value[width:] == -1).all() and (mine[..., width:] == -1).all()
                same &= (mine[..., :width] == value[:width]).all(-1)
            else:
                same &= mine == value
        assert_near(((found.log_weights - scale).exp() * same).sum(0), float(exact.probabilities[k, 0]))


def value_of(found: Posterior, k: Tensor) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The k-th value of all sites, without padding."""
    return tuple((s, tuple(t for t in v[k, 0].flatten().tolist() if t >= 0)) for s, v in sorted(found.samples.items()))


def assert_near(estimates: Tensor, truth: float) -> None:
    error = float(estimates.std()) / len(estimates) ** 0.5
    assert abs(float(estimates.mean()) - truth) < 5 * error + 1e-9


@pytest.mark.parametrize("name", GUIDED)
def test_trained_and_prompted_guides_answer_by_importance_sampling(name):
    problem = Problem(1, [2, 3], [2], 2, 0, "eos", "two texts")
    answers = []
    for make in (GUIDED[name], ALGORITHMS["importance, guide"]):
        pyro.set_rng_seed(5)
        answers.append(make(problem.model, problem.guide, 8).run(problem.x, problem.y))
    assert torch.equal(answers[0].log_weights, answers[1].log_weights)
    assert all(torch.equal(answers[0].samples[s], answers[1].samples[s]) for s in answers[1].samples)


def short(name: str, *args) -> Any:
    """An algorithm whose chains need not have converged."""
    algorithm = ALGORITHMS[name](*args)
    if isinstance(algorithm, MetropolisHastings):
        algorithm.warmup = 3
    return algorithm


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_same_seed_gives_the_same_answer(name):
    problem = Problem(1, [2, 3], [2], 2, 0, "eos", "two texts")
    answers = []
    for _ in range(2):
        pyro.set_rng_seed(5)
        answers.append(short(name, problem.model, problem.guide, 8).run(problem.x, problem.y))
    assert all(torch.equal(answers[0].samples[s], answers[1].samples[s]) for s in answers[0].samples)
    assert torch.equal(answers[0].log_weights, answers[1].log_weights)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_without_a_possible_value_there_is_no_posterior(name):
    problem = Problem(1, [2, 3], [2], 2, 0, "eos", "one text")

    def model(x, y):
        problem.model(x, y)
        with pyro.plate("again", len(x)):
            pyro.factor("never", torch.tensor(-torch.inf, dtype=torch.float64))

    found = short(name, model, problem.guide, 8).run(problem.x, problem.y)
    assert bool((found.log_evidence == -torch.inf).all())
    for ask in (
        lambda: found.table("z"),
        lambda: found.resample(3),
        lambda: found.predictive(model, problem.x, problem.y),
    ):
        with pytest.raises(ZeroEvidence):
            ask()
