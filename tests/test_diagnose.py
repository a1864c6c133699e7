"""`diagnose` passes what is right and names what is wrong, on models whose posterior is enumerated."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from io import StringIO
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plate_of_three import P
from pyro import poutine
from rich.console import Console

from lmppl import text
from lmppl.constraints import ban
from lmppl.distributions import Completion
from lmppl.inference import Enumeration, Importance, Posterior, diagnose, programs
from lmppl.inference.diagnose.calibration import calibrate, position, uniformity
from lmppl.inference.programs import Replay
from lmppl.inference.weights import kept_plates, log_density

CELLS = 40  # a plate element is a data set of its own
X = P.encode(["a", "", "ba", "c"] * 10)
Y = P.encode(["b", "a", "", "c"] * 10, stop="eos")


def prior(x, **rules) -> Completion:
    return Completion(P, x, **{"max_tokens": 2, "temperature": 1.5, **rules})


def answer(x, z) -> Completion:
    return Completion(P, P.join(x, z), max_tokens=1)


def model(x=X, y=Y):
    with pyro.plate("data", CELLS):
        z = pyro.sample("z", prior(x))
        pyro.sample("y", answer(x, z), obs=y)


def guide(x=X, y=Y):
    with pyro.plate("data", CELLS):
        pyro.sample("z", prior(x, temperature=2.0))


def observe(args: tuple, observed: dict) -> tuple:
    return (args[0], observed["y"])


@dataclass
class Exact:
    """Draws of the enumerated posterior, raised to a power: 1 is right, 3 too narrow, 0.2 too wide."""

    model: Any
    num_particles: int = 60
    power: float = 1.0

    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        support = prior(X).enumerate_support()
        trace = programs.trace(self.model, args, kwargs, Replay({"z": support}), nesting=1, particles=len(support))
        plates = kept_plates([trace], 1)
        log_joint = log_density(trace, plates)[0]
        draws = Posterior.of(trace, plates, self.power * log_joint).resample(self.num_particles, "multinomial")
        return replace(draws, log_evidence=log_joint.logsumexp(0))


@dataclass
class Prior:
    """Draws that ignore the observation."""

    model: Any

    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        blind = Importance(self.model, num_particles=60).run(*args, **kwargs)
        return replace(blind, log_weights=torch.full_like(blind.log_weights, -60.0).log_softmax(0))


def sbc(diagnosis) -> dict[str, bool | None]:
    return {f.name.removeprefix("SBC: "): f.suspect for f in diagnosis.findings if f.name.startswith("SBC")}


# -- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [Exact(model), Enumeration(model), Importance(model, num_particles=200)])
def test_what_is_right_passes(algorithm):
    found = diagnose(algorithm, X, Y, simulations=3, num_particles=32, repetitions=1)
    assert sbc(found) == {"length of z": False, "log p(z)": False, "log p(observed)": False}
    assert found.ok, found.findings
    assert len(found.calibration.positions["log p(z)"]) == 3 * CELLS


def test_draws_that_are_too_narrow_fail(tmp_path):
    found = diagnose(Exact(model, power=3.0), X, Y, simulations=4, num_particles=8, repetitions=1)
    assert found["SBC: log p(z)"].suspect and "too low" not in found["SBC: log p(z)"].meaning
    assert not found.ok
    found.plot(tmp_path / "equal_weights.png")  # without a warning, which would be an error here


def test_the_prior_is_caught_by_a_statistic_of_the_data_only():
    """On average over data its draws are calibrated: a rank of z alone does not see that it ignores them."""
    found = diagnose(Prior(model), X, Y, simulations=6, num_particles=8, repetitions=1)
    assert not found["SBC: length of z"].suspect and not found["SBC: log p(z)"].suspect
    assert found["SBC: log p(observed)"].suspect
    assert "too low" in found["SBC: log p(observed)"].meaning


def test_a_guide_that_cannot_draw_the_truth_is_named():
    def banned(x=X, y=Y):
        with pyro.plate("data", CELLS):
            pyro.sample("z", prior(x, allowed=ban(P, "b")))

    found = diagnose(
        Importance(model, banned, 100), X, Y, simulate=observe, simulations=4, num_particles=8, repetitions=1
    )
    assert found["SBC: log p(z)"].suspect
    assert found["evidence sandwich"].suspect and found["evidence sandwich"].value == torch.inf


def test_drift_of_length_and_stop():
    """The guide's law and the posterior's are both known: a factor asks for long texts."""

    def long():
        with pyro.plate("data", CELLS):
            z = pyro.sample("z", prior(X, max_tokens=3))
            pyro.factor("long", 2.0 * text.length(z))

    found = diagnose(Importance(long, num_particles=300), simulations=1, repetitions=1)
    fn, z = prior(X, max_tokens=3), prior(X, max_tokens=3).enumerate_support()
    with torch.no_grad():
        log_p = fn.log_prob(z)
        length = (text.length(z) - 1).double()
        for weights, figure in ((log_p, found.drifts[0].proposed), (log_p + 2 * length, found.drifts[0].posterior)):
            truth = float((weights.softmax(0) * length).sum(0).mean())
            assert abs(figure - truth) < 5 * 1.0 / (300 * CELLS) ** 0.5 * 3  # weights worth a tenth of the draws
    assert found["length of z"].suspect and "too short" in found["length of z"].meaning
    assert any("factor" in note for note in found.notes)  # no forward simulation, and it says so
    assert not sbc(found)


def test_texts_that_are_all_of_one_length_do_not_drift():
    """Weights in single precision do not add up to exactly one; that is no difference of lengths."""

    def fixed():
        z = pyro.sample("z", prior(X[0], min_tokens=3, max_tokens=3))
        pyro.factor("f", (z == 2).sum(-1).float())

    (length,) = diagnose(Importance(fixed, num_particles=301), simulations=0, repetitions=1).drifts
    assert length.posterior == pytest.approx(3.0) and not length.suspect


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(0, 1000))
def test_positions_are_uniform_for_exchangeable_draws(n, seed):
    """P(position <= u) = u exactly, ties and all: the truth is one of n + 1 exchangeable numbers."""
    torch.manual_seed(seed)
    runs = 4000
    values = torch.randint(0, 3, (n + 1, runs)).double()
    posterior = Posterior({}, torch.zeros(n, runs), torch.zeros(runs), None)  # type: ignore[arg-type]
    u = position(values[:-1], values[-1], posterior).double().sort().values
    distance = (u - torch.arange(runs) / runs).abs().max()
    assert float(distance) < 2.23 / runs**0.5  # Kolmogorov: once in 10,000


def test_the_chi_square_is_one():
    """Its p-values are uniform under uniform positions, and tiny under others."""
    p = torch.tensor([uniformity(torch.rand(160)) for _ in range(400)])
    assert abs(float((p < 0.1).double().mean()) - 0.1) < 5 * (0.09 / 400) ** 0.5
    assert uniformity(torch.rand(160) ** 2) < 1e-6
    assert uniformity(torch.rand(10)) != uniformity(torch.rand(10))  # NaN: too few


def test_ordinary_sites_and_statistics_of_ones_own():
    def program(y=None):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)))
        z = pyro.sample("z", prior(X[0], temperature=1.0 + k))
        pyro.sample("y", Completion(P, P.join(X[0], z), max_tokens=1), obs=Y[0] if y is None else y)

    def begins_with_a(samples):
        return (samples["z"][..., 0] == P.token_id("a")).double()

    found = diagnose(
        Enumeration(program), simulations=30, repetitions=1, num_particles=8, statistics={"a": begins_with_a}
    )
    assert set(sbc(found)) == {"k", "length of z", "log p(z)", "log p(observed)", "a"}
    assert not any(sbc(found).values())


# -- evidence --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("num_particles", [2, 16])
def test_the_sandwich_holds_the_evidence(num_particles):
    """E[exp(lower) / Z] = 1 and E[Z / exp(upper)] = 1, each within 5 standard errors; so lower < log Z < upper."""
    seen = []

    def remember(args, observed):
        seen.append(observed["y"])
        return observe(args, observed)

    algorithm = Importance(model, guide, num_particles)
    found = calibrate(algorithm, (X, Y), {}, simulations=15, num_particles=num_particles, to_args=remember)
    z = prior(X).enumerate_support()
    exact = prior(X).log_prob(z) + torch.stack([answer(X, z).log_prob(y) for y in seen])
    exact = exact.logsumexp(1).flatten()  # (data sets, K, cells) -> (data sets * cells)
    for ratio in ((found.lowers - exact).exp(), (exact - found.uppers).exp()):
        error = float(ratio.std()) / len(ratio) ** 0.5
        assert abs(float(ratio.mean()) - 1) < 5 * error and error < 0.1
    assert float((found.lowers - exact).mean()) < 0 < float((found.uppers - exact).mean())


def test_an_evidence_that_is_too_high_is_found():
    @dataclass
    class Boastful:
        model: Any

        def run(self, *args, **kwargs):
            posterior = Importance(self.model, num_particles=60).run(*args, **kwargs)
            return replace(posterior, log_evidence=posterior.log_evidence + 1.0)

    found = diagnose(Boastful(model), X, Y, simulations=4, num_particles=8, repetitions=1)
    assert found["evidence sandwich"].suspect and "wrong way round" in found["evidence sandwich"].meaning


# -- weights ---------------------------------------------------------------------------------------------------------


def test_khat_flags_a_proposal_that_misses_mass():
    def one():
        pyro.sample("z", prior(X[0], max_tokens=5, temperature=1.0))

    def through(temperature):
        return lambda: pyro.sample("z", prior(X[0], max_tokens=5, temperature=temperature))

    narrow = diagnose(Importance(one, through(0.35), 1000), simulations=0)
    broad = diagnose(Importance(one, through(0.8), 1000), simulations=0)
    assert narrow["Pareto k-hat"].suspect and "misses posterior mass" in narrow["Pareto k-hat"].meaning
    assert broad["Pareto k-hat"].suspect is False and not broad["ESS / N"].suspect
    assert narrow["ESS / N"].value < broad["ESS / N"].value


def test_without_a_model_only_the_weights_are_judged():
    class Opaque:
        def run(self):
            return Importance(lambda: pyro.sample("z", prior(X[0]))).run()

    found = diagnose(Opaque())
    assert found["ESS / N"].value == pytest.approx(1.0) and any("no model" in note for note in found.notes)


def test_zero_evidence_is_suspect(tmp_path):
    found = diagnose(Importance(model, num_particles=8), X, P.encode("ab"), simulations=2, repetitions=2)  # no stop
    assert found["ESS / N"].suspect and found["log evidence"].suspect and not found.drifts
    found.plot(tmp_path / "nothing.png")


def test_what_is_not_possible_is_said():
    found = diagnose(Importance(model, guide, 20), X, Y, repetitions=1)
    assert any("the guide reads the observations" in note for note in found.notes) and not sbc(found)

    def tempered():
        with poutine.scale(scale=0.5):
            pyro.sample("z", prior(X[0]))

    assert any("scaled" in note for note in diagnose(Importance(tempered), repetitions=1).notes)
    for bad, name in (({"repetitions": 0}, "repetitions"), ({"simulations": -1}, "simulations")):
        with pytest.raises(ValueError, match=name):
            diagnose(Importance(tempered), **bad)
    with pytest.raises(ValueError, match="algorithm"):
        diagnose(3)


# -- what comes out --------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_verdict_and_leaves_the_generator_alone(tmp_path):
    algorithm, options = (
        Importance(model, guide, 60),
        {"simulate": observe, "simulations": 1, "num_particles": 8, "repetitions": 2},
    )
    torch.manual_seed(7)
    a = diagnose(algorithm, X, Y, **options)
    state = torch.get_rng_state()
    b = diagnose(algorithm, X, Y, **options)
    c = diagnose(algorithm, X, Y, seed=1, **options)
    assert a.to_json() == b.to_json() != c.to_json()
    assert torch.equal(state, torch.get_rng_state())
    json.dumps(a.to_json(), allow_nan=False)

    out = StringIO()
    a.print(Console(file=out, width=100))
    for finding in a.findings:
        assert finding.name in out.getvalue() and finding.figure in out.getvalue()
    a.plot(tmp_path / "diagnosis.png")
    with Image.open(tmp_path / "diagnosis.png") as image:
        assert image.size == (2112, 432)  # four panels
    assert [f.name for f in tmp_path.iterdir()] == ["diagnosis.png"]
