"""Every algorithm keeps the protocols `Algorithm` and `Sampler`, and wrappers hand them on."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pytest
import torch
from em_task import Task as EMTask
from tiny import flat_lm

import lmppl.inference
from lmppl.distributions import Completion
from lmppl.inference import (
    SMC,
    Algorithm,
    DirectPreferenceOptimization,
    Enumeration,
    GFlowNet,
    Importance,
    MetropolisHastings,
    PolicyGradient,
    Posterior,
    Prompting,
    Query,
    ReweightedWakeSleep,
    Sampler,
    Sandwich,
    Sharded,
    SupervisedFineTuning,
    VariationalEM,
    compare,
    diagnose,
)
from lmppl.inference.posterior.algorithm import on, sized

LM = flat_lm(vocab=5, dtype=torch.float64)
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


def still():
    """An optimiser that moves nothing."""
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.0)


def trained(kind):
    return lambda m: kind(m, guide, optimizer=still())


def em(m, e_step):
    return VariationalEM(m, None, e_step, still())


ALGORITHMS = {
    "Importance": lambda m: Importance(m, num_particles=7),
    "Importance, guide": lambda m: Importance(m, guide, num_particles=7),
    "SMC": lambda m: SMC(m, guide, num_particles=7),
    "Enumeration": Enumeration,
    "MetropolisHastings": lambda m: MetropolisHastings(m, num_chains=2, num_samples=3, warmup=2),
    "Prompting": lambda m: Prompting(m, guide, num_particles=7),
    "GFlowNet": trained(GFlowNet),
    "PolicyGradient": trained(PolicyGradient),
    "ReweightedWakeSleep": trained(ReweightedWakeSleep),
    "SupervisedFineTuning": trained(SupervisedFineTuning),
    "DirectPreferenceOptimization": trained(DirectPreferenceOptimization),
    "Sharded": lambda m: Sharded(Importance(m, num_particles=7)),
    "VariationalEM": lambda m: em(m, Importance(m, num_particles=7)),
}


def test_every_public_class_that_answers_with_a_posterior_keeps_the_protocol():
    """And has a row above."""
    public = [getattr(lmppl.inference, name) for name in lmppl.inference.__all__]
    classes = {c for c in public if inspect.isclass(c) and not inspect.isabstract(c) and hasattr(c, "run")}
    classes -= {Query, Sandwich}  # which answer with a Pair and with Bounds
    assert classes == {type(make(model)) for make in ALGORITHMS.values()}
    for kind in classes:
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

    @dataclass(frozen=True)
    class Frozen:
        model: Any

        def run(self, *args, num_particles=4):
            return Importance(self.model, num_particles=num_particles).run(*args)

    for mine, before in ((Mine(model), 3), (Frozen(model), 4)):
        assert sized(mine, 9).run(X).num_particles == sized(sized(mine, 5), 9).run(X).num_particles == 9
        assert mine.run(X).num_particles == before and mine.model is model
        for moved in (on(sized(mine, 9), other), sized(on(mine, other), 9)):  # in either order
            posterior = moved.run(X)
            assert posterior.num_particles == 9 and posterior.sites.query.model is other
    with pytest.raises(ValueError, match="budgets: Enumeration has no number of particles"):
        sized(Enumeration(model), 3)


class Plain:
    """Somebody's algorithm: a model and `run`, no more."""

    def __init__(self, model):
        self.model = model

    def run(self, *args, num_particles=7):
        return Importance(self.model, num_particles=num_particles).run(*args)


class Forwarding(Sampler):
    """Somebody's algorithm around another, which goes along."""

    def __init__(self, inner):
        self.inner = inner

    @property
    def model(self):
        return self.inner.model

    def run(self, *args):
        return self.inner.run(*args)

    def on(self, model, guide=None):
        return Forwarding(on(self.inner, model, guide))

    def sized(self, num_particles):
        return Forwarding(sized(self.inner, num_particles))


IMPORTANCE = Importance(model, num_particles=7)
AROUND = {
    "Sharded": Sharded(IMPORTANCE),
    "Sharded twice": Sharded(Sharded(IMPORTANCE)),
    "EM": em(model, IMPORTANCE),
    "EM of Sharded": em(model, Sharded(IMPORTANCE)),
    "Sharded EM": Sharded(em(model, IMPORTANCE)),
    "a sized Sharded": Sharded(Importance(model, num_particles=99)).sized(7),
    "a sized EM of Sharded": em(model, Sharded(Importance(model, num_particles=99))).sized(7),
    "a model and run": Plain(model),
    "that one sized": sized(sized(Plain(model), 99), 7),
    "that one within others": em(model, Sharded(Plain(model))),
    "a wrapper of somebody's": Forwarding(Sharded(Plain(model))),
}


def judgements(algorithm, **options):
    """What simulated data say of it: figures that differ wherever one draw does."""
    found = diagnose(algorithm, X, simulations=6, repetitions=1, num_particles=8, **options)
    return {f.name: f.figure for f in found.findings if f.name.startswith(("SBC", "evidence"))}


@pytest.fixture(scope="module")
def judged():
    return judgements(IMPORTANCE)


@pytest.mark.parametrize("name", AROUND)
def test_an_algorithm_within_another_is_judged_as_it_is_alone(name, judged):
    """Calibration simulates data: who looks at the given ones instead draws other weights."""
    assert judgements(AROUND[name]) == judged and judged


def test_a_trained_e_step_is_judged_as_it_is_alone():
    """Its guide goes along, and reads simulated observations from the arguments."""

    def observing(x, y):
        model(x, y)

    def reading(x, y):
        with pyro.plate("d", 2):
            pyro.sample("z", Completion(LM, LM.join(y, x), max_tokens=2))

    def simulate(args, observed):
        return args[0], observed["y"]

    net = GFlowNet(observing, reading, optimizer=still())
    rows = []
    for algorithm in (net, VariationalEM(observing, reading, net, still()), Sharded(net)):
        found = diagnose(algorithm, X, Y, simulate=simulate, simulations=4, repetitions=1, num_particles=8)
        rows.append([(f.name, f.figure) for f in found.findings])
    assert rows[0] == rows[1] == rows[2]


def test_exact_algorithms_within_others_are_not_suspected():
    for exact in (Sharded(Enumeration(model)), em(model, Sharded(Enumeration(model)))):
        found = diagnose(exact, X, simulations=20, num_particles=8)
        assert found.ok, found.findings


def test_a_wrapper_that_keeps_its_model_to_itself_is_not_judged():
    """Neither well nor ill: what it would be asked is another model than the one that it asks."""

    class Deaf(Plain):
        def __init__(self, inner):
            self.inner, self.model = inner, inner.model

        def run(self, *args):
            return self.inner.run(*args)

    class Fixed(Deaf):
        model = property(lambda self: self.inner.model)

        def __init__(self, inner):
            self.inner = inner

    for wrapper, why in ((Deaf(IMPORTANCE), "Deaf does not run the model"), (Fixed(IMPORTANCE), "Fixed.model cannot")):
        row = diagnose(wrapper, X, simulations=6, repetitions=1, num_particles=8)["calibration"]
        assert why in row.meaning and row.suspect is None and not row.checked
    with pytest.raises(ValueError, match=r"algorithm: Fixed.model cannot be set"):
        on(Fixed(IMPORTANCE), other)


def test_compare_reads_through_a_wrapper():
    """The density, the guide's network and what training cost are those of the algorithm within."""
    net = GFlowNet(model, guide, optimizer=still())
    net.training_tokens = 123
    rows = compare(model, {"alone": net, "sharded": Sharded(net)}, X, exact=Enumeration(model), seeds=1)
    alone, sharded = (replace(rows[name], name="", seconds=None) for name in ("alone", "sharded"))
    assert alone == sharded and alone.training_tokens == 123 and alone.density_tv is not None
    assert not hasattr(Sharded(Enumeration(model)), "density")


def test_bounds_are_no_posterior():
    sandwich, exact = Sandwich(model), Enumeration(model).run(X)

    class Bounding(Plain):
        def run(self, *args):
            return sandwich.run(*args, exact_sample=exact)

    for ask in (
        lambda a: diagnose(a, X),
        lambda a: compare(model, {"bounds": a}, X),
        lambda a: Sharded(a).run(X),
    ):
        with pytest.raises(ValueError, match=r"Bounding.run\(\*args\) returns a Bounds, expected a Posterior"):
            ask(Bounding(model))
    with pytest.raises(ValueError, match="algorithm: expected one with .model and .run, got Sandwich"):
        Sharded(sandwich)


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


def test_the_base_classes_write_on_and_sized():
    class Mine(Sampler):
        def __init__(self, model, num_particles=3):
            self.model, self.num_particles = model, num_particles

        def run(self, *args) -> Posterior:
            return Importance(self.model, num_particles=self.num_particles).run(*args)

    mine = Mine(model)
    assert isinstance(mine, Algorithm) and mine.guide is None
    assert mine.on(other).model is other and mine.sized(5).num_particles == 5
    assert mine.model is model and mine.num_particles == 3
    with pytest.raises(ValueError, match="num_particles: must be at least 1"):
        mine.sized(0)
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (Algorithm,), {})()  # without run
