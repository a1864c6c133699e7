"""GFlowNet objectives: they vanish at the posterior and nowhere else, and equal a plain double loop."""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations
from itertools import pairwise as pairwise_

import pyro
import pytest
import torch
from problems import EOS, PRIOR, PROBLEMS, X, Y, adapted, lm_guide, no_a_first, one_text, texts_of
from pyro.infer import SVI
from reference import Law, Plain, tokens
from torch import Tensor

from lmppl.distributions import Completion
from lmppl.inference.training.gflownet import (
    AlphaDivergence,
    DetailedBalance,
    Linex,
    Objective,
    PooledVarGrad,
    SubTB,
    Tempered,
    VarGrad,
)
from lmppl.text import PAD

BROADER = Tempered(1.5, 0.5)
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def plain(lm) -> Plain:
    """The language model's probabilities, asked for once."""
    return Plain(lm)


# One contract for every objective -------------------------------------------------------------------------------------


class ObjectiveContract:
    """What every GFlowNet objective promises; a subclass says how to make one."""

    def make(self, **kwargs) -> Objective:
        raise NotImplementedError

    def by_double_loop(self, u: dict, stop: dict, identified: bool) -> Tensor:
        """The loss of one observation from u[n, t] and q(stop)[n, t], n over samples and t over prefix lengths."""
        raise NotImplementedError

    @pytest.mark.parametrize(
        ("temperature", "explore"), [(1.0, None), (2.5, BROADER), slow(1.0, BROADER), slow(2.5, None)]
    )
    @pytest.mark.parametrize("problem", PROBLEMS)
    def test_vanishes_at_the_posterior(self, lm, problem, temperature, explore):
        found = PROBLEMS[problem](lm)
        objective = self.make(num_particles=12, reward_temperature=temperature, exploration=explore)
        assert abs(objective.loss(found.model, found.posterior(temperature))) < 1e-6

    @pytest.mark.parametrize("prefixes", [2, 3])
    @pytest.mark.parametrize("problem", ["one text", "from one token", "two texts", "a hard factor"])
    def test_vanishes_on_every_subset_of_prefixes(self, lm, problem, prefixes):
        found = PROBLEMS[problem](lm)
        objective = self.make(num_particles=12, prefixes=prefixes)
        assert abs(objective.loss(found.model, found.posterior(1.0))) < 1e-6

    @pytest.mark.parametrize("problem", PROBLEMS)
    def test_does_not_vanish_elsewhere(self, lm, problem):
        found = PROBLEMS[problem](lm)
        assert self.make(num_particles=12).loss(found.model, found.posterior(1.5)) > 1e-3

    @pytest.mark.parametrize(
        "case", ["on-policy", "tempered reward", "exploration", "three prefixes", "from one token", "a hard factor"]
    )
    def test_equals_a_plain_double_loop(self, lm, plain, case):
        """Values and gradients, on a guide that is a language model with an adapter."""
        guide_lm = adapted(lm)
        low = 1 if case == "from one token" else 0
        factor = no_a_first if case == "a hard factor" else None
        T = 2.0 if case == "tempered reward" else 1.0
        found = one_text(lm, low, factor)
        limits = {"max_tokens": 2, "min_tokens": low}

        def guide():
            with pyro.plate("data", 2):
                pyro.sample("z", Completion(guide_lm, X, **limits))

        options = {"exploration": BROADER} if case == "exploration" else {}
        options |= {"prefixes": 2} if case == "three prefixes" else {}
        objective = self.make(num_particles=5, reward_temperature=T, max_plate_nesting=1, **options)
        pyro.set_rng_seed(3)
        loss, balances = objective.loss_and_balances(found.model, guide)
        params = guide_lm.trainable_parameters()
        grads = torch.autograd.grad(loss, params)

        pyro.set_rng_seed(3)
        drawn = objective.draw(found.model, guide, (), {})["z"]  # (5, 2, E)
        (b,) = balances
        expected = torch.zeros((), dtype=torch.float64)
        for i in range(2):
            log_p, log_q, stop = {}, {}, {}
            x, q = tokens(X[i]), Completion(guide_lm, X[i], **limits)
            known: dict[tuple, Tensor] = {}  # log q of the tokens of a text
            for n in range(5):
                z = tokens(drawn[n, i])
                whole = len(z) - 1
                lengths = {int(t) for t, ok in zip(b.at[:, n, i], b.valid[:, n, i], strict=True) if ok}
                if objective.uses_prefixes:
                    assert whole in lengths and low in lengths
                    assert case == "three prefixes" or lengths == set(range(low, whole + 1))
                else:
                    lengths = {whole}
                for t in lengths:
                    cut = (*z[:t], EOS)
                    prior = Law(plain, x, 2, low).log_prob(cut)
                    seen = Law(plain, x + z[:t], 2).log_prob(tokens(Y[i]))
                    reward = 0.0 if factor is None else float(factor(torch.tensor(cut)))
                    log_p[n, t] = (prior + seen + reward) / T
                    value = torch.full((3,), PAD)
                    value[: t + 1] = torch.tensor(cut)
                    each = known.get(cut)
                    each = known.setdefault(cut, q.token_log_probs(value) if each is None else each)
                    log_q[n, t], stop[n, t] = each[: t + 1].sum(), each[t].exp().item()
            largest = max(log_p.values())
            u = {k: (p if p > -math.inf else largest - objective.floor) - log_q[k] for k, p in log_p.items()}
            expected = expected + self.by_double_loop(u, stop, identified=case != "from one token") / 2
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-8)
        for found_grad, plain_grad in zip(grads, torch.autograd.grad(expected, params), strict=True):
            assert (found_grad - plain_grad).abs().max() < 1e-9 * (1 + plain_grad.abs().max())

    def test_groups_never_mix_observations(self, lm):
        """A constant of an observation's own changes its evidence, and no loss or gradient."""
        guide_lm = adapted(lm)

        def guide():
            with pyro.plate("data", 2):
                pyro.sample("z", Completion(guide_lm, X, **PRIOR))

        results = []
        for constant in (torch.zeros(2), torch.tensor([0.0, 300.0])):
            found = one_text(lm, factor=lambda z, c=constant: c.double() + torch.zeros(z.shape[:-1]))
            pyro.set_rng_seed(0)
            loss = self.make(num_particles=6).differentiable_loss(found.model, guide)
            results.append((loss, torch.autograd.grad(loss, guide_lm.trainable_parameters())))
        assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=1e-9)
        assert all((a - b).abs().max() < 1e-8 for a, b in zip(results[0][1], results[1][1], strict=True))

    def test_gradients_reach_the_guide_alone(self, lm):
        guide_lm = adapted(lm)
        found = one_text(lm)
        self.make(num_particles=4).differentiable_loss(found.model, lm_guide(guide_lm)).backward()
        assert all(p.grad is not None for p in guide_lm.trainable_parameters())
        assert all(p.grad is None for p in lm.trainable_parameters())

    def test_three_ways_to_ask_agree(self, lm):
        guide_lm = adapted(lm)
        found, guide = one_text(lm), lm_guide(guide_lm)
        losses = []
        objective = self.make(num_particles=4)
        module = objective(found.model, guide)
        for ask in (
            lambda: objective.loss(found.model, guide),
            lambda: objective.differentiable_loss(found.model, guide).item(),
            lambda: objective.loss_and_grads(found.model, guide),
            lambda: module().item(),
        ):
            pyro.set_rng_seed(1)
            losses.append(ask())
        assert losses == pytest.approx([losses[0]] * 4, rel=1e-12)

    def test_finite_where_every_reward_is_zero(self, lm):
        found = one_text(lm, factor=lambda z: torch.full(z.shape[:-1], -torch.inf, dtype=torch.float64))
        guide_lm = adapted(lm)
        loss = self.make(num_particles=4).differentiable_loss(found.model, lm_guide(guide_lm))
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in guide_lm.trainable_parameters())


def pairs(keys, u: dict, lam: float) -> Tensor:
    total, weight = 0.0, 0.0
    for i, j in combinations(keys, 2):
        w = lam ** abs(i[1] - j[1])
        total, weight = total + w * (u[i] - u[j]) ** 2, weight + w
    return total / weight if weight else torch.zeros((), dtype=torch.float64)


def variance(u: dict, weight: dict) -> Tensor:
    total = sum(weight.values())
    mean = sum(weight[k] * u[k] for k in u) / total
    return sum(weight[k] * (u[k] - mean) ** 2 for k in u) / total


class SubTBContract(ObjectiveContract):
    lam = 1.0

    def make(self, **kwargs):
        return SubTB(lam=self.lam, **kwargs)

    def by_double_loop(self, u, stop, identified):
        if not identified:
            return pairs(list(u), u, self.lam)
        samples = sorted({n for n, _ in u})
        return sum(pairs([k for k in u if k[0] == n], u, self.lam) for n in samples) / len(samples)


class TestSubTB(SubTBContract):
    pass


class TestSubTBThatDecays(SubTBContract):
    lam = 0.6


class TestSubTBThatGrows(SubTBContract):
    lam = 1.5


class TestDetailedBalance(ObjectiveContract):
    def make(self, **kwargs):
        return DetailedBalance(**kwargs)

    def by_double_loop(self, u, stop, identified):
        losses = []
        for n in {n for n, _ in u}:
            lengths = sorted(t for m, t in u if m == n)
            steps = [(u[n, j] - u[n, i]) ** 2 for i, j in pairwise_(lengths)]
            losses.append(sum(steps) / len(steps) if steps else 0.0 * u[n, lengths[0]])
        loss = sum(losses) / len(losses)
        if identified:
            return loss
        whole = {n: max(t for m, t in u if m == n) for n, _ in u}
        ends = {(n, t): u[n, t] for n, t in whole.items()}
        return loss + variance(ends, dict.fromkeys(ends, 1.0))


class TestVarGrad(ObjectiveContract):
    def make(self, **kwargs):
        return VarGrad(**kwargs)

    def by_double_loop(self, u, stop, identified):
        return variance(u, dict.fromkeys(u, 1.0))


class TestPooledByStop(ObjectiveContract):
    def make(self, **kwargs):
        return PooledVarGrad(**kwargs)

    def by_double_loop(self, u, stop, identified):
        return variance(u, stop)


class TestPooledUniform(ObjectiveContract):
    def make(self, **kwargs):
        return PooledVarGrad(weights="uniform", **kwargs)

    def by_double_loop(self, u, stop, identified):
        return variance(u, dict.fromkeys(u, 1.0))


class TestLinex(ObjectiveContract):
    def make(self, **kwargs):
        return Linex(**kwargs)

    def by_double_loop(self, u, stop, identified):
        every = torch.stack(list(u.values()))
        log_z = every.exp().mean().log().detach()
        return ((every - log_z).exp() - (every - log_z) - 1).mean()


class TestVarGradByChiSquare(ObjectiveContract):
    def make(self, **kwargs):
        return VarGrad(divergence="chi_square", **kwargs)

    def by_double_loop(self, u, stop, identified):
        every = torch.stack(list(u.values()))
        t = every - (2 * every).exp().mean().log().detach() / 2
        return (((2 * t).exp() - 1) / 2 - t).mean()


class TestDetailedBalanceByAnAlpha(ObjectiveContract):
    """At alpha = 1/4 the floor of 50 nats is within reach of the exponential."""

    def make(self, **kwargs):
        return DetailedBalance(divergence=AlphaDivergence(0.25), **kwargs)

    def by_double_loop(self, u, stop, identified):
        def g(x: Tensor) -> Tensor:
            return 32 * ((x / 4).exp() - x / 4 - 1)

        losses, ends = [], []
        for n in {n for n, _ in u}:
            lengths = sorted(t for m, t in u if m == n)
            steps = [u[n, j] - u[n, i] for i, j in pairwise_(lengths)]
            losses.append(sum((g(x) + g(-x)) / 2 for x in steps) / len(steps) if steps else 0.0 * u[n, lengths[0]])
            ends.append(u[n, lengths[-1]])
        loss, every = sum(losses) / len(losses), torch.stack(ends)
        c = 4 * (every / 4).exp().mean().log().detach()
        return loss if identified else loss + g(every - c).mean()


# Training -------------------------------------------------------------------------------------------------------------


KINDS = [SubTB, VarGrad, PooledVarGrad, Linex]


def by_optimizer(found, guide_lm, objective, steps: int, lr: float) -> list[float]:
    """The losses of some steps of ``objective(model, guide)`` under a torch optimiser."""
    loss_fn, losses = objective(found.model, lm_guide(guide_lm)), []
    optimizer = torch.optim.Adam(guide_lm.trainable_parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_training_halves_the_total_variation(lm, kind):
    guide_lm, found, z = adapted(lm), one_text(lm), texts_of(lm)[:, None]
    exact = pyro.poutine.trace(found.posterior(1.0)).get_trace().nodes["z"]["fn"].log_prob(z).exp()

    def total_variation() -> float:
        with torch.no_grad():
            return (Completion(guide_lm, X, **PRIOR).log_prob(z).exp() - exact).abs().sum(0).mean().item() / 2

    start = total_variation()
    by_optimizer(found, guide_lm, kind(num_particles=16), 40, 3e-2)
    assert total_variation() < 0.5 * start


@pytest.mark.parametrize("kind", KINDS)
def test_svi_makes_the_steps_of_a_torch_optimiser(lm, kind):
    """The objective as the ``loss`` of SVI, over registered parameters: the same losses and parameters."""
    guides, found = [adapted(lm), adapted(lm)], one_text(lm)
    pyro.set_rng_seed(1)
    losses = by_optimizer(found, guides[0], kind(num_particles=8), 3, 3e-2)
    params, inner = guides[1].trainable_parameters(), lm_guide(guides[1])
    before = [p.detach().clone() for p in params]

    def guide():
        for i, p in enumerate(params):
            pyro.param(f"guide_{i}", p)
        inner()

    svi = SVI(found.model, guide, pyro.optim.Adam({"lr": 3e-2}), loss=kind(num_particles=8))
    pyro.set_rng_seed(1)
    assert [svi.step() for _ in losses] == pytest.approx(losses, rel=1e-9)
    for p, q, old in zip(params, guides[0].trainable_parameters(), before, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-9) and bool((p != old).any())
