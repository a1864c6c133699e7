"""Policy gradients: each gradient is the formula, and the optimum is where mathematics says."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from four_texts import One, close, gradient, still
from problems import adapted, lm_guide, one_text

from lmppl.inference import PolicyGradient, VarGrad
from lmppl.inference.core.plates import Plates
from lmppl.inference.training.densities import Densities

TARGETS = [("likelihood", 1.0, 1.0), ("likelihood", 0.5, 1.0), ("likelihood", 1.0, 2.0), ("joint", 2.0, 1.0)]


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
def test_on_the_elbo_it_is_vargrad_on_the_same_draws(lm, algorithm):
    """Matched KL, leave-one-out baseline: grad = N / (2 (N-1)) grad VarGrad; PPO of one epoch alike."""
    guide_lm = adapted(lm)
    found, guide, N = one_text(lm), lm_guide(guide_lm), 7
    parameters = guide_lm.trainable_parameters()
    pyro.set_rng_seed(0)
    loss = VarGrad(num_particles=N).differentiable_loss(found.model, guide)
    expected = [g * N / (2 * (N - 1)) for g in torch.autograd.grad(loss, parameters)]
    assert max(g.abs().max() for g in expected) > 0.1
    pyro.set_rng_seed(0)
    trainer = PolicyGradient(
        found.model, guide, num_particles=N, algorithm=algorithm, epochs=1, **still(parameters)
    )  # fmt: skip
    assert close(gradient(trainer, parameters), expected)


@pytest.mark.parametrize(("reward", "kl", "T"), [*TARGETS, ("joint", 0.0, 1.0), ("likelihood", 0.0, 1.0)])
@pytest.mark.parametrize("baseline", ["leave-one-out", None])
def test_the_expected_gradient_is_the_objectives(lm, reward, kl, T, baseline):
    """All 16 pairs of draws: E grad = grad of -(E_q R - kl KL(q || prior)), written out over the four texts."""
    one = One(lm)
    settings = {"reward": reward, "kl": kl, "reward_temperature": T, "baseline": baseline, "num_particles": 2}
    found = one.expected_gradient(one.still(PolicyGradient, **settings))
    logits = one.logits.detach()[0].requires_grad_()
    log_q = logits.log_softmax(-1)
    objective = (log_q.exp() * (one.reward(reward, T) - kl * (log_q - one.log_prior))).sum()
    (expected,) = torch.autograd.grad(-objective, logits)
    assert expected.abs().max() > 0.01 and close([found], [expected])


@pytest.mark.parametrize(("reward", "kl", "T"), TARGETS)
def test_the_optimum_is_the_prior_times_the_exponential_reward(lm, reward, kl, T):
    one = One(lm)
    target = one.log_prior + one.reward(reward, T) / kl
    if (reward, kl) == ("likelihood", 1.0):  # matched: the posterior, tempered as a whole
        assert torch.allclose(target, (one.log_prior + one.log_likelihood) / T)
    one = One(lm, target)
    settings = {"reward": reward, "kl": kl, "reward_temperature": T, "num_particles": 2}
    trainer = one.still(PolicyGradient, **settings)
    assert one.expected_gradient(trainer).abs().max() < 1e-10


def test_the_loss_is_minus_the_elbo(lm):
    one = One(lm)
    metrics = one.still(PolicyGradient, num_particles=2000).step(one.y)
    log_q = one.logits.detach()[0].log_softmax(-1)
    u = one.log_prior + one.log_likelihood - log_q
    elbo, square = (log_q.exp() * u).sum(), (log_q.exp() * u**2).sum()
    assert abs(metrics["loss"] + elbo) < 5 * ((square - elbo**2) / 2000).sqrt()
    assert metrics["loss"] == pytest.approx(metrics["kl"] - metrics["reward"])


def test_ppo_is_three_clipped_ascents_on_the_same_draws(lm):
    """Against a plain loop over samples and epochs; large steps, so that ratios leave the interval."""
    rows, epsilon, rate = [0, 1, 1, 3, 3], 0.2, 0.7
    one, plain = One(lm), One(lm).logits[0].tolist()
    one.drawn = torch.tensor(rows)
    settings = {"algorithm": "ppo", "epochs": 3, "clip_ratio": epsilon, "num_particles": 5, "clip": math.inf}
    optimizer = torch.optim.SGD([one.logits], lr=rate)
    metrics = PolicyGradient(one.model, one.guide, optimizer=optimizer, **settings).step(one.y)

    def q(logits: list[float]) -> list[float]:
        total = sum(math.exp(x) for x in logits)
        return [math.exp(x) / total for x in logits]

    old = q(plain)
    signal = [float(one.log_prior[k] + one.log_likelihood[k]) - math.log(old[k]) for k in rows]
    advantage = [s - (sum(signal) - s) / 4 for s in signal]
    clipped = 0
    for _ in range(3):
        now, ascent, clipped = q(plain), [0.0] * 4, 0
        for k, a in zip(rows, advantage, strict=True):
            ratio = now[k] / old[k]
            if (a > 0 and ratio > 1 + epsilon) or (a < 0 and ratio < 1 - epsilon):
                clipped += 1  # the minimum is the constant: no gradient
                continue
            for j in range(4):
                ascent[j] += a * ratio * ((j == k) - now[j]) / 5
        plain = [x + rate * g for x, g in zip(plain, ascent, strict=True)]
    assert clipped > 0 and metrics["clipped"] > 0
    assert one.logits[one.row(one.y)[0]].tolist() == pytest.approx(plain, abs=1e-10)


def test_whitened_advantages_have_unit_variance_in_each_plate_element(lm):
    trainer = One(lm).still(PolicyGradient, whiten=True)
    signal = torch.randn(6, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 100.0])
    found = trainer.advantages(signal)
    assert torch.allclose(found.mean(0), torch.zeros(3).double(), atol=1e-9)
    assert torch.allclose(found.var(0, correction=0), torch.ones(3).double(), atol=1e-6)


def test_a_reward_of_zero_is_the_floor(lm):
    """Zero likelihood counts 50 nats below the largest reward, or as the smallest positive one; all zero: as -50."""
    trainer = One(lm).still(PolicyGradient)
    inf = math.inf
    log_p = torch.tensor([[-3.0, -3.0, -inf], [-5.0, -90.0, -inf], [-inf, -inf, -inf]])
    log_prior = torch.tensor([[-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0], [-40.0, -inf, -1.0]])
    expected = torch.tensor([[-2.0, -2.0, -50.0], [-3.0, -88.0, -50.0], [-52.0, -88.0, -50.0]])
    densities = Densities(log_p, log_prior, torch.zeros(3, 3), Plates((), (), (3,), 1))
    assert torch.equal(trainer.rewards(densities), expected)
