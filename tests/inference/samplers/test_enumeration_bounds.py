"""Partial enumeration: certified bounds of the evidence, the mass left out, and spaces too large to hold."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from brute_force import LMS, SEED, Y, as_dict, assert_same, brute, infilling
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import flat_lm

from lmppl import text
from lmppl.distributions import Completion
from lmppl.engine.tuning import TUNING
from lmppl.inference import Enumeration


@settings(max_examples=40)
@given(
    SEED,
    st.sampled_from(["", "a", "ba"]),
    st.floats(0.05, 0.99),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(1, 100),
)
def test_partial_enumerations_have_certified_bounds(seed, x, mass, scale, max_support):
    lm = LMS[seed]
    x, y = lm.encode(x), lm.encode(Y, stop="eos")
    support, log_joint = brute(lm, x, y, scale=scale)
    prior = as_dict(support, Completion(lm, x, max_tokens=3).log_prob(support).detach())
    found = Enumeration(infilling(lm, x, y, scale=scale), mass=mass, max_support=max_support).run()
    weights = as_dict(found.samples["z"], found.log_weights)
    n = len(weights)
    assert n <= max_support
    assert float(found.unexplored) == pytest.approx(1 - sum(math.exp(prior[z]) for z in weights), abs=1e-9)
    assert n == max_support or float(found.unexplored) <= 1 - mass
    # No text more than needed.
    assert n == 1 or float(found.unexplored) + math.exp(min(prior[z] for z in weights)) > 1 - mass
    assert_same(weights, {z: w for z, w in as_dict(support, log_joint).items() if z in weights})
    lower, upper = found.log_evidence_bounds
    truth = float(log_joint.logsumexp(0))
    assert float(lower) - 1e-9 <= truth <= float(upper) + 1e-9
    assert lower == found.log_evidence
    if scale < 1 and n < len(support):
        assert upper == torch.inf
    else:
        expected = math.log(math.exp(float(lower)) + float(found.unexplored) ** scale)
        assert float(upper) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=20)
@given(SEED, st.integers(1, 100))
def test_a_full_support_holds_the_most_probable_texts(seed, max_support):
    lm = LMS[seed]
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")
    fn = Completion(lm, x, max_tokens=3)
    best = fn.log_prob(fn.enumerate_support()).detach().sort(descending=True).values[:max_support]
    found = Enumeration(infilling(lm, x, y), max_support=max_support).run()
    assert torch.allclose(found.log_prior, best)


def test_factors_leave_the_upper_end_open_unless_bounded():
    lm = LMS[0]
    x = lm.encode("a")

    def model():
        z = pyro.sample("z", Completion(lm, x, max_tokens=3))
        pyro.factor("reward", 0.5 * text.length(z).double())

    complete = Enumeration(model).run()
    lower, upper = complete.log_evidence_bounds
    assert lower == upper == complete.log_evidence
    partial = Enumeration(model, mass=0.8).run()
    assert partial.log_evidence_bounds[1] == torch.inf
    bounded = Enumeration(model, mass=0.8, factor_bound=2.0).run()
    assert bounded.log_evidence_bounds[0] <= complete.log_evidence <= bounded.log_evidence_bounds[1] < torch.inf


def test_pruned_mass_is_accounted_for_and_the_floor_lowered(monkeypatch):
    lm = LMS[0]
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")
    usual = Enumeration(infilling(lm, x, y), mass=0.97).run()
    floor = -1.0  # far too high: most of the mass falls below
    monkeypatch.setattr(TUNING, "least", math.exp(floor) / 0.03)
    found = Enumeration(infilling(lm, x, y), mass=0.97).run()
    assert float(found.log_prior.min()) < floor
    assert float(found.unexplored) <= 0.03
    assert_same(as_dict(found.samples["z"], found.log_weights), as_dict(usual.samples["z"], usual.log_weights))


def test_too_many_nodes_to_hold(monkeypatch):
    """Forgotten nodes count as unexplored, with a finite upper bound."""
    lm = LMS[0]
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")
    truth = Enumeration(infilling(lm, x, y)).run().log_evidence
    monkeypatch.setattr(TUNING, "waiting", 1)
    monkeypatch.setattr(TUNING, "nodes", 2)
    for mass in (0.9, 1.0):
        found = Enumeration(infilling(lm, x, y), mass=mass, max_support=3).run()
        assert len(found.log_weights) == 3
        assert float(found.unexplored) == pytest.approx(1 - float(found.log_prior.exp().sum()), abs=1e-9)
        assert found.log_evidence_bounds[0] <= truth <= found.log_evidence_bounds[1]


def test_a_large_vocabulary_stays_within_its_means():
    """26 letters and 12 tokens: 26^12 texts; the most probable are found, the rest is bounded."""
    lm = flat_lm(vocab=26, seed=1)
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")
    found = Enumeration(infilling(lm, x, y, max_tokens=12), max_support=300).run()
    assert len(found.log_weights) == 300
    fn = Completion(lm, x, max_tokens=12)
    assert torch.allclose(fn.log_prob(found.samples["z"]), found.log_prior, atol=1e-9)
    # Nothing drawn beats the worst text that was kept and is not among them.
    drawn = fn.sample((500,)).unique(dim=0)
    log_p = fn.log_prob(drawn).detach()
    missed = found.log_prob(drawn).isnan()
    assert float(log_p[missed].max()) <= float(found.log_prior.min()) + 1e-4
    lower, upper = found.log_evidence_bounds
    assert lower < upper < torch.inf
