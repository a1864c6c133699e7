"""Wrong arguments of inference: a ValueError that names the argument, before anything is computed."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from tiny import flat_lm

from lmppl import constraints
from lmppl.distributions import Completion
from lmppl.inference import (
    SMC,
    DetailedBalance,
    Enumeration,
    GFlowNet,
    Importance,
    LocalSearch,
    MetropolisHastings,
    Mixture,
    OnPolicy,
    PooledVarGrad,
    Prior,
    Prompting,
    Proposal,
    Replay,
    Resampling,
    Sandwich,
    SubTB,
    TrajectoryBalance,
    VarGrad,
    compare,
    diagnose,
    divergences,
    plot_ancestry,
)

LM = flat_lm(vocab=5)
X, Y = torch.tensor([[2], [3]]), torch.tensor([[3, 0], [2, 0]])


def model(x, y):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", Completion(LM, x, max_tokens=1))
        pyro.sample("y", Completion(LM, LM.join(x, z), max_tokens=1), obs=y)


def guide(x, y):
    with pyro.plate("data", len(x)):
        pyro.sample("z", Completion(LM, LM.join(y, x), max_tokens=1))


def gflownet(**options):
    return GFlowNet(model, guide, optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)]), **options)


CONSTRUCTORS = {
    "num_particles: a float": ("num_particles", lambda: Importance(model, num_particles=2.5)),
    "num_particles: of SMC": ("num_particles", lambda: SMC(model, num_particles="many")),
    "num_particles: of a GFlowNet": ("num_particles", lambda: gflownet(num_particles=0)),
    "num_particles: a variance of one": ("num_particles", lambda: VarGrad(num_particles=1)),
    "num_particles: a variance of one, later": ("num_particles", lambda: gflownet(num_particles=1)),
    "num_particles: of prompting": ("num_particles", lambda: Prompting(model, guide, True)),
    "num_chains": ("num_chains", lambda: MetropolisHastings(model, num_chains=1.5)),
    "max_support": ("max_support", lambda: Enumeration(model, max_support=1e3)),
    "model: none": ("model", lambda: Importance(None)),
    "model: of SMC": ("model", lambda: SMC("model")),
    "guide: a name": ("guide", lambda: Importance(model, "guide")),
    "objective: a class": ("objective.*the class SubTB", lambda: gflownet(objective=SubTB)),
    "objective: a name": ("objective", lambda: gflownet(objective="SubTB")),
    "exploration: a name": ("expected an instance of Exploration", lambda: gflownet(exploration="tempered")),
    "exploration: of an objective": ("exploration", lambda: DetailedBalance(exploration=Prior)),
    "replay: a class": ("replay", lambda: gflownet(replay=Replay)),
    "clip": ("clip", lambda: gflownet(clip=0.0)),
    "reward_temperature: text": ("reward_temperature", lambda: gflownet(reward_temperature="low")),
    "floor": ("floor", lambda: PooledVarGrad(floor=-1.0)),
    "lam: NaN": ("lam", lambda: SubTB(lam=math.nan)),
    "log_z: text": ("log_z", lambda: TrajectoryBalance(log_z="learned")),
    "parts: no pairs": ("parts", lambda: Mixture(OnPolicy(), Prior())),
    "parts: no exploration": ("parts", lambda: Mixture(("prior", 1.0))),
    "program": ("program", lambda: Proposal("guide")),
    "base": ("base", lambda: LocalSearch("tempered")),
    "key": ("key", lambda: Replay(key="x")),
    "capacity": ("capacity", lambda: Replay(capacity=2.5)),
    "tokens: several": ("tokens", lambda: constraints.only(LM, ["ab"])),
    "predicate": ("predicate", lambda: constraints.Check(LM, torch.ones(5))),
}
RUNS = {
    "steps": ("steps", lambda: gflownet().fit([(X, Y)], 2.5)),
    "evaluate_every": ("evaluate_every", lambda: gflownet().fit([(X, Y)], 2, evaluate_every=0)),
    "checkpoint_every": ("checkpoint_every", lambda: gflownet().fit([(X, Y)], 2, checkpoint_every=0)),
    "warmup": ("warmup", lambda: gflownet().fit([(X, Y)], 2, warmup=-1)),
    "batches: one of them": ("batches", lambda: gflownet().fit((X, Y), 2, progress=False)),
    "batches: a function": ("batches", lambda: gflownet().fit(lambda step: X, 2, progress=False)),
    "twist: no tensor": ("twist", lambda: SMC(model, twist=lambda prefix: 0.0).run(X, Y)),
    "algorithms: a list": ("algorithms", lambda: compare(model, [Importance(model)], X, Y)),
    "algorithms: a number": ("algorithms", lambda: compare(model, {"a": 3}, X, Y)),
    "exact": ("exact", lambda: compare(model, {"a": Importance(model)}, X, Y, exact=3.0)),
    "guides": ("guides", lambda: compare(model, {"a": Importance(model)}, X, Y, guides={"b": guide})),
    "budgets": ("budgets", lambda: compare(model, {"a": Importance(model)}, X, Y, budgets=100)),
    "budgets: of what has no particles": (
        "budgets",
        lambda: compare(model, {"exact": Enumeration(model)}, X, Y, budgets=[100]),
    ),
    "repetitions": ("repetitions", lambda: diagnose(Importance(model), X, Y, repetitions=1.5)),
    "exact_sample": ("exact_sample", lambda: Sandwich(model, num_particles=1).run(X, Y, exact_sample=3)),
}
ANCESTRY = (Resampling("z", 0, torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2)),)
ANSWERS = {
    "index: none": (r"index: name one .* \(2,\), for instance index=0", lambda p: p.table("z")),
    "index: beyond": ("index", lambda p: p.table("z", 5)),
    "index: text": ("index", lambda p: p.table("z", "first")),
    "index: too many": ("index", lambda p: p.table("z", (0, 0))),
    "index: of a plot": ("index", lambda p: plot_ancestry(ANCESTRY, "no.png", 7)),
    "site: a number": ("site", lambda p: p.table(3, 0)),
    "site: none": ("site", lambda p: p.table([], 0)),
    "n: a float": ("n: ", lambda p: p.resample(2.5)),
    "scheme": ("scheme", lambda p: p.resample(2, "fair")),
    "candidates: one string": ("candidates", lambda p: p.predict(model, "a", X, Y)),
    "values: floats": ("values", lambda p: p.log_prob(torch.zeros(2, 2))),
    "values: a shape": ("values", lambda p: p.log_prob(torch.zeros(7, 5, 2, dtype=torch.long))),
    "num_particles": (
        "num_particles",
        lambda p: divergences(model, guide, X, Y, bounds=None, exact_sample=p, num_particles=0),
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_construction(case):
    argument, call = CONSTRUCTORS[case]
    with pytest.raises(ValueError, match=argument):
        call()


@pytest.mark.parametrize("case", RUNS)
def test_running(case):
    argument, call = RUNS[case]
    with pytest.raises(ValueError, match=argument):
        call()


@pytest.fixture(scope="module")
def posterior():
    return Enumeration(model).run(X, Y)


@pytest.mark.parametrize("case", ANSWERS)
def test_asking_a_posterior(posterior, case):
    argument, call = ANSWERS[case]
    with pytest.raises(ValueError, match=argument):
        call(posterior)


def test_an_element_may_be_counted_from_the_end(posterior):
    assert posterior.table("z", -1) == posterior.table("z", 1)
