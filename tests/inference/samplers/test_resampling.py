"""The contract of a resampling scheme, passed by every one of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lmppl.inference.core.resampling import SCHEMES, conditional

WEIGHTS = st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda w: sum(w) > 1e-3)


def counts(chosen: Tensor, size: int) -> Tensor:
    """How often each of ``size`` particles was chosen: (n, *plates) -> (size, *plates)."""
    shape = (size, *[1] * chosen.dim())
    return (chosen == torch.arange(size).view(shape)).sum(1)


def normalised(weights: list[float]) -> Tensor:
    w = torch.tensor(weights, dtype=torch.float64)
    return w / w.sum()


def unbiased(found: Tensor, expected: Tensor) -> None:
    """Mean counts (size, repeats) within 5 standard errors, or exact where they do not vary."""
    mean, error = found.double().mean(-1), found.double().std(-1) / found.shape[-1] ** 0.5
    assert bool(((mean - expected).abs() <= 5 * error + 1e-9).all()), (mean, error)


@pytest.mark.parametrize("scheme", SCHEMES)
class TestContract:
    """Each scheme maps normalised weights (N, *plates) to n indices (n, *plates)."""

    @pytest.mark.parametrize("n", [1, 3, 5, 7, 40])
    def test_expected_counts(self, scheme, n):
        """E[count] = n w."""
        weights = torch.tensor([0.4, 0.0, 0.05, 0.35, 0.2], dtype=torch.float64)
        chosen = SCHEMES[scheme](weights[:, None].expand(5, 20_000), n)
        assert chosen.shape == (n, 20_000) and chosen.dtype == torch.long
        unbiased(counts(chosen, 5), n * weights)

    @given(weights=WEIGHTS, n=st.integers(1, 40))
    def test_counts_are_bounded(self, scheme, weights, n):
        """n particles, none of weight zero; systematic: floor or ceil of n w; residual: at least the floor;
        stratified: an interval of n w strata meets at most floor + 2 of them, and covers at least floor - 1.
        """
        w = normalised(weights)
        found = counts(SCHEMES[scheme](w, n), len(w))
        assert int(found.sum()) == n and not bool(found[w == 0].any())
        least, most = (n * w + 1e-9).floor(), (n * w - 1e-9).ceil()
        slack = {"systematic": (0, 0), "stratified": (1, 1), "residual": (0, n), "multinomial": (n, n)}[scheme]
        assert bool((found >= least - slack[0]).all()) and bool((found <= most + slack[1]).all())

    def test_plates_are_independent(self, scheme):
        """Each plate element has its own weights and its own draws."""
        generator = torch.Generator().manual_seed(1)
        weights = torch.rand(4, 2, 3, generator=generator).softmax(0)
        chosen = SCHEMES[scheme](weights[..., None].expand(4, 2, 3, 4000), 5)  # (5, 2, 3, repeats)
        assert chosen.shape == (5, 2, 3, 4000)
        found = counts(chosen, 4).double()
        for i in range(2):
            for j in range(3):
                unbiased(found[:, i, j], 5 * weights[:, i, j].double())
        elements = found[0].flatten(0, 1)  # (6, repeats): the first particle's counts
        correlation = torch.corrcoef(elements[elements.std(1) > 0])
        assert float((correlation - torch.eye(len(correlation))).abs().max()) < 5 / 4000**0.5

    def test_the_default_is_as_many_as_there_are(self, scheme):
        assert SCHEMES[scheme](torch.full((6, 2), 1 / 6)).shape == (6, 2)

    def test_all_the_weight_on_one(self, scheme):
        weights = torch.zeros(5, 3)
        weights[torch.tensor([4, 0, 2]), torch.arange(3)] = 1.0
        assert torch.equal(SCHEMES[scheme](weights, 7), torch.tensor([[4, 0, 2]]).expand(7, 3))


def test_equal_weights_lose_no_particle():
    for scheme in ("systematic", "residual"):
        assert torch.equal(SCHEMES[scheme](torch.full((8,), 1 / 8)).sort().values, torch.arange(8))


def test_variance_of_counts_by_scheme():
    """Multinomial is the worst: n w (1 - w); systematic's is the least there is."""
    weights = torch.tensor([0.43, 0.27, 0.18, 0.12], dtype=torch.float64)
    n, repeats = 10, 40_000
    spread = {
        name: counts(scheme(weights[:, None].expand(4, repeats), n), 4).double().var(-1).sum()
        for name, scheme in SCHEMES.items()
    }
    multinomial = float((n * weights * (1 - weights)).sum())
    assert float(spread["multinomial"]) == pytest.approx(multinomial, rel=0.05)
    fraction = n * weights - (n * weights).floor()
    rest = fraction.sum()
    residual = float((fraction * (1 - fraction / rest)).sum())
    assert float(spread["residual"]) == pytest.approx(residual, rel=0.05)
    least = float((fraction * (1 - fraction)).sum())  # no integer of this mean varies less
    assert float(spread["systematic"]) == pytest.approx(least, rel=0.05)
    assert 0.95 * least < float(spread["stratified"]) < multinomial


def test_conditional_resampling_is_multinomial_given_a_child_of_the_first():
    """E[count_i] = 1[i = 0] + (N - 1) w_i."""
    weights = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    chosen = conditional(weights[:, None].expand(4, 20_000))
    assert chosen.shape == (4, 20_000) and not bool(chosen[0].any())
    unbiased(counts(chosen, 4), torch.tensor([1.0, 0, 0, 0]) + 3 * weights)
    assert torch.equal(conditional(torch.ones(1, 5)), torch.zeros(1, 5, dtype=torch.long))
