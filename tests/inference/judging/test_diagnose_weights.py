"""What `diagnose` says of weights: where they lie, what cannot be judged, and algorithms inside of others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from io import StringIO

import pyro
import pyro.distributions as dist
import pytest
import torch
from plate_of_three import P
from pyro import poutine
from rich.console import Console
from test_diagnose import CELLS, X, Y, answer, guide, model, observe, prior, sbc

from lmppl import text
from lmppl.distributions import Completion
from lmppl.inference import Enumeration, Importance, MetropolisHastings, Sharded, diagnose


def test_khat_flags_a_proposal_that_misses_mass():
    def one():
        pyro.sample("z", Completion(P, X[0], max_tokens=5))

    def through(temperature):
        return lambda: pyro.sample("z", Completion(P, X[0], max_tokens=5, temperature=temperature))

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
    assert found["ESS / N"].value == pytest.approx(1.0)
    assert "no model" in found["calibration"].meaning and not found["calibration"].checked and not found.ok


def test_zero_evidence_is_suspect(tmp_path):
    found = diagnose(Importance(model, num_particles=8), X, P.encode("ab"), simulations=2, repetitions=2)  # no stop
    assert found["ESS / N"].suspect and found["log evidence"].suspect and not found.drifts
    found.plot(tmp_path / "nothing.png")


def test_what_is_not_possible_is_said():
    found = diagnose(Importance(model, guide, 20), X, Y, repetitions=1)
    assert "the guide reads the observations" in found["calibration"].meaning and not sbc(found) and not found.ok

    def tempered():
        with poutine.scale(scale=0.5):
            pyro.sample("z", prior(X[0]))

    found = diagnose(Importance(tempered), repetitions=1)
    assert "scaled" in found["calibration"].meaning and found["calibration"].suspect is None and not found.ok
    out = StringIO()
    found.print(Console(file=out, width=100))
    assert "Not checked: calibration" in out.getvalue()
    assert diagnose(Importance(tempered), repetitions=1, simulations=0).ok  # not asked for, not missed
    for bad, name in (({"repetitions": 0}, "repetitions"), ({"simulations": -1}, "simulations")):
        with pytest.raises(ValueError, match=name):
            diagnose(Importance(tempered), **bad)
    with pytest.raises(ValueError, match=r"algorithm: expected one with run\(\*args\), .* got function"):
        diagnose(tempered)
    with pytest.raises(ValueError, match="simulate: expected a function .* got 'y'"):
        diagnose(Importance(tempered), simulate="y")  # a calibration that is not possible must not hide it


def test_an_error_on_simulated_data_is_suspect():
    """Whatever is raised, and wherever: in the algorithm, in the caller's functions, on the first data set or later."""

    class Fails(Importance):
        runs = 0

        def run(self, *args, **kwargs):
            type(self).runs += 1
            if type(self).runs > 3:
                raise IndexError("index 9 is out of bounds")
            return super().run(*args, **kwargs)

    for repetitions in (1, 3):
        Fails.runs = 0
        found = diagnose(Fails(model), X, Y, simulations=4, repetitions=repetitions)
        row = found["calibration"]
        assert row.suspect and not found.ok and "IndexError: index 9" in row.meaning
        assert bool(sbc(found)) == (repetitions == 1)  # what was done before is judged

    def wrong(args, observed):
        return args[0], observed["w"]

    found = diagnose(Importance(model, guide, 20), X, Y, simulate=wrong, simulations=1, repetitions=1)
    assert found["calibration"].suspect and "KeyError" in found["calibration"].meaning


def test_a_guide_whose_texts_are_too_short_for_the_truth():
    """The truth is wider than anything that the guide draws: impossible there, and no crash."""

    def short(x=X, y=Y):
        with pyro.plate("data", CELLS):
            pyro.sample("z", prior(x, max_tokens=0))

    found = diagnose(Importance(model, short, 30), X, Y, simulate=observe, simulations=2, repetitions=1)
    assert (
        found["evidence sandwich"].value == torch.inf and "cannot draw the truth" in found["evidence sandwich"].meaning
    )
    assert found["SBC: equal values"].suspect and found.calibration.error is None


def test_the_ess_is_that_of_the_worst_run():
    @dataclass
    class Moody:
        """Every second run puts all of its weight on one particle."""

        runs: int = 0

        def run(self):
            self.runs += 1
            found = Importance(lambda: pyro.sample("z", prior(X[0])), num_particles=50).run()
            log_weights = found.log_weights.clone()
            if self.runs % 2 == 0:
                log_weights[1:] -= 20.0
            return replace(found, log_weights=log_weights)

    found = diagnose(Moody(), repetitions=4)
    assert found["ESS / N"].suspect and found["ESS / N"].value == pytest.approx(1 / 50, rel=1e-3)


def one(x=X[:1], y=Y[:1]):
    with pyro.plate("data", 1):
        z = pyro.sample("z", prior(x))
        pyro.sample("y", answer(x, z), obs=y)


def test_markov_chains_that_are_short_or_never_move_have_no_zero_evidence():
    short = MetropolisHastings(one, num_chains=6, num_samples=3, warmup=3)
    found = diagnose(short, X[:1], Y[:1], simulations=4, repetitions=1, num_particles=8)
    names = [f.name for f in found.findings]
    assert "zero evidence" not in names and "fewer than 4 draws" in found["ESS / N"].meaning and not found.ok
    assert all(not x.isnan().any() for x in found.calibration.positions.values())

    def elsewhere(x=X[:1], y=Y[:1]):
        with pyro.plate("data", 1):
            z = pyro.sample("z", prior(x, temperature=1e-3))
            pyro.factor("never", torch.where(text.length(z) > 99, 0.0, -1.0))

    still = diagnose(
        MetropolisHastings(elsewhere, num_chains=2, num_samples=5, warmup=0), X[:1], Y[:1], simulations=0, repetitions=1
    )
    assert still["ESS / N"].figure == "-" and "zero evidence" not in [f.name for f in still.findings]

    class Apart:  # chains that are stuck at values of their own have an ESS of sorts
        def run(self):
            found = MetropolisHastings(lambda: pyro.sample("k", dist.Normal(0.0, 1.0)), num_samples=9).run()
            assert not found.ess.isnan()
            return replace(found, acceptance={"regrowth": torch.zeros(())})

    stuck = diagnose(Apart())
    assert stuck["ESS / N"].suspect and stuck["ESS / N"].meaning == "no chain ever moved"


def test_an_algorithm_inside_another_is_judged_on_the_same_model():
    found = diagnose(Sharded(Enumeration(model)), X, Y, simulations=3, repetitions=1, num_particles=16)
    assert found.ok, found.findings
