"""Identities between the objectives, and what each of them does not identify."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PRIOR, PROBLEMS, VOCAB, X, Y, adapted, lm_guide, one_text, texts_of
from tables import Table
from tiny import tiny_lm
from torch import Tensor

from lmppl import LanguageModel, text
from lmppl.distributions import Completion
from lmppl.inference import (
    DetailedBalance,
    Enumeration,
    Linex,
    PooledVarGrad,
    RelativeTrajectoryBalance,
    SubTB,
    Tempered,
    TrajectoryBalance,
    VarGrad,
)
from lmppl.inference.training.gflownet.sub_tb import pairwise


def test_vargrad_is_reinforce_with_a_leave_one_out_baseline(lm):
    """On-policy: grad VarGrad = 2 (N-1)/N grad KL(q || p), estimated with the others' mean as baseline."""
    guide_lm = adapted(lm)
    found, guide, N = one_text(lm), lm_guide(guide_lm), 7
    pyro.set_rng_seed(0)
    loss, (b,) = VarGrad(num_particles=N, max_plate_nesting=1).loss_and_balances(found.model, guide)
    params = guide_lm.trainable_parameters()
    grads = torch.autograd.grad(loss, params, retain_graph=True)
    u, log_q = b.u.detach()[0], b.log_q[0]  # (N, 2)
    baseline = (u.sum(0) - u) / (N - 1)
    surrogate = -((u - baseline) * log_q).mean(0).mean()  # of KL(q || p) = -E_q u
    for found_grad, kl_grad in zip(grads, torch.autograd.grad(surrogate, params), strict=True):
        assert (found_grad - 2 * (N - 1) / N * kl_grad).abs().max() < 1e-10


def test_linex_is_the_wake_phase_with_a_baseline(lm):
    """On-policy: grad Linex = grad of -sum_n (w_n - 1/N) log q(z_n), whose expectation is the wake phase's."""
    guide_lm = adapted(lm)
    found, guide = one_text(lm), lm_guide(guide_lm)
    pyro.set_rng_seed(0)
    loss, (b,) = Linex(num_particles=7).loss_and_balances(found.model, guide)
    grads = gradients(loss, guide_lm)
    u, log_q = b.u.detach()[0], b.log_q[0]  # (N, 2)
    wake = -(u.softmax(0) * log_q).sum(0).mean()
    assert_same(grads, gradients(wake + log_q.mean(), guide_lm))


def test_linex_near_balance_and_far_from_it():
    """Half a variance near balance; a slope of at most 1/N for what q should not have, and none once q has little."""
    g = torch.Generator().manual_seed(0)

    def slope(u: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        u.requires_grad_()
        balance = SimpleNamespace(valid=torch.ones(u.shape, dtype=torch.bool), log_p=log_p)
        loss = Linex().reduce(u, balance)
        return loss.detach(), torch.autograd.grad(loss.sum(), u)[0]

    near = 1e-3 * torch.randn(1, 9, 4, generator=g, dtype=torch.float64)
    assert slope(near, torch.zeros(1, 9, 4))[0] == pytest.approx(near.detach().var(1, correction=0)[0] / 2, rel=1e-2)
    u = torch.tensor([0.0, 0.5, -40.0, 3.0], dtype=torch.float64).view(1, 4, 1)
    found = slope(u, torch.tensor([0.0, 0.0, -torch.inf, -torch.inf]).view(1, 4, 1))[1].flatten()
    assert found[2].item() == pytest.approx(-1 / 4) and found[3] == 0
    weight = torch.tensor([1.0, math.exp(0.5), 0.0, (1 + math.exp(0.5)) / 2], dtype=torch.float64)  # the last: log Z
    assert found[:2] == pytest.approx((weight / weight.sum() - 1 / 4)[:2])
    assert slope(u.detach(), torch.full((1, 4, 1), -torch.inf))[1].abs().max() == 0


def test_stop_weights_integrate_the_stopping_time_out(lm):
    """sum_t q(stop | z_1..t) f(z_1..t) over the prefixes of samples is unbiased for E_q f."""
    guide_lm = adapted(lm)
    found, guide = one_text(lm), lm_guide(guide_lm)
    pyro.set_rng_seed(0)
    (b,) = PooledVarGrad(num_particles=4000).loss_and_balances(found.model, guide)[1]
    z = texts_of(lm)[:, None]
    exact = (Completion(guide_lm, X, **PRIOR).log_prob(z).exp() * text.length(z)).sum(0)
    # A prefix is seen where the sample reaches it; its stop probability is what stopping there adds.
    estimate = (b.stop * b.valid * (b.at + 1)).sum(0)  # (N, 2)
    error = estimate.std(0) / math.sqrt(len(estimate))
    assert ((estimate.mean(0) - exact).abs() < 5 * error).all()


def test_lam_one_is_a_variance():
    g = torch.Generator().manual_seed(0)
    u = torch.randn(6, 4, 3, generator=g, dtype=torch.float64)
    valid = torch.rand(6, 4, 3, generator=g) < 0.7
    at = torch.arange(6).view(6, 1, 1).expand(6, 4, 3)
    m = valid.sum(0)
    s1, s2 = (u * valid).sum(0), (u * u * valid).sum(0)
    expected = torch.where(m > 1, (m * s2 - s1**2) / (m * (m - 1) / 2).clamp(min=1), 0.0)
    assert (pairwise(u, valid, at, 1.0) - expected).abs().max() < 1e-12
    assert (pairwise(u, valid, at, 1.0 + 1e-12) - expected).abs().max() < 1e-9


def gradients(loss: Tensor, guide_lm: LanguageModel) -> list[Tensor]:
    return list(torch.autograd.grad(loss, guide_lm.trainable_parameters(), retain_graph=True))


def assert_same(found: list[Tensor], expected: list[Tensor], ratio: float = 1.0) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - ratio * b).abs().max() < 1e-10 * (1 + b.abs().max())


@pytest.mark.parametrize("lam", [0.3, 1.0, 2.0])
def test_subtb_over_two_neighbours_is_detailed_balance(lm, lam):
    """Texts of at most one token have two prefixes, which are neighbours: value and gradient agree for every lam."""
    guide_lm = adapted(lm)

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(lm, X, max_tokens=1))
            pyro.sample("y", Completion(lm, lm.join(X, z), max_tokens=2), obs=Y)

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", Completion(guide_lm, X, max_tokens=1))

    results = []
    for objective in (SubTB(lam=lam, num_particles=9), DetailedBalance(num_particles=9)):
        pyro.set_rng_seed(0)
        loss = objective.differentiable_loss(model, guide)
        results.append((loss.item(), gradients(loss, guide_lm)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12) and results[0][0] > 0
    assert_same(results[0][1], results[1][1])


def test_subtb_as_lam_vanishes_is_detailed_balance(lm):
    """lam -> 0 leaves the pairs at distance one: SubTB's weights there are even, as detailed balance's are."""
    g = torch.Generator().manual_seed(1)
    u, valid = torch.randn(5, 4, generator=g, dtype=torch.float64), torch.ones(5, 4, dtype=torch.bool)
    at = torch.arange(5.0, dtype=torch.float64)[:, None].expand(5, 4)
    from lmppl.inference.training.gflownet.detailed_balance import neighbours

    assert (pairwise(u, valid, at, 1e-12) - neighbours(u, valid, at)).abs().max() < 1e-9


def test_vargrad_is_trajectory_balance_at_the_log_z_that_fits_the_batch_best(lm):
    guide_lm = adapted(lm)
    found, guide = one_text(lm), lm_guide(guide_lm)
    pyro.set_rng_seed(0)
    loss, (b,) = VarGrad(num_particles=7).loss_and_balances(found.model, guide)
    best = b.u.detach().mean((0, 1))  # (2)
    pyro.set_rng_seed(0)
    tb = TrajectoryBalance(log_z=best, num_particles=7).differentiable_loss(found.model, guide)
    assert tb.item() == pytest.approx(loss.item(), rel=1e-12)
    assert_same(gradients(tb, guide_lm), gradients(loss, guide_lm))
    for shift in (-0.1, 0.1):
        pyro.set_rng_seed(0)
        worse = TrajectoryBalance(log_z=best + shift, num_particles=7).loss(found.model, guide)
        assert worse == pytest.approx(loss.item() + shift**2, rel=1e-9)


@pytest.mark.parametrize("log_z", [0.0, -3.0, 50.0])
def test_trajectory_balance_descends_the_reverse_kl_whatever_log_z_is(lm, log_z):
    """E_q grad (u - c)^2 = 2 grad KL(q || p) for every c, by summing over all texts: log Z sets the variance only."""
    guide_lm = adapted(lm)
    z = texts_of(lm)[:, None]
    log_q = Completion(guide_lm, X, **PRIOR).log_prob(z)  # (K, 2)
    log_p = Completion(lm, X, **PRIOR).log_prob(z) + Completion(lm, lm.join(X, z), max_tokens=2).log_prob(Y)
    q = log_q.exp()
    expected_loss_grad = gradients((q.detach() * (log_p.detach() - log_q - log_z) ** 2).sum(), guide_lm)
    kl = (q * (log_q - log_p.detach())).sum()
    assert_same(expected_loss_grad, gradients(kl, guide_lm), ratio=2.0)


def test_relative_trajectory_balance_is_trajectory_balance(lm):
    """log Z + log q(z) - log p(z) - log r(z), with r(z) = p(y | z), written out term by term."""
    guide_lm = adapted(lm)
    found, guide, log_z = one_text(lm), lm_guide(guide_lm), torch.tensor([-2.0, 1.0], dtype=torch.float64)
    objective = RelativeTrajectoryBalance(log_z=log_z, num_particles=6)
    pyro.set_rng_seed(0)
    z = objective.draw(found.model, guide, (), {})["z"]  # (6, 2, E)
    loss = objective.loss_at(found.model, guide, (), {}, {"z": z})[0]
    prior = Completion(lm, X, **PRIOR).log_prob(z)
    reward = Completion(lm, lm.join(X, z), max_tokens=2).log_prob(Y)
    plain = (log_z + Completion(guide_lm, X, **PRIOR).log_prob(z) - prior - reward) ** 2
    assert loss.item() == pytest.approx(plain.mean().item(), rel=1e-12)


@pytest.mark.parametrize("explore", [None, Tempered(1.5, 0.5)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_trajectory_balance_vanishes_at_the_posterior_with_the_true_log_z_only(lm, problem, temperature, explore):
    found = PROBLEMS[problem](lm)
    posterior = found.posterior(temperature)
    options = {"num_particles": 12, "reward_temperature": temperature, "exploration": explore}
    probe = VarGrad(**options)
    (b,) = probe.loss_and_balances(found.model, posterior)[1]
    log_z = probe.residual(b)[0].where(b.valid[0] & (b.log_p[0] > -torch.inf), torch.tensor(-torch.inf)).amax(0)
    assert TrajectoryBalance(log_z=log_z, **options).loss(found.model, posterior) < 1e-6
    assert TrajectoryBalance(log_z=log_z + 0.5, **options).loss(found.model, posterior) == pytest.approx(0.25, rel=1e-6)
    assert TrajectoryBalance(log_z=log_z, **options).loss(found.model, found.posterior(1.6 * temperature)) > 1e-3


@pytest.mark.slow
def test_log_z_is_learned_together_with_the_guide(lm):
    """At the minimum over both, the guide is the posterior and the learned number the log evidence."""
    found = one_text(lm)
    exact = Enumeration(found.model).run()
    support = texts_of(lm)
    logits = torch.zeros(2, len(support), dtype=torch.float64, requires_grad=True)

    def guide():
        with pyro.plate("data", 2):
            table = Table(lm, support, logits)
            table.prompt = X  # as `Completion` has one, from which log Z can be read
            pyro.sample("z", table)

    objective = TrajectoryBalance(num_particles=16)
    optimizer = torch.optim.Adam([{"params": [logits], "lr": 0.1}, {"params": objective.parameters(), "lr": 0.02}])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 600)
    for _ in range(600):
        optimizer.zero_grad()
        objective.differentiable_loss(found.model, guide).backward()
        optimizer.step()
        schedule.step()
    truth = pyro.poutine.trace(found.posterior(1.0)).get_trace().nodes["z"]["fn"].logits.exp()
    assert float((logits.detach().softmax(-1) - truth).abs().sum(-1).max()) / 2 < 0.02
    (b,) = objective.loss_and_balances(found.model, guide)[1]
    learned = objective.learned(b, b.u).detach()
    assert float((learned - exact.log_evidence).abs().max()) < 0.02
    assert float(exact.log_evidence.diff().abs()) > 0.5  # one number for both would not do


def test_svi_learns_log_z_too():
    """Where u is 1 above the learned number and the guide cannot change, descent finds that number: the guide's u."""
    found, objective = one_text(tiny_lm(vocab=VOCAB)), TrajectoryBalance(num_particles=8)  # two log Z, not far apart
    guide = found.posterior(1.0)
    svi = pyro.infer.SVI(found.model, guide, pyro.optim.Adam({"lr": 0.1}), loss=objective)
    svi.step()
    with torch.no_grad():
        objective.learned.bias.sub_(1.0)
    start = svi.evaluate_loss()
    for _ in range(30):
        svi.step()
    assert svi.evaluate_loss() < 0.1 * start


@pytest.mark.parametrize("log_z", [torch.zeros(3), lambda: torch.zeros(2, 2)])
def test_a_log_z_of_the_wrong_shape_is_named(lm, log_z):
    with pytest.raises(ValueError, match="log_z"):
        TrajectoryBalance(log_z=log_z).loss(one_text(lm).model, lm_guide(adapted(lm)))


# What pairs within one sample identify --------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
def test_subtb_says_once_that_it_pools(lm, problem, caplog):
    found = PROBLEMS[problem](lm)
    pools = problem in ("from one token", "the empty text impossible", "a category first", "a category above a plate")
    objective = SubTB(num_particles=6)
    with caplog.at_level(logging.WARNING, logger="lmppl"):
        for _ in range(3):
            objective.loss(found.model, found.posterior(1.3))
    assert sum("across samples" in r.message for r in caplog.records) == pools


class Unpooled(SubTB):
    """SubTB as published: pairs within one sample, whatever they identify."""

    def reduce(self, u, balance):
        return super().reduce(u, replace(balance, identifies=True))


def tabular(lm: LanguageModel, problem: str) -> tuple[Callable, list[Tensor], Callable[[], float]]:
    """A guide with one logit per outcome, its parameters, and its total variation to the posterior."""
    found = PROBLEMS[problem](lm)
    support = texts_of(lm, int(problem == "from one token"))
    logits = torch.zeros(2, len(support), dtype=torch.float64, requires_grad=True)
    if problem == "from one token":

        def guide():
            with pyro.plate("data", 2):
                pyro.sample("z", Table(lm, support, logits))

        params = [logits]
    else:
        which = torch.zeros(2, dtype=torch.float64, requires_grad=True)

        def guide():
            c = pyro.sample("c", dist.Categorical(logits=which))
            pyro.sample("z", Table(lm, support, logits[c]))

        params = [logits, which]

    def probabilities(program) -> Tensor:
        trace = pyro.poutine.trace(program).get_trace()
        if problem == "from one token":
            return trace.nodes["z"]["fn"].logits.exp()
        rows = []
        for c in range(2):
            run = pyro.poutine.trace(pyro.condition(program, {"c": torch.tensor(c)})).get_trace()
            rows.append((run.nodes["c"]["fn"].logits[c] + run.nodes["z"]["fn"].logits).exp())
        return torch.cat(rows)[None]

    def total_variation() -> float:
        with torch.no_grad():
            return (probabilities(guide) - probabilities(found.posterior(1.0))).abs().sum(-1).max().item() / 2

    return guide, params, total_variation


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["from one token", "a category first"])
def test_pairs_within_a_sample_do_not_identify_and_the_pooled_form_does(problem):
    """Trained alike: the pooled form reaches the posterior; the un-pooled loss goes to zero far away from it."""
    lm = tiny_lm(vocab=VOCAB)
    found = PROBLEMS[problem](lm)
    ends = {}
    for kind in (SubTB, Unpooled):
        pyro.set_rng_seed(0)
        guide, params, total_variation = tabular(lm, problem)
        loss_fn = kind(num_particles=16)(found.model, guide)
        steps = 200
        optimizer = torch.optim.Adam(params, lr=0.2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_fn()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        ends[kind] = total_variation(), sum(losses[-50:]) / 50
    assert ends[SubTB][0] < 0.03
    assert ends[Unpooled][0] > 0.15 and ends[Unpooled][1] < 0.05
