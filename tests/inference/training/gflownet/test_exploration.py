"""Exploration draws what it says, schedules are honoured at every step, and local search is a Metropolis chain."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PRIOR, PROBLEMS, X, adapted, lm_guide, one_text, texts_of
from reference import Law, Plain, tokens
from torch import Tensor

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.inference import (
    EpsilonUniform,
    Exploration,
    GFlowNet,
    LocalSearch,
    Mixture,
    OnPolicy,
    Prior,
    Proposal,
    Replay,
    Tempered,
    VarGrad,
)
from lmppl.inference.core.programs import Values
from lmppl.inference.core.query import Query
from lmppl.inference.samplers.metropolis.kernels import density
from lmppl.inference.training.gflownet.exploration import Source
from lmppl.inference.training.loop.schedules import linear
from lmppl.text import equal

N = 3000


@pytest.fixture(scope="module")
def guide_lm(lm) -> LanguageModel:
    return adapted(lm)


def source(lm, guide, step: int = 0) -> Source:
    return Source(one_text(lm).model, guide, (), {}, 1, step)


@torch.no_grad()
def draw(exploration: Exploration, found: Source, n: int = N) -> Values:
    pyro.set_rng_seed(0)
    return exploration.draw(found, n)


def same_law(lm: LanguageModel, z: Tensor, p: Tensor) -> None:
    """Frequencies of texts (n, 2, E) against probabilities (2, K) within 5 standard errors; rare texts pooled."""
    found = equal(z[:, :, None], texts_of(lm)).double().mean(0)  # (2, K)
    assert found.sum(-1) == pytest.approx(torch.ones(2))
    rare = p * len(z) < 20
    found, p = (torch.cat([x.masked_fill(rare, 0.0), (x * rare).sum(-1, keepdim=True)], -1) for x in (found, p))
    assert ((found - p).abs() <= 5 * (p * (1 - p) / len(z)).sqrt() + 5 / len(z) * (p * len(z) < 20)).all()


def law(lm: LanguageModel, view: LanguageModel, T: float = 1.0, epsilon: float = 0.0) -> Tensor:
    """The probability of every text under tokens drawn from (1 - epsilon) softmax(logits / T) + epsilon / n, (2, K)."""
    rows = []
    for x in X:
        token = Law(Plain(view), tokens(x), 2, temperature=T)
        row = []
        for z in texts_of(lm).tolist():
            p, z = 1.0, [t for t in z if t >= 0]
            for t, v in enumerate(z):
                q = token.next(tuple(z[:t])).exp()
                p *= float((1 - epsilon) * q[v] + epsilon * (q[v] > 0) / (q > 0).sum())
            row.append(p)
        rows.append(torch.tensor(row, dtype=torch.float64))
    return torch.stack(rows)


# What is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.25, 1.0])
@pytest.mark.parametrize(
    ("make", "broad"),
    [
        (lambda f: Tempered(2.5, f), {"T": 2.5}),
        (lambda f: EpsilonUniform(0.4, f), {"epsilon": 0.4}),
        (lambda f: EpsilonUniform(1.0, f), {"epsilon": 1.0}),
    ],
)
def test_broadened_particles_follow_their_law_and_the_others_the_guide(lm, guide_lm, make, broad, fraction):
    z = draw(make(fraction), source(lm, lm_guide(guide_lm)))["z"]
    k = N - round(fraction * N)
    same_law(lm, z[k:], law(lm, guide_lm, **broad))
    if k:
        same_law(lm, z[:k], law(lm, guide_lm))


def test_on_policy_prior_and_proposal_draw_from_what_they_say(lm, guide_lm):
    found, other = source(lm, lm_guide(guide_lm)), lm.with_adapter(guide_lm._adapter.config)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(2)
        for p in other.trainable_parameters():
            p.normal_(std=0.15)
    same_law(lm, draw(OnPolicy(), found)["z"], law(lm, guide_lm))
    same_law(lm, draw(Prior(), found)["z"], law(lm, lm))
    same_law(lm, draw(Proposal(lm_guide(other)), found)["z"], law(lm, other))


class Marked(Exploration):
    """Counts what it is asked for."""

    def __init__(self):
        self.asked: list[tuple[int, int]] = []

    def draw(self, source, num_particles):
        self.asked.append((source.step, num_particles))
        return source.draw(source.guide, num_particles)


@pytest.mark.parametrize(
    ("weights", "n", "shares"),
    [([1, 1], 16, [8, 8]), ([2, 1, 1], 16, [8, 4, 4]), ([0.5, 0.3, 0.2], 7, [4, 2, 1]), ([1, 0, 1], 5, [2, None, 3])],
)
def test_shares_of_a_mixture_are_exact_and_their_number_too(lm, guide_lm, weights, n, shares):
    parts = [Marked() for _ in weights]
    z = draw(Mixture(*zip(parts, weights, strict=True)), source(lm, lm_guide(guide_lm)), n)["z"]
    assert len(z) == n and [m.asked[0][1] if m.asked else None for m in parts] == shares


def test_the_parts_of_a_mixture_follow_their_own_laws(lm, guide_lm):
    mixture = Mixture((OnPolicy(), 1), (Prior(), 1), (Tempered(2.0, 1.0), 2))
    z = draw(mixture, source(lm, lm_guide(guide_lm)), 4000)["z"]
    for part, p in [(z[:1000], law(lm, guide_lm)), (z[1000:2000], law(lm, lm)), (z[2000:], law(lm, guide_lm, T=2.0))]:
        same_law(lm, part, p)


# Schedules --------------------------------------------------------------------------------------------------------


def test_schedules_are_asked_at_every_step(lm, guide_lm):
    """The step of `fit` reaches explorations, mixture weights and the reward temperature."""
    asked: dict[str, list[int]] = {"weight": [], "reward": [], "amount": [], "fraction": []}

    def schedule(name: str, value: Callable[[int], float]):
        return lambda step: asked[name].append(step) or value(step)

    marked = Marked()
    mixture = Mixture(
        (marked, schedule("weight", lambda t: 1.0 + t)),
        (Tempered(schedule("amount", lambda t: 2.0 - t / 4), schedule("fraction", lambda t: t / 4)), 1.0),
    )
    gflownet = GFlowNet(
        one_text(lm).model, lm_guide(guide_lm), VarGrad(num_particles=12), exploration=mixture,
        optimizer=torch.optim.SGD(guide_lm.trainable_parameters(), lr=0.0),
        reward_temperature=schedule("reward", lambda t: 3.0 - t / 2),
    )  # fmt: skip
    gflownet.fit([()], 4, progress=False)
    for name, steps in asked.items():
        assert list(dict.fromkeys(steps)) == [0, 1, 2, 3], name
    assert marked.asked == [(t, round(12 * (1 + t) / (2 + t))) for t in range(4)]


@pytest.mark.parametrize("step", [0, 3, 10])
def test_a_schedule_is_the_number_it_gives_at_that_step(lm, guide_lm, step):
    """Same seed, same draws and loss as with the number itself."""
    falling, rising = linear(3.0, 1.5, 5), linear(0.0, 1.0, 10)
    for scheduled, constant in [
        (Tempered(falling, rising), Tempered(falling(step), rising(step))),
        (EpsilonUniform(rising, 0.5), EpsilonUniform(rising(step), 0.5)),
        (LocalSearch(moves=1, fraction=rising, temperature=falling), LocalSearch(None, 1, rising(step), falling(step))),
    ]:
        found = [draw(e, source(lm, lm_guide(guide_lm), step), 16)["z"] for e in (scheduled, constant)]
        assert torch.equal(*found)
    model, guide, losses = one_text(lm).model, lm_guide(guide_lm), []
    for T in (falling, falling(step)):
        objective = VarGrad(num_particles=8, reward_temperature=T)
        objective.training_step = step
        pyro.set_rng_seed(0)
        losses.append(objective.loss(model, guide))
    assert losses[0] == losses[1]


def test_the_reward_temperature_is_that_of_the_target(lm):
    """p^(1/T) is the optimum at the step at which the schedule is T, and at no other."""
    found = PROBLEMS["one text"](lm)
    objective = VarGrad(num_particles=16, reward_temperature=linear(3.0, 1.0, 4))
    for step, T in enumerate([3.0, 2.5, 2.0, 1.5, 1.0, 1.0]):
        objective.training_step = step
        assert objective.loss(found.model, found.posterior(T)) < 1e-6
        assert objective.loss(found.model, found.posterior(T + 0.5)) > 1e-3


# Local search -----------------------------------------------------------------------------------------------------


def joint(lm, found: Source, values: Values) -> Tensor:
    with torch.no_grad():
        n = len(next(iter(values.values())))
        return density(Query(found.model, found.guide, max_plate_nesting=found.nesting), n, values).joint


def test_local_search_moves_its_share_and_leaves_the_rest(lm, guide_lm):
    """Each move runs the guide as often as any other."""
    runs, plain = [], lm_guide(guide_lm)
    found = source(lm, lambda: runs.append(1) or plain())

    def cost(exploration) -> int:
        before = len(runs)
        draw(exploration, found, 40)
        return len(runs) - before

    base = draw(Tempered(1.5, 0.5), found, 40)["z"]
    z = draw(LocalSearch(Tempered(1.5, 0.5), moves=3, fraction=0.25, temperature=2.0), found, 40)["z"]
    assert torch.equal(z[:30], base[:30]) and not torch.equal(z[30:], base[30:])
    costs = [cost(LocalSearch(Tempered(1.5, 0.5), moves=n, fraction=0.25)) for n in (1, 2, 4)]
    assert costs[2] - costs[1] == 2 * (costs[1] - costs[0]) > 0
    still = LocalSearch(Tempered(1.5, 0.5), fraction=0.0)
    assert torch.equal(draw(still, found, 40)["z"], base) and cost(still) == cost(still.base)


@pytest.mark.parametrize("T", [1.0, 2.0])
def test_local_search_leaves_its_target_as_it_is(lm, guide_lm, T):
    """Started from p(z, y)^(1/T), moves regrown by a poor guide keep it."""
    found = PROBLEMS["one text"](lm)
    setting = Source(found.model, lm_guide(guide_lm), (), {}, 1)
    start = Proposal(found.posterior(T))
    moved = draw(LocalSearch(start, moves=4, fraction=1.0, temperature=T), setting)["z"]
    trace = pyro.poutine.trace(found.posterior(T)).get_trace()
    p = trace.nodes["z"]["fn"].log_prob(texts_of(lm)[:, None]).exp().T
    same_law(lm, moved, p)
    assert float((moved != draw(start, setting)["z"]).any(-1).double().mean()) > 0.2


def test_local_search_raises_the_log_reward(lm, guide_lm):
    found = source(lm, lm_guide(guide_lm))
    uniform = EpsilonUniform(1.0, 1.0)
    start, end = draw(uniform, found, 800), draw(LocalSearch(uniform, moves=4, fraction=1.0), found, 800)
    gain = joint(lm, found, end) - joint(lm, found, start)  # the same seed: the same start
    assert (gain.mean(0) > 5 * gain.std(0) / 800**0.5).all() and (gain.mean(0) > 0.2).all()


def test_local_search_moves_every_site(lm):
    """A category, a text that is masked in a part of the particles, and another text."""

    def model():
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.5], dtype=torch.float64)))
        with pyro.poutine.mask(mask=c == 1):
            z = pyro.sample("z", Completion(lm, "a", **PRIOR))
        w = pyro.sample("w", Completion(lm, lm.join("b", z), **PRIOR))
        pyro.factor("f", -3.0 * (w == 1).sum(-1))

    pyro.set_rng_seed(0)
    found = Source(model, model, (), {}, 0)
    start, end = draw(OnPolicy(), found, 500), draw(LocalSearch(moves=12, fraction=1.0), found, 500)
    for name in ("c", "z", "w"):
        assert bool((start[name] != end[name]).any()), name
    # Moves are proposed by the prior: what counts is the factor, and the number of draws is enough to see it.
    fell = [(d["w"] == 1).sum(-1).double() for d in (start, end)]
    assert float((fell[0] - fell[1]).mean()) > 5 * float((fell[0] - fell[1]).std()) / 500**0.5


@pytest.mark.slow
def test_training_with_local_search_and_replay_reaches_the_posterior(lm):
    guide_lm, found = adapted(lm), PROBLEMS["one text"](lm)
    guide = lm_guide(guide_lm)
    exact = pyro.poutine.trace(found.posterior(1.0)).get_trace().nodes["z"]["fn"].logits.exp()  # (2, K)

    def total_variation() -> float:
        with torch.no_grad():
            q = Completion(guide_lm, X, **PRIOR).log_prob(texts_of(lm)[:, None]).exp().T
        return float((q - exact).abs().sum(-1).max()) / 2

    before = total_variation()
    gflownet = GFlowNet(
        found.model, guide, exploration=LocalSearch(Tempered(), moves=1), replay=Replay(),
        optimizer=torch.optim.AdamW(guide_lm.trainable_parameters(), lr=2e-2),
    )  # fmt: skip
    gflownet.fit([()], 50, progress=False)
    assert before > 0.25 and total_variation() < 0.08


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: LocalSearch(moves=0), "moves"),
        (lambda: LocalSearch(fraction=2.0), "fraction"),
        (lambda: LocalSearch(temperature=0.0), "temperature"),
        (lambda: Tempered(0.0), "temperature"),
        (lambda: EpsilonUniform(2.0), "epsilon"),
        (lambda: Mixture(), "parts"),
        (lambda: Mixture((OnPolicy(), -1.0)), "weight"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_a_bad_value_of_a_schedule_is_named_with_its_step(lm, guide_lm):
    with pytest.raises(ValueError, match="fraction: .*step 7"):
        draw(Tempered(2.0, lambda t: 3.0), source(lm, lm_guide(guide_lm), 7), 4)
