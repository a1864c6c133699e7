"""SGLD against what is known of it: on a Gaussian its law at a fixed step size is a Gaussian too."""

from __future__ import annotations

import pytest
import torch

from lmppl.inference import SGLD

CHAINS, SIGMA = 20_000, 0.5


def chains(lr: float, steps: int, temperature: float = 1.0, y: tuple[float, ...] = (1.0, 2.5), noise: float = 0.7):
    """So many independent chains of a mean with prior N(0, sigma^2), of data y = mean + noise."""
    torch.manual_seed(0)
    theta = torch.zeros(CHAINS, dtype=torch.float64, requires_grad=True)
    sampler, data = SGLD([theta], lr=lr, prior_scale=SIGMA, temperature=temperature), torch.tensor(y).double()
    for _ in range(steps):
        sampler.zero_grad()
        (0.5 * ((data[:, None] - theta) / noise).square()).sum().backward()
        sampler.step()
    return theta.detach(), data, noise


def law(lr: float, data, noise: float) -> tuple[float, float]:
    """The posterior's mean, and the variance 1 / (a (1 - lr a / 4)) of the chain with curvature a."""
    a = 1 / SIGMA**2 + len(data) / noise**2
    return float(data.sum()) / noise**2 / a, 1 / (a * (1 - lr * a / 4))


@pytest.mark.parametrize(("lr", "temperature"), [(0.02, 1.0), (0.3, 1.0), (0.02, 0.1)])
def test_it_samples_the_posterior_of_a_gaussian_mean(lr, temperature):
    """Or a power of it, whose variance is T times as large."""
    theta, data, noise = chains(lr, steps=int(6 / lr) + 20, temperature=temperature)
    mean, variance = law(lr, data, noise)
    variance *= temperature
    assert abs(float(theta.mean()) - mean) < 5 * (variance / CHAINS) ** 0.5
    assert abs(float(theta.detach().var()) - variance) < 5 * variance * (2 / CHAINS) ** 0.5
    exact = temperature * law(0.0, data, noise)[1]
    assert (variance / exact - 1 < 0.05) == (lr < 0.1)  # a small step is nearly exact, a large one is seen to be not


def test_a_parameter_without_a_gradient_follows_its_prior():
    torch.manual_seed(1)
    theta = torch.zeros(CHAINS, dtype=torch.float64, requires_grad=True)
    sampler, lr = SGLD([theta], lr=0.05, prior_scale=SIGMA), 0.05
    for _ in range(100):
        sampler.step()
    variance = SIGMA**2 / (1 - lr / SIGMA**2 / 4)
    assert abs(float(theta.detach().var()) - variance) < 5 * variance * (2 / CHAINS) ** 0.5


def test_groups_have_their_own_step_and_seeds_repeat():
    def once():
        torch.manual_seed(3)
        a, b = (torch.zeros(1000, requires_grad=True) for _ in range(2))
        SGLD([{"params": [a], "lr": 1e-4}, {"params": [b]}], lr=1.0, prior_scale=1.0).step()
        return a.detach(), b.detach()

    (a, b), again = once(), once()
    assert float(a.std()) == pytest.approx(1e-2, rel=0.2) and float(b.std()) == pytest.approx(1.0, rel=0.2)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])


@pytest.mark.parametrize("name", ["lr", "prior_scale", "temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"{name}: must be positive"):
        SGLD([torch.zeros(1, requires_grad=True)], **{"lr": 0.1, "prior_scale": 1.0} | {name: value})
