"""`diagnose` passes what is right and names what is wrong, on models whose posterior is enumerated."""

from __future__ import annotations

import json
import math
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
from rich.console import Console
from tiny import flat_lm

from benchmarks.diagnose_rates import CASES, rate
from lmppl import text
from lmppl.constraints import ban
from lmppl.distributions import Completion
from lmppl.inference import SMC, Enumeration, Importance, Posterior, Query, diagnose
from lmppl.inference.core import programs
from lmppl.inference.core.plates import kept_plates
from lmppl.inference.core.programs import Substitute
from lmppl.inference.core.weights import log_density
from lmppl.inference.judging.calibration import calibrate, position
from lmppl.inference.judging.evidence import winnings
from lmppl.inference.judging.pools import Pool, judge, member_weights, ranks

P = flat_lm(vocab=5, seed=0)
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
    """Draws of the enumerated posterior to a power (1 is right, 3 too narrow), with a bias to a token, evidence off."""

    model: Any
    num_particles: int = 60
    power: float = 1.0
    bias: float = 0.0
    off: float = 0.0

    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        support = prior(X).enumerate_support()
        trace = programs.trace(self.model, args, kwargs, Substitute({"z": support}), nesting=1, particles=len(support))
        plates = kept_plates([trace], 1)
        log_joint = log_density(trace, plates)[0]
        many = (support == P.token_id("b")).sum(-1)
        wrong = self.power * log_joint + self.bias * many
        draws = Posterior.of(trace, plates, wrong).resample(self.num_particles, "multinomial")
        return replace(draws, log_evidence=log_joint.logsumexp(0) + self.off)


@dataclass
class Reweighted:
    """Importance sampling from the prior, the weights to a power: 0 ignores the observation."""

    model: Any
    power: float = 0.0

    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        found = Importance(self.model, num_particles=60).run(*args, **kwargs)
        return replace(found, log_weights=(self.power * found.log_weights).log_softmax(0) + found.log_evidence)


def sbc(diagnosis) -> dict[str, bool | None]:
    return {f.name.removeprefix("SBC: "): f.suspect for f in diagnosis.findings if f.name.startswith("SBC")}


# -- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [Exact(model), Enumeration(model), Importance(model, num_particles=200)])
def test_what_is_right_passes(algorithm):
    found = diagnose(algorithm, X, Y, simulations=3, num_particles=32, repetitions=1)
    rows = ("length of z", "log p(z)", "log p(observed)", "log p(z, observed)", "tokens of z", "equal values")
    assert sbc(found) == dict.fromkeys(rows, False)
    assert found.ok, found.findings
    assert len(found.calibration.positions["log p(z)"]) == 3 * CELLS


def test_draws_that_are_too_narrow_fail(tmp_path):
    found = diagnose(Exact(model, power=3.0), X, Y, simulations=4, num_particles=8, repetitions=1)
    assert found["SBC: log p(z)"].suspect and "too low" not in found["SBC: log p(z)"].meaning
    assert not found.ok
    found.plot(tmp_path / "equal_weights.png")  # without a warning, which would be an error here


def test_the_prior_is_caught_by_a_statistic_of_the_data_only():
    """On average over data its draws are calibrated: a rank of z alone does not see that it ignores them."""
    found = diagnose(Reweighted(model), X, Y, simulations=6, num_particles=8, repetitions=1)
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
    assert found["SBC: tokens of z"].suspect and "'b', too seldom" in found["SBC: tokens of z"].meaning
    assert found["evidence sandwich"].suspect and found["evidence sandwich"].value == torch.inf


def long():
    """A factor asks for long texts."""
    with pyro.plate("data", CELLS):
        z = pyro.sample("z", prior(X, max_tokens=3))
        pyro.factor("long", 2.0 * text.length(z))


def learned():
    """The prior, but with a parameter: something that may have been trained."""
    temperature = pyro.param("temperature", torch.tensor(1.5))
    with pyro.plate("data", CELLS):
        pyro.sample("z", prior(X, max_tokens=3, temperature=temperature))


def test_drift_of_length_and_stop():
    """The guide's law and the posterior's are both known."""
    found = diagnose(Importance(long, learned, num_particles=300), simulations=1, repetitions=1, simulate=observe)
    fn, z = prior(X, max_tokens=3), prior(X, max_tokens=3).enumerate_support()
    with torch.no_grad():
        log_p = fn.log_prob(z)
        length = (text.length(z) - 1).double()
        for weights, figure in ((log_p, found.drifts[0].proposed), (log_p + 2 * length, found.drifts[0].posterior)):
            truth = float((weights.softmax(0) * length).sum(0).mean())
            assert abs(figure - truth) < 5 * 1.0 / (300 * CELLS) ** 0.5 * 3  # weights worth a tenth of the draws
    assert found["length of z"].suspect and "too short" in found["length of z"].meaning
    assert "factor" in found["calibration"].meaning and not found["calibration"].checked  # no forward simulation
    assert not sbc(found)


def test_nothing_drifts_where_nothing_was_trained():
    """Enumeration, the prior and a guide without parameters: weights make good what they propose."""
    fixed = Importance(long, lambda: learned_with(torch.tensor(1.5)), num_particles=60)
    for algorithm in (Enumeration(long), Importance(long, num_particles=60), SMC(long), fixed):
        found = diagnose(algorithm, simulations=0, repetitions=1)
        assert not found.drifts and not any("of z" in f.name for f in found.findings)


def learned_with(temperature):
    with pyro.plate("data", CELLS):
        pyro.sample("z", prior(X, max_tokens=3, temperature=temperature))


def test_texts_that_are_all_of_one_length_do_not_drift():
    """Weights in single precision do not add up to exactly one; that is no difference of lengths."""

    def fixed():
        z = pyro.sample("z", prior(X[0], min_tokens=3, max_tokens=3))
        pyro.factor("f", (z == 2).sum(-1).float())

    def same():
        temperature = pyro.param("temperature", torch.tensor(1.5))
        pyro.sample("z", prior(X[0], min_tokens=3, max_tokens=3, temperature=temperature))

    (length,) = diagnose(Importance(fixed, same, num_particles=301), simulations=0, repetitions=1).drifts
    assert length.posterior == pytest.approx(3.0) and not length.suspect


@pytest.mark.parametrize(("q", "misses", "lacks"), [(0.5, 0.0, 0.0), (0.9, 0.0, 0.4), (1 - 1e-9, 0.5, 0.5)])
def test_what_a_trained_guide_misses_and_what_it_lacks(q, misses, lacks):
    """Posterior (1/2, 1/2), guide (q, 1 - q): the total variation is q - 1/2; only a value never drawn is missed."""

    def coins():
        with pyro.plate("data", CELLS):
            pyro.sample("k", dist.Bernoulli(0.5))

    def tossed():
        p = pyro.param("p", torch.tensor(1 - q, dtype=torch.float64))
        with pyro.plate("data", CELLS):
            pyro.sample("k", dist.Bernoulli(p))

    found = diagnose(Importance(coins, tossed, num_particles=200), simulations=0, repetitions=1)
    for name, share in (("guide misses", misses), ("guide lacks", lacks)):
        assert found[name].value == pytest.approx(share, abs=0.05) and found[name].suspect == (share > 0.2)


def soft(rare):
    """A value that the prior draws with probability ``rare`` and that has nearly all of the posterior, softly."""

    def model():
        k = pyro.sample("k", dist.Categorical(torch.tensor([1 - 2 * rare, rare, rare])))
        pyro.factor("soft", torch.tensor([-20.0, math.log(0.42 / rare), math.log(0.58 / rare)])[k])

    def guide():
        p = pyro.param("p", torch.tensor(1.0))
        pyro.sample("k", dist.Categorical(torch.stack([1 - p, p, 0 * p])))

    return diagnose(Importance(model, guide, num_particles=100), simulations=0, repetitions=1)


def test_a_rare_value_that_the_guide_lost_is_found_though_nothing_is_impossible():
    """Of 128 draws of the model less than one is that value; it has 0.58 of the posterior."""
    found = soft(0.005)
    assert found["guide misses"].suspect and found["guide lacks"].suspect
    assert found["guide misses"].value == pytest.approx(0.58, abs=0.2)  # of some 20 effective draws


def test_what_the_models_draws_are_too_few_for_is_not_checked():
    found = soft(1e-7)
    assert not found.ok and not any(found[name].checked for name in ("guide misses", "guide lacks"))


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(0, 1000))
def test_positions_are_uniform_for_exchangeable_draws(n, seed):
    """P(position <= u) = u exactly, ties and all: the truth is one of n + 1 exchangeable numbers."""
    torch.manual_seed(seed)
    runs = 4000
    values = torch.randint(0, 3, (n + 1, runs)).double()
    weights = member_weights(torch.zeros(n, runs), torch.full((runs,), n))
    assert torch.allclose(weights, torch.full_like(weights, 1 / (n + 1)))
    u = position(values, weights).sort().values
    distance = (u - torch.arange(runs) / runs).abs().max()
    assert float(distance) < 2.23 / runs**0.5  # Kolmogorov: once in 10,000


def pools(data_sets: int, shift: float = 0.0, scale: float = 1.0, n: int = 20) -> list[Pool]:
    """Normal numbers, rounded so that many are tied; the truth is another by a shift and a scale."""
    x = torch.randn(n + 1, data_sets, dtype=torch.float64)
    x[-1] = scale * x[-1] + shift
    weights = member_weights(torch.zeros(n, data_sets), torch.full((data_sets,), n))
    x = x.round(decimals=1)
    return [Pool(weights, {"a": x, "b": -x, "c": torch.rand_like(x)}, frozenset("a"), kinds=(10 * x).long() + 99)]


def test_the_p_value_of_all_rows_together_is_exact():
    """P(the smallest p <= 0.2) = 0.2 for the truth of exchangeable pools, however the rows depend on each other."""
    least = torch.tensor([min(v.p for v in judge(pools(15)).values()) for _ in range(300)])
    assert abs(float((least <= 0.2).double().mean()) - 0.2) < 5 * (0.16 / 300) ** 0.5


@pytest.mark.parametrize(
    ("shift", "scale", "function"), [(0.7, 1.0, "rank"), (0.0, 2.0, "spread"), (0.0, 0.4, "spread")]
)
def test_shifts_and_spreads_are_found_and_told_apart(shift, scale, function):
    found = judge(pools(100, shift, scale))
    assert found["a"].p < 0.01 and found["a"].function == found["b"].function == function
    assert found["c"].p > 0.01 and (found["a"].z > 0) == (shift > 0 or scale > 1)


def test_ranks_are_shares_of_the_pool():
    x = torch.tensor([3.0, 1.0, 1.0 + 1e-6, torch.inf, -torch.inf, torch.inf])[:, None]
    weights = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.2, 0.1], dtype=torch.float64)[:, None]
    expected = torch.tensor([0.75, 0.45, 0.45, 0.9, 0.1, 0.9], dtype=torch.float64)[:, None]
    torch.testing.assert_close(ranks(x, weights), expected)


def test_bets_on_an_unbiased_evidence_do_not_win():
    """P(winnings > c) < 1 / c for ratios of mean one with a heavy tail; ratios of mean 1.5 win."""
    ratios = (1.5 * torch.randn(500, 100, dtype=torch.float64) - 1.5**2 / 2).exp()
    won = torch.tensor([winnings(r) for r in ratios])
    assert float((won > 10).double().mean()) < 0.1
    assert winnings(1.5 * (0.3 * torch.randn(100, dtype=torch.float64) - 0.045).exp()) > 1000


PLANTED = {
    "truncated support": (Importance(model, lambda x=X, y=Y: banned(), 60), {"simulate": observe}),
    "collapsed guide": (Importance(model, lambda x=X, y=Y: banned(temperature=0.2)), {"simulate": observe}),
    "data ignored": (Reweighted(model), {}),
    "evidence too high": (Exact(model, off=1.5), {}),
    "evidence too low": (Exact(model, off=-1.5), {}),
    "too narrow": (Exact(model, power=3.0), {}),
    "a token's bias": (Exact(model, bias=1.0), {}),
    "weights to the power 0.3": (Reweighted(model, power=0.3), {}),
}  # fmt: skip


def banned(**rules):
    with pyro.plate("data", CELLS):
        pyro.sample("z", prior(X, **(rules or {"allowed": ban(P, "b")})))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(name, seed):
    """At 200 data sets of a token each, whose observation tells little."""
    algorithm, options = PLANTED[name]
    assert not diagnose(algorithm, X, Y, seed=seed, simulations=5, repetitions=1, **options).ok


def test_what_is_right_is_seldom_suspected():
    """Of 8 diagnoses at the level 0.02 two or more are suspect once in a hundred times."""
    found = [diagnose(Exact(model), X, Y, seed=s, simulations=2, num_particles=16, repetitions=1).ok for s in range(8)]
    assert found.count(False) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_rates_at_the_default_settings(name):
    case = CASES[name]
    found, why = rate(case, range(4))
    assert found <= 0.25 if case.right else found >= 0.75, why


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
    assert {"k", "length of z", "log p(z)", "log p(observed)", "a"} < set(sbc(found))
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
    query = Query(model, guide, (X, Y))
    found = calibrate(algorithm, query, simulations=15, num_particles=num_particles, to_args=remember)
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
    assert found["evidence sandwich"].suspect and "above the upper bound" in found["evidence sandwich"].meaning


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
        assert image.size == (1584, 432)  # three panels: the guide was not trained
    assert [f.name for f in tmp_path.iterdir()] == ["diagnosis.png"]
