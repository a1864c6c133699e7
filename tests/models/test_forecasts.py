"""Forecasts: by hand, by brute force over pairs and over orders, and by what is known of a calibrated one."""

from __future__ import annotations

import math
from itertools import permutations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmppl.models.forecasts import (
    auroc,
    brier_score,
    calibration_error,
    hits,
    log_score,
    risk_coverage,
    selective_accuracy,
)

P = torch.tensor([[0.1, 0.4, 0.5, 0.8], [0.9, 0.6, 0.5, 0.2]], dtype=torch.float64)
Y = torch.tensor([1, 0, 1, 0])


def both(p: list[float]) -> torch.Tensor:
    return torch.tensor([[1 - q for q in p], p], dtype=torch.float64)


def test_scores_by_hand():
    assert hits(P, Y).tolist() == [1.0, 0.0, 0.5, 1.0]
    assert log_score(P, Y) == pytest.approx(math.log(0.9 * 0.4 * 0.5 * 0.8) / 4)
    assert brier_score(P, Y) == pytest.approx(2 * (0.1**2 + 0.6**2 + 0.5**2 + 0.2**2) / 4)
    assert log_score(both([0.0]), torch.tensor([1])) == -math.inf
    three = torch.tensor([[0.4], [0.4], [0.2]])
    assert hits(three, torch.tensor([1])).tolist() == [0.5] and hits(three, torch.tensor([2])).tolist() == [0.0]


def test_calibration_by_hand():
    assert calibration_error(both([0.8] * 10), torch.tensor([1] * 6 + [0] * 4)) == pytest.approx(0.2)
    # Two bins whose errors have opposite signs do not cancel: 4 of 0.9 that are half right, 4 of 0.6 all right.
    p, y = both([0.9] * 4 + [0.6] * 4), torch.tensor([1, 1, 0, 0, 1, 1, 1, 1])
    assert calibration_error(p, y) == pytest.approx((4 * 0.4 + 4 * 0.4) / 8)
    assert calibration_error(p, y, bins=1) == pytest.approx(0.0)
    # Bins of two answers begin at a half: 0.62 and 0.68 are in two of ten, but in one of five.
    p, y = both([0.62, 0.62, 0.68, 0.68]), torch.tensor([0, 0, 1, 1])
    assert calibration_error(p, y) == pytest.approx((0.62 + 0.32) / 2)
    assert calibration_error(p, y, bins=5) == pytest.approx(0.15)
    assert calibration_error(both([1.0, 0.0]), torch.tensor([1, 0])) == 0.0
    uniform = torch.full((4, 8), 0.25)
    assert calibration_error(uniform, torch.arange(8) % 4) == pytest.approx(0.0)


def test_a_calibrated_forecast_has_little_error_and_the_score_of_its_entropy():
    g, n = torch.Generator().manual_seed(0), 40_000
    p = torch.rand(n, generator=g, dtype=torch.float64)
    y = (torch.rand(n, generator=g, dtype=torch.float64) < p).long()
    pair = torch.stack([1 - p, p])
    # Ten bins of n / 10 with a binomial error of at most sqrt(0.25 / (n / 10)) each.
    assert calibration_error(pair, y) < 5 * (0.25 / (n / 10)) ** 0.5
    terms = pair.gather(0, y[None])[0].log()
    assert log_score(pair, y) == pytest.approx(-0.5, abs=5 * float(terms.std()) / n**0.5)  # the mean binary entropy
    assert brier_score(pair, y) == pytest.approx(1 / 3, abs=5 * 2 * 0.3 / n**0.5)


numbers = st.lists(st.integers(0, 4), min_size=2, max_size=12)


@given(numbers, st.integers(0, 2**12))
def test_auroc_counts_pairs(scores, bits):
    events = [bool(bits >> i & 1) for i in range(len(scores))]
    s, e = torch.tensor(scores).double(), torch.tensor(events)
    if len(set(events)) < 2:
        with pytest.raises(ValueError, match="events: .* of both kinds"):
            auroc(s, e)
        return
    pairs = [(a, b) for (a, x), (b, y) in product(zip(scores, events, strict=True), repeat=2) if x and not y]
    expected = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert auroc(s, e) == pytest.approx(expected)
    assert auroc(-s, e) == pytest.approx(1 - expected) and auroc(s.exp(), e) == pytest.approx(expected)


def test_risk_and_coverage_by_hand():
    wrong = torch.tensor([0, 0, 1, 0, 1])
    assert risk_coverage(torch.arange(5.0), wrong).tolist() == pytest.approx([0, 0, 1 / 3, 1 / 4, 2 / 5])
    assert risk_coverage(-torch.arange(5.0), wrong).tolist() == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2, 2 / 5])
    assert risk_coverage(torch.zeros(5), wrong).tolist() == pytest.approx([2 / 5] * 5)  # it knows nothing
    assert selective_accuracy(torch.arange(5.0), wrong, 0.4) == 1.0
    assert selective_accuracy(torch.arange(5.0), wrong, 0.6) == pytest.approx(2 / 3)
    assert selective_accuracy(torch.arange(5.0), wrong, 1.0) == pytest.approx(3 / 5)
    assert selective_accuracy(torch.arange(5.0), wrong, 0.01) == 1.0  # of one


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
def test_equal_scores_count_as_the_mean_over_their_orders(items):
    """And AURC is within what no score and the best score have."""
    scores, wrong = ([x[i] for x in items] for i in (0, 1))
    curves = []
    for order in permutations(range(len(items))):
        if all(scores[a] <= scores[b] for a, b in zip(order, order[1:], strict=False)):
            said = torch.tensor([float(wrong[i]) for i in order]).double()
            curves.append(said.cumsum(0) / torch.arange(1, len(items) + 1))
    found = risk_coverage(torch.tensor(scores), torch.tensor(wrong))
    torch.testing.assert_close(found, torch.stack(curves).mean(0))
    w = torch.tensor(wrong)
    assert float(risk_coverage(w.double(), w).mean()) <= float(found.mean()) + 1e-12
    assert float(found[-1]) == pytest.approx(sum(wrong) / len(wrong))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: hits(P, Y[:2]), r"expected shapes \(C, B\) and \(B,\)"),
        (lambda: brier_score(P[0], Y), "expected shapes"),
        (lambda: log_score(P.log(), Y), "sum to one"),
        (lambda: calibration_error(P * torch.nan, Y), "sum to one"),
        (lambda: auroc(torch.tensor([1.0, torch.nan]), torch.tensor([True, False])), "NaN"),
        (lambda: auroc(torch.zeros(3), torch.zeros(2)), "scores, events: expected one of each"),
        (lambda: risk_coverage(torch.zeros(0), torch.zeros(0)), "scores, wrong"),
        (lambda: selective_accuracy(torch.zeros(2), torch.zeros(2), 0.0), "coverage"),
    ],
)
def test_bad_arguments(call, said):
    with pytest.raises(ValueError, match=said):
        call()
