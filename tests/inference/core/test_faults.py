"""Faults of a program: every algorithm says which site it is, or gives the right answer."""

from __future__ import annotations

import peft
import pyro
import pyro.distributions as dist
import pytest
import torch
from tiny import flat_lm

from lmppl import text
from lmppl.distributions import Completion
from lmppl.inference import (
    SMC,
    Enumeration,
    GFlowNet,
    Importance,
    MetropolisHastings,
    PolicyGradient,
    Prompting,
    ReweightedWakeSleep,
    SubTB,
    VarGrad,
)

P = flat_lm(vocab=5, seed=0, dtype=torch.float64)
Q = P.with_adapter(peft.LoraConfig(r=2, target_modules="all-linear"))
X, Y = P.encode(["a", "b", "ba"]), P.encode(["ab", "b", ""], stop="eos")
N = 5


def sgd():
    return torch.optim.SGD(Q.trainable_parameters(), lr=0.0)


RUNS = {
    "importance": lambda m, g: Importance(m, num_particles=N).run(),
    "importance, guide": lambda m, g: Importance(m, g, num_particles=N).run(),
    "smc": lambda m, g: SMC(m, num_particles=N).run(),
    "smc, guide": lambda m, g: SMC(m, g, num_particles=N).run(),
    "enumeration": lambda m, g: Enumeration(m).run(),
    "metropolis": lambda m, g: MetropolisHastings(m, num_chains=N, num_samples=2, warmup=1).run(),
    "metropolis, guide": lambda m, g: MetropolisHastings(m, g, num_chains=N, num_samples=2, warmup=1).run(),
    "prompting": lambda m, g: Prompting(m, g, N).run(),
    "VarGrad": lambda m, g: GFlowNet(m, g, VarGrad(num_particles=N), optimizer=sgd()).step(),
    "SubTB": lambda m, g: GFlowNet(m, g, SubTB(num_particles=N), optimizer=sgd()).step(),
    "wake-sleep": lambda m, g: ReweightedWakeSleep(m, g, optimizer=sgd(), num_particles=N).step(),
    "policy gradient": lambda m, g: PolicyGradient(m, g, optimizer=sgd(), num_particles=N).step(),
}
GUIDED = [name for name in RUNS if name not in ("importance", "smc", "enumeration", "metropolis")]


def plated(inside=None, outside=None, name="z", plate="data"):
    def model():
        with pyro.plate(plate, 3):
            z = pyro.sample(name, Completion(P, X, max_tokens=2))
            pyro.sample("y", Completion(P, P.join(X, z), max_tokens=2), obs=Y)
            if inside is not None:
                pyro.factor("f", inside(z))
        if outside is not None:
            pyro.factor("f", outside(z))

    return model


def guide():
    with pyro.plate("data", 3):
        pyro.sample("z", Completion(Q, X, max_tokens=2))


def size(z):
    return text.length(z).double()


WRONG_SHAPES = {
    "no plate's": plated(lambda z: torch.zeros(2)),
    "no axis of the plate": plated(lambda z: size(z).sum(-1)),
    "an axis too many": plated(lambda z: size(z).expand(7, *size(z).shape)),
    "summed without its axis": plated(outside=lambda z: size(z).sum(-1)),
    "summed over particles": plated(outside=lambda z: size(z).sum()),
    "a condition": plated(lambda z: size(z) > 1),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_a_factor_of_the_wrong_shape(case, run):
    if (case, run) == ("summed over particles", "prompting"):
        RUNS[run](WRONG_SHAPES[case], guide)  # asks no density of the model
        return
    said = "site 'z'" if run == "enumeration" and "summed" in case else "site 'f'"  # the plate is not kept: refused
    with pytest.raises(ValueError, match=said):
        RUNS[run](WRONG_SHAPES[case], guide)


@pytest.mark.parametrize(
    "factor", [0.5, torch.tensor(0.5), [0.5] * 3, torch.full((3,), 0.5), 2, torch.tensor([2, 2, 2])]
)
def test_factors_of_other_kinds_count(factor):
    plain, more = (Enumeration(plated(f)).run().log_evidence for f in (None, lambda z: factor))
    torch.testing.assert_close(more - plain, torch.as_tensor(factor).double().expand(3))


@torch.no_grad()
def test_a_factor_outside_its_plate_with_all_axes_is_summed():
    """log Z = sum over the plate: each element has its own factor, whether it stands inside or outside."""
    each = Enumeration(plated(size)).run().log_evidence
    for algorithm in (Importance, SMC):
        pyro.set_rng_seed(0)
        found = algorithm(plated(outside=size), num_particles=20_000).run()
        assert found.log_weights.shape == (20_000,)
        w = (found.log_weights - found.log_evidence).exp()
        error = float((w * w).sum().sqrt())  # relative, at most
        assert abs(float((found.log_evidence - each.sum()).exp()) - 1) < 5 * error < 0.5


@pytest.mark.parametrize("run", RUNS)
def test_a_site_that_is_called_like_an_internal_plate(run):
    def own_guide():
        with pyro.plate("data", 3):
            pyro.sample("lmppl_particles", Completion(Q, X, max_tokens=2))

    for model, q, name in (
        (plated(name="lmppl_particles"), own_guide, "lmppl_particles"),
        (plated(plate="lmppl_prefixes"), guide, "lmppl_prefixes"),
    ):
        with pytest.raises(ValueError, match=f"site '{name}': this name is reserved"):
            RUNS[run](model, q)


@pytest.mark.parametrize("run", RUNS)
def test_the_same_name_twice(run):
    def texts():
        with pyro.plate("data", 3):
            z = pyro.sample("z", Completion(P, X, max_tokens=2))
            pyro.sample("z", Completion(P, P.join(X, z), max_tokens=2))
            pyro.sample("y", Completion(P, P.join(X, z), max_tokens=2), obs=Y)

    def factors():
        plated(lambda z: torch.zeros(3))()
        pyro.factor("f", torch.zeros(()))

    for model, name in ((texts, "z"), (factors, "f")):
        with pytest.raises(ValueError, match=f"site '{name}': the program has two sites of this name"):
            RUNS[run](model, guide)


@pytest.mark.parametrize("run", GUIDED)
def test_a_guide_that_draws_a_number_for_a_text(run):
    def q():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Categorical(torch.ones(5)))

    with pytest.raises(ValueError, match="guide: the site 'z' is a Categorical with 0 event axes, the model's a Com"):
        RUNS[run](plated(), q)


@pytest.mark.parametrize("run", GUIDED)
def test_a_guide_without_the_models_plate(run):
    def bare():
        pyro.sample("z", Completion(Q, X, max_tokens=2))

    with pytest.raises(ValueError, match="site 'z'.*plate"):
        RUNS[run](plated(), bare)


def test_a_guide_whose_plate_has_another_name_has_joint_weights():
    def other():
        with pyro.plate("questions", 3):
            pyro.sample("z", Completion(Q, X, max_tokens=2))

    pyro.set_rng_seed(0)
    found = Importance(plated(), other, num_particles=20_000).run()
    exact = Enumeration(plated()).run().log_evidence.sum()
    w = (found.log_weights - found.log_evidence).exp()
    assert found.log_weights.shape == (20_000,)
    assert abs(float((found.log_evidence - exact).exp()) - 1) < 5 * float((w * w).sum().sqrt()) < 0.5


def branching():
    b = pyro.sample("b", dist.Bernoulli(0.5))
    pyro.factor("f", torch.tensor(1.0) if b > 0 else torch.tensor(0.0))


def counting():
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    pyro.factor("f", torch.tensor(float(sum(range(int(k))))))


def reading():
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    pyro.factor("f", torch.tensor(float(k.item())))


UNGUIDED = {name: RUNS[name] for name in ("importance", "smc", "enumeration", "metropolis")}


@pytest.mark.parametrize("run", UNGUIDED)
@pytest.mark.parametrize("model", [branching, counting, reading])
def test_a_latent_that_steers_python(model, run):
    with pytest.raises(ValueError, match=r"model or guide: .*poutine.mask"):
        UNGUIDED[run](model, None)


def test_an_observation_that_does_not_fit():
    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("o", dist.Normal(m, 1.0), obs=torch.zeros(7))

    for run in ("importance", "smc", "metropolis"):
        for n in (N, 7):  # as many as particles, too
            with pytest.raises(ValueError, match="site 'o'"):
                {
                    "importance": lambda n=n: Importance(model, num_particles=n),
                    "smc": lambda n=n: SMC(model, num_particles=n),
                    "metropolis": lambda n=n: MetropolisHastings(model, num_chains=n, num_samples=2),
                }[run]().run()


# -- inference inside a program --------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_a_program_may_run_an_algorithm_inside_its_plates(run):
    def author():
        with pyro.plate("letters", 2):
            z = pyro.sample("z", Completion(P, X[:2], max_tokens=1))
            pyro.factor("long", 0.5 * text.length(z))

    known = Enumeration(author).run().log_evidence.sum()

    def found(strength):
        pyro.set_rng_seed(0)
        result = RUNS[run](plated(lambda z: strength() * text.length(z)), guide)
        return result["loss"] if isinstance(result, dict) else result.log_weights.tolist()

    inside = found(lambda: Enumeration(author).run().log_evidence.sum())
    assert inside == found(lambda: known)
