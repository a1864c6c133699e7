"""Every balance with every divergence, on a tree of seven texts: plain loops, exact gradients, descent."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, pairwise
from types import SimpleNamespace

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import PROBLEMS, adapted, lm_guide, one_text
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from torch import Tensor

from lmppl.inference import (
    DIVERGENCES,
    AlphaDivergence,
    DetailedBalance,
    Divergence,
    GFlowNet,
    HardVarGrad,
    Linex,
    Objective,
    PooledVarGrad,
    SubTB,
    TrajectoryBalance,
    VarGrad,
)

NAMES = ["squared", "forward_kl", "chi_square", "hellinger", "jensen_shannon", "total_variation", "log_cosh"]
SMOOTH = [name for name in NAMES if name != "total_variation"]
G: dict[str, Callable[[float], float]] = {  # by hand, of one number
    "squared": lambda x: x * x,
    "forward_kl": lambda x: 2 * (math.exp(x) - x - 1),
    "chi_square": lambda x: (math.exp(2 * x) - 1) / 2 - x,
    "hellinger": lambda x: 8 * (math.exp(x / 2) - x / 2 - 1),
    "jensen_shannon": lambda x: quad(lambda t: 4 * math.log((1 + math.exp(t)) / 2), 0, x)[0],
    "total_variation": abs,
    "log_cosh": lambda x: 2 * math.log(math.cosh(x)),
}

# A tree of texts of at most two tokens, each of its nodes a text; every text is one of the samples -------------------

TEXTS = ["", "a", "b", "aa", "ab", "ba", "bb"]
K, LOG_Z = len(TEXTS), -1.7


def posterior(seed: int) -> Tensor:
    return torch.randn(K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(0)


def of_texts(log_p: Tensor, log_q: Tensor, identifies: bool = True, prefixes: bool = True) -> SimpleNamespace:
    """The `Balance` of all seven texts, (prefix, particle, 1), from tables (7) of log p(z, y) and log q(z)."""
    row = [[TEXTS.index(z[:t]) for z in TEXTS] for t in range(3)] if prefixes else [list(range(K))]
    valid = [[t <= len(z) for z in TEXTS] for t in range(3)] if prefixes else [[True] * K]
    row, valid = torch.tensor(row)[..., None], torch.tensor(valid)[..., None]
    below = torch.tensor([[w.startswith(z) for w in TEXTS] for z in TEXTS])
    going_on = log_q.detach().expand(K, K).masked_fill(~below, -torch.inf).logsumexp(-1)
    stop = (log_q.detach() - going_on).exp()[row] if prefixes else torch.ones(row.shape)
    at = torch.arange(len(row), dtype=torch.float64)[:, None, None].expand(row.shape)
    last = valid & (at == torch.tensor([len(z) for z in TEXTS])[:, None]) if prefixes else valid
    masked = log_q[row].masked_fill(~valid, 0.0)
    return SimpleNamespace(
        log_p=log_p[row], log_q=masked, valid=valid, stop=stop, at=at, last=last, identifies=identifies,
        plates=SimpleNamespace(sizes=(1,)), arguments=((), {}),
    )  # fmt: skip


def loss_of(objective: Objective, log_p: Tensor, log_q: Tensor, identifies: bool = True) -> Tensor:
    b = of_texts(log_p, log_q, identifies, objective.uses_prefixes)
    return objective.reduce(objective.residual(b), b)[0]


def fitted(g: Callable[[float], float], u: list[float], weight: list[float]) -> float:
    """min over c of the weighted mean of g(u - c)."""

    def at(c: float) -> float:
        return sum(w * g(x - c) for x, w in zip(u, weight, strict=True)) / sum(weight)

    best = minimize_scalar(at, bounds=(min(u), max(u)), method="bounded", options={"xatol": 1e-9}).fun
    return min(best, *map(at, u))


def whole(u: dict, stop: dict, g: Callable) -> float:
    return fitted(g, [u[z] for z in TEXTS], [1.0] * K)


def pooled(weigh: Callable) -> Callable:
    def loop(u: dict, stop: dict, g: Callable) -> float:
        prefixes = [z[:t] for z in TEXTS for t in range(len(z) + 1)]
        return fitted(g, [u[z] for z in prefixes], [weigh(stop[z]) for z in prefixes])

    return loop


def one_z(u: dict, stop: dict, g: Callable) -> float:
    return sum(g(u[z] - LOG_Z) for z in TEXTS) / K


def pair(g: Callable, x: float) -> float:
    return (g(x) + g(-x)) / 2


def within(lam: float) -> Callable:
    def loop(u: dict, stop: dict, g: Callable) -> float:
        found = []
        for z in TEXTS:
            pairs = [(lam ** (t - s), u[z[:s]] - u[z[:t]]) for s, t in combinations(range(len(z) + 1), 2)]
            found.append(sum(w * pair(g, x) for w, x in pairs) / sum(w for w, _ in pairs) if pairs else 0.0)
        return sum(found) / K

    return loop


def across(lam: float) -> Callable:
    def loop(u: dict, stop: dict, g: Callable) -> float:
        prefixes = [z[:t] for z in TEXTS for t in range(len(z) + 1)]
        pairs = [(lam ** abs(len(v) - len(w)), u[v] - u[w]) for v, w in combinations(prefixes, 2)]
        return sum(w * pair(g, x) for w, x in pairs) / sum(w for w, _ in pairs)

    return loop


def steps(u: dict, stop: dict, g: Callable) -> float:
    found = []
    for z in TEXTS:
        pairs = [pair(g, u[z[:s]] - u[z[:t]]) for s, t in pairwise(range(len(z) + 1))]
        found.append(sum(pairs) / len(pairs) if pairs else 0.0)
    return sum(found) / K


def steps_and_whole(u: dict, stop: dict, g: Callable) -> float:
    return steps(u, stop, g) + whole(u, stop, g)


# name: (make, whether pairs within a sample are said to suffice, a plain loop over texts and their prefixes)
BALANCES: dict[str, tuple[Callable[..., Objective], bool, Callable]] = {
    "VarGrad": (VarGrad, True, whole),
    "pooled by stop": (PooledVarGrad, True, pooled(lambda stop: stop)),
    "pooled": (lambda **k: PooledVarGrad("uniform", **k), True, pooled(lambda stop: 1.0)),
    "SubTB": (SubTB, True, within(1.0)),
    "SubTB(0.6)": (lambda **k: SubTB(0.6, **k), True, within(0.6)),
    "SubTB across": (SubTB, False, across(1.0)),
    "SubTB(1.5) across": (lambda **k: SubTB(1.5, **k), False, across(1.5)),
    "DetailedBalance": (DetailedBalance, True, steps),
    "DetailedBalance across": (DetailedBalance, False, steps_and_whole),
    "TrajectoryBalance": (lambda **k: TrajectoryBalance(LOG_Z, **k), True, one_z),
}
every_balance = pytest.mark.parametrize("balance", BALANCES)
every_divergence = pytest.mark.parametrize("name", NAMES)


# The divergences themselves -------------------------------------------------------------------------------------------


def derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


@pytest.mark.parametrize(
    "d", [*DIVERGENCES.values(), AlphaDivergence(0.3), AlphaDivergence(1.5)], ids=lambda d: type(d).__name__
)
def test_g_is_what_f_says(d):
    """g' = r f' - f + f(1) - f'(1) at r = e^x; g(0) = g'(0) = 0, convex; f(1) = 0; g''(0) = 2, of |x| none."""
    x, one = torch.linspace(-4, 4, 41, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    r = x.exp()
    expected = r * derivative(d.f, r) - d.f(r) + d.f(one) - derivative(d.f, one)
    assert (derivative(d.g, x) - expected).abs().max() < 1e-10 * r.max() ** 2
    assert (d.slope(x) - derivative(d.g, x)).abs().max() < 1e-12 * r.max() ** 2
    zero = torch.zeros(1, dtype=torch.float64)
    assert abs(d.f(one).item()) + abs(d.g(zero).item()) + abs(derivative(d.g, zero).item()) < 1e-14
    assert (d.slope(x).diff() >= 0).all() and (d.g(x) >= -1e-14).all()
    if d is not DIVERGENCES["total_variation"]:
        near = torch.tensor([-1e-4, 1e-4], dtype=torch.float64)
        assert d.slope(near).diff().item() / 2e-4 == pytest.approx(2.0, rel=1e-6)


def test_what_each_descends():
    """E_q f(p/q) is, by its definition, twice the KLs and the total variation, eight times Jensen-Shannon, ..."""
    p, q = posterior(1).exp(), posterior(2).exp()
    m = (p + q) / 2

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    expected = {
        "squared": 2 * kl(q, p), "reverse_kl": 2 * kl(q, p), "forward_kl": 2 * kl(p, q), "linex": 2 * kl(p, q),
        "chi_square": ((p - q) ** 2 / q).sum(), "hellinger": 4 * ((p.sqrt() - q.sqrt()) ** 2).sum(),
        "jensen_shannon": 4 * kl(p, m) + 4 * kl(q, m), "total_variation": (p - q).abs().sum(),
    }  # fmt: skip
    for name, value in expected.items():
        assert (q * DIVERGENCES[name].f(p / q)).sum() == pytest.approx(value.item(), rel=1e-9), name
    assert set(DIVERGENCES) == {*expected, "log_cosh"}


@every_divergence
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_fit_is_the_best_and_does_not_depend_on_where_zero_is(name, data):
    n = data.draw(st.integers(2, 6))
    u = torch.tensor(data.draw(st.lists(st.floats(-30, 30), min_size=n, max_size=n)), dtype=torch.float64)
    weight = torch.tensor(data.draw(st.lists(st.floats(0.01, 1), min_size=n, max_size=n)), dtype=torch.float64)
    d = DIVERGENCES[name]
    c, least = d.fit(u, weight), d.spread(u, weight)
    assert u.min() - 1e-9 <= c <= u.max() + 1e-9

    def at(c: Tensor) -> Tensor:
        return (weight * d.g(u - c)).sum() / weight.sum()

    reachable = not isinstance(d, AlphaDivergence) or d.alpha * (u.max() - c) < 20
    if reachable:  # by g itself, which is a tangent further on
        assert least.item() == pytest.approx(at(c).item(), rel=1e-9, abs=1e-9)
        assert all(least <= at(c + h) + 1e-9 * (1 + least) for h in (-1.0, -1e-3, 1e-3, 1.0))
    assert d.spread(u + 1000, weight).item() == pytest.approx(least.item(), rel=1e-6, abs=1e-6)


# Every pair -----------------------------------------------------------------------------------------------------------


@every_divergence
@every_balance
def test_the_loss_vanishes_at_the_posterior_and_is_positive_elsewhere(balance, name):
    make, identifies, _ = BALANCES[balance]
    objective, p = make(divergence=name), posterior(0)
    assert abs(loss_of(objective, p + LOG_Z, p, identifies).item()) < 1e-12
    for seed in range(1, 6):
        assert loss_of(objective, p + LOG_Z, posterior(seed), identifies).item() > 1e-2


@every_divergence
@every_balance
def test_elsewhere_it_is_a_plain_loop_and_its_gradient_a_difference_quotient(balance, name):
    make, identifies, loop = BALANCES[balance]
    objective, log_p, log_q = make(divergence=name), posterior(0) + LOG_Z, posterior(3)
    b = of_texts(log_p, log_q)
    u = dict(zip(TEXTS, (log_p - log_q).tolist(), strict=True))
    stop = {z[:t]: b.stop[t, n, 0].item() for n, z in enumerate(TEXTS) for t in range(len(z) + 1)}
    found = loss_of(objective, log_p, log_q, identifies).item()
    assert found == pytest.approx(loop(u, stop, G[name]), rel=1e-9)
    values = objective.residual(of_texts(log_p, log_q, prefixes=objective.uses_prefixes)).requires_grad_()
    b = of_texts(log_p, log_q, identifies, objective.uses_prefixes)
    # Texts that share a prefix have the same u there, where |x| has a corner: they are drawn apart.
    values = (values.detach() + 0.01 * torch.arange(values.numel()).view(values.shape).cos()).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: objective.reduce(u, b), values, atol=1e-6, rtol=1e-5)


@every_divergence
def test_against_log_z_the_expected_gradient_is_that_of_the_divergence(name):
    """sum_z q(z) grad g(u(z) - log Z), q held in the weights, = grad D_f(p, q)."""
    objective, p = TrajectoryBalance(LOG_Z, divergence=name), posterior(0)
    logits = posterior(4).requires_grad_()
    log_q = logits.log_softmax(0)
    b = of_texts(p + LOG_Z, log_q, prefixes=False)
    u = objective.residual(b)
    one = of_texts(torch.zeros(K), torch.zeros(K), prefixes=False)
    one.valid, one.log_p = one.valid[:, :1], one.log_p[:, :1]
    losses = torch.stack([objective.reduce(u[:, k : k + 1], one)[0] for k in range(K)])
    (found,) = torch.autograd.grad((log_q.detach().exp() * losses).sum(), logits, retain_graph=True)
    divergence = (log_q.exp() * DIVERGENCES[name].f((p - log_q).exp())).sum()
    (expected,) = torch.autograd.grad(divergence, logits)
    assert expected.abs().max() > 1e-2 and (found - expected).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["squared", "forward_kl", "chi_square", "hellinger"])
def test_at_the_best_c_the_alpha_divergences_are_descended_but_for_a_factor(name):
    """E_q r^alpha times the gradient of the spread under q, = grad D_f: at alpha = 1 the best c is log Z itself."""
    p, d, logits = posterior(0), DIVERGENCES[name], posterior(4).requires_grad_()
    log_q = logits.log_softmax(0)
    q, u = log_q.detach().exp(), p + LOG_Z - log_q
    (found,) = torch.autograd.grad(d.spread(u, q), logits, retain_graph=True)
    alpha = d.alpha if isinstance(d, AlphaDivergence) else 0.0
    factor = (q * (alpha * (p - log_q.detach())).exp()).sum()
    (expected,) = torch.autograd.grad((log_q.exp() * d.f((p - log_q).exp())).sum(), logits)
    assert (factor * found - expected).abs().max() < 1e-12 and expected.abs().max() > 1e-2
    if name == "forward_kl":
        assert d.fit(u, q).item() == pytest.approx(LOG_Z, rel=1e-12)


STARTS = [(name, 1) for name in NAMES] + [
    pytest.param(name, 2, marks=pytest.mark.slow) for name in NAMES if name in SMOOTH
]


@pytest.mark.parametrize(("name", "seed"), STARTS)
@every_balance
def test_descent_from_anywhere_ends_at_the_posterior(balance, name, seed):
    """All texts are drawn, whatever q is: of the loss as a function of q the posterior is the only minimum."""
    make, identifies, _ = BALANCES[balance]
    objective, p = make(divergence=name), posterior(0)
    logits = (3 * posterior(seed)).requires_grad_()

    def loss() -> Tensor:
        return loss_of(objective, p + LOG_Z, logits.log_softmax(0), identifies)

    if name in SMOOTH:
        optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)
    else:  # |x| has slopes of one size: steps that shrink
        optimizer = torch.optim.Adam([logits], lr=0.2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
        for _ in range(250):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            schedule.step()
    total_variation = (logits.detach().softmax(0) - p.exp()).abs().sum().item() / 2
    assert total_variation < (1e-4 if name in SMOOTH else 0.01), total_variation


@every_divergence
@pytest.mark.parametrize("kind", [VarGrad, PooledVarGrad, SubTB, DetailedBalance])
def test_on_programs_too_it_vanishes_at_the_posterior_alone(lm, kind, name):
    found = PROBLEMS["one text"](lm)
    objective = kind(num_particles=12, divergence=name)
    assert abs(objective.loss(found.model, found.posterior(1.0))) < 1e-6
    assert objective.loss(found.model, found.posterior(1.5)) > 1e-3


# Rewards of zero, and numbers far apart -------------------------------------------------------------------------------


@pytest.mark.parametrize("q", ["even", "certain"])
@every_divergence
@every_balance
def test_float32_stays_finite_with_rewards_of_zero_and_with_u_far_apart(balance, name, q):
    make, identifies, _ = BALANCES[balance]
    log_p = torch.tensor([-1.0, -torch.inf, -2.0, -3.0, -torch.inf, -400.0, -4.0])
    logits = (torch.zeros(K) if q == "even" else torch.linspace(0, -200, K)).requires_grad_()
    for rewards in (log_p, torch.full((K,), -torch.inf)):
        loss = loss_of(make(divergence=name), rewards, logits.log_softmax(0), identifies)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("make", [VarGrad, lambda **k: TrajectoryBalance(0.0, **k)], ids=["fitted", "given"])
@every_divergence
def test_less_than_the_floor_is_as_good_as_the_floor_unless_squared(make, name):
    """What q has less of an impossible text than asked for costs nothing; squared, it asks for just the floor."""
    objective, losses = make(divergence=name, floor=5.0), []
    p = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    for nats in (5.0, 6.0, 30.0):
        log_p = torch.cat([p, torch.full((K - 2,), -torch.inf, dtype=torch.float64)])
        log_q = torch.cat([p, torch.full((K - 2,), p[0] - nats, dtype=torch.float64)])
        losses.append(loss_of(objective, log_p, log_q).item())
    assert losses[0] == pytest.approx(0.0, abs=1e-12)
    if name == "squared":
        assert losses[2] > losses[1] > 0.1
    else:
        assert losses == pytest.approx([0.0] * 3, abs=1e-12)


# Scales, names, and what is refused -----------------------------------------------------------------------------------


def test_linex_is_half_of_vargrad_by_forward_kl(lm):
    found, guide = one_text(lm), lm_guide(adapted(lm))
    losses = []
    for objective in (Linex(num_particles=6), VarGrad(num_particles=6, divergence="forward_kl")):
        pyro.set_rng_seed(0)
        losses.append(objective.loss(found.model, guide))
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-12) and losses[0] > 0


@pytest.mark.parametrize("divergence", ["kl", Divergence, None, 2.0])
def test_an_unknown_divergence_is_named(divergence):
    with pytest.raises(ValueError, match="divergence: expected a Divergence or one of.*forward_kl"):
        SubTB(divergence=divergence)


def test_an_objective_that_is_a_choice_of_divergence_takes_none():
    with pytest.raises(ValueError, match="divergence: HardVarGrad chooses it"):
        HardVarGrad(divergence="forward_kl")
    with pytest.raises(TypeError, match="divergence"):
        Linex(divergence="forward_kl")


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_an_alpha_that_is_none_is_named(alpha):
    with pytest.raises(ValueError, match="alpha"):
        AlphaDivergence(alpha)


# What an objective has to learn, and what it does not keep ------------------------------------------------------------


class Shifted(TrajectoryBalance):
    """A log Z of one's own: a number to learn, at its own rate."""

    def __init__(self, **kwargs):
        super().__init__(log_z=lambda: self.number, **kwargs)
        self.number = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def parameters(self):
        yield self.number

    def param_groups(self):
        return [{"params": list(self.parameters()), "lr": 0.5}]


def test_the_trainer_adds_what_any_objective_has_to_learn_once(lm):
    guide_lm, objective = adapted(lm), Shifted(num_particles=4)
    optimizer = torch.optim.SGD(guide_lm.trainable_parameters(), lr=1e-3)
    for _ in range(2):
        trainer = GFlowNet(one_text(lm).model, lm_guide(guide_lm), objective, optimizer=optimizer)
    assert len(optimizer.param_groups) == 2 and optimizer.param_groups[1]["lr"] == 0.5
    trainer.step()
    assert objective.number.item() != 0.0
    assert not list(VarGrad().parameters()) and VarGrad().param_groups() == []


def test_a_log_z_of_the_arguments_is_asked_for_each_batch(lm):
    """Nothing of one batch stays for the next: with balances of two batches in hand, each has its own log Z."""
    found = one_text(lm)
    objective = TrajectoryBalance(log_z=lambda shift: torch.tensor(float(shift)), num_particles=4)
    model, guide = (lambda shift: found.model()), (lambda shift: found.posterior(1.0)())
    values = objective.draw(model, guide, (0,), {})
    first, second = (objective.balances(model, guide, (shift,), {}, values)[0] for shift in (0, 3))
    u = objective.residual(first)[0].mean(0)
    for b, shift in ((second, 3), (first, 0)):
        assert torch.allclose(objective.reduce(objective.residual(b), b), (u - shift) ** 2)
