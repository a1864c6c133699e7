"""Every algorithm keeps the protocols of `lmppl.inference.algorithm`, and wrappers hand them on."""

from __future__ import annotations

import inspect

import pyro
import pytest
import torch
from em_task import Task as EMTask
from tiny import tiny_lm

import lmppl.inference
from lmppl.distributions import Completion
from lmppl.inference import (
    SMC,
    Enumeration,
    GFlowNet,
    Importance,
    MetropolisHastings,
    Prompting,
    Sandwich,
    Sharded,
    VariationalEM,
    diagnose,
)
from lmppl.inference.posterior.algorithm import Algorithm, Sampler, on, sized

LM = tiny_lm(vocab=5, dtype=torch.float64)
X, Y, OTHER = torch.tensor([[2], [3]]), torch.tensor([[3, 0], [2, 0]]), torch.tensor([[1, 0], [4, 0]])


def model(x, y=Y):
    with pyro.plate("d", 2):
        z = pyro.sample("z", Completion(LM, x, max_tokens=2))
        pyro.sample("y", Completion(LM, LM.join(x, z), max_tokens=1), obs=y)


def other(x):
    model(x, OTHER)


def guide(x):
    with pyro.plate("d", 2):
        pyro.sample("z", Completion(LM, x, max_tokens=2))


def gflownet(program=model):
    return GFlowNet(program, guide, optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.0))


ALGORITHMS = {
    "Importance": lambda m: Importance(m, num_particles=7),
    "Importance, guide": lambda m: Importance(m, guide, num_particles=7),
    "SMC": lambda m: SMC(m, guide, num_particles=7),
    "Enumeration": Enumeration,
    "MetropolisHastings": lambda m: MetropolisHastings(m, num_chains=2, num_samples=3, warmup=2),
    "Prompting": lambda m: Prompting(m, guide, num_particles=7),
    "GFlowNet": gflownet,
    "Sharded": lambda m: Sharded(Importance(m, num_particles=7)),
    "VariationalEM": lambda m: VariationalEM(
        m, None, Importance(m, num_particles=7), torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.0)
    ),
}


def test_every_public_class_that_answers_with_a_posterior_keeps_the_protocol():
    public = [getattr(lmppl.inference, name) for name in lmppl.inference.__all__]
    classes = [c for c in public if inspect.isclass(c) and inspect.isfunction(getattr(c, "run", None))]
    kinds = {"Posterior", "Enumerated", "MarkovChains", "Sequential"}
    answering = [c for c in classes if inspect.signature(c.run).return_annotation in kinds]
    assert len(answering) >= 10
    for kind in answering:
        assert list(inspect.signature(kind.on).parameters) == ["self", "model", "guide"], kind
        if kind is not Enumeration:
            assert list(inspect.signature(kind.sized).parameters) == ["self", "num_particles"], kind


@pytest.mark.parametrize("name", ALGORITHMS)
def test_on_is_the_algorithm_built_on_the_other_model(name):
    """Draw for draw; the algorithm itself stays on its own."""
    algorithm = ALGORITHMS[name](model)
    assert isinstance(algorithm, Algorithm)
    found = []
    for one in (algorithm.on(other), ALGORITHMS[name](other), algorithm, ALGORITHMS[name](model)):
        pyro.set_rng_seed(0)
        found.append(one.run(X))
    for a, b in (found[:2], found[2:]):
        assert torch.equal(a.samples["z"], b.samples["z"]) and torch.equal(a.log_weights, b.log_weights)
    if name != "Prompting":  # which never asks the model
        assert not torch.equal(found[0].log_weights, found[2].log_weights) or not torch.equal(
            found[0].samples["z"], found[2].samples["z"]
        )


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"Enumeration"}))
def test_sized_has_so_many_particles(name):
    algorithm = ALGORITHMS[name](model)
    assert isinstance(algorithm, Sampler)
    before = algorithm.run(X).num_particles
    assert algorithm.sized(5).run(X).num_particles == (4 if name == "MetropolisHastings" else 5)
    assert algorithm.run(X).num_particles == before


def test_another_guide_takes_the_place_of_one_that_there_is():
    def elsewhere(x):
        guide(x.flip(0))

    assert Importance(model, guide).on(model, elsewhere).guide is elsewhere
    assert Importance(model).on(model, elsewhere).guide is None
    assert Sharded(SMC(model, guide)).on(model, elsewhere).algorithm.guide is elsewhere


def test_somebody_elses_algorithm_goes_along_by_its_attributes():
    class Mine:
        def __init__(self, model, num_particles=3):
            self.model, self.num_particles = model, num_particles

        def run(self, *args):
            return Importance(self.model, num_particles=self.num_particles).run(*args)

    mine = Mine(model)
    assert on(mine, other).model is other and sized(mine, 9).run(X).num_particles == 9 and mine.num_particles == 3
    with pytest.raises(ValueError, match="budgets: Enumeration has no number of particles"):
        sized(Enumeration(model), 3)


def test_an_algorithm_within_another_is_judged_on_the_right_model():
    """Calibration simulates data: whoever looks at the given ones instead is far off."""
    for make in (ALGORITHMS["Sharded"], ALGORITHMS["VariationalEM"]):
        inner, outer = (
            diagnose(a, X, simulations=12, num_particles=8) for a in (Importance(model, num_particles=7), make(model))
        )
        rows = [
            {f.name: f.figure for f in d.findings if f.name.startswith(("SBC", "evidence"))} for d in (inner, outer)
        ]
        assert rows[0] == rows[1] and rows[0]
    exact = diagnose(Sharded(Enumeration(model)), X, simulations=20, num_particles=8)
    assert all(f.suspect is not True for f in exact.findings)


def test_bounds_on_another_model():
    """The sandwich of the other model closes around its evidence."""
    exact = Enumeration(other).run(X)
    pyro.set_rng_seed(0)
    bounds = Sandwich(model, num_particles=64, repetitions=20).on(other).sized(1000).run(X, exact_sample=exact)
    low, high = bounds.standard_errors
    assert bool((bounds.lower - 5 * low <= exact.log_evidence).all())
    assert bool((exact.log_evidence <= bounds.upper + 5 * high).all()) and float(bounds.gap.max()) < 0.2


def test_em_asks_its_e_step_on_the_model_that_it_is_given():
    task = EMTask()
    em = VariationalEM(task.model, None, Enumeration(task.model), torch.optim.SGD(task.theta, lr=0.0))
    x, y = task.args
    flipped = em.on(lambda x, y: task.model(x, y.flip(0)))
    assert torch.allclose(flipped.run(x, y).log_evidence, em.run(x, y.flip(0)).log_evidence)
