"""GFlowNet objectives: they vanish at the posterior and nowhere else, and equal a plain double loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from itertools import pairwise as pairwise_

import pyro
import pyro.distributions as dist
import pytest
import torch
from peft import LoraConfig
from pyro.infer import SVI
from reference import Law, Plain, tokens
from tables import Table
from tiny import tiny_lm
from torch import Tensor

from lmppl import LanguageModel, text
from lmppl.distributions import Completion
from lmppl.inference.gflownet import DetailedBalance, Objective, PooledVarGrad, SubTB, Tempered, VarGrad
from lmppl.text import PAD

VOCAB = 4  # eos, ".", a, b
EOS, DOT, A, B = range(VOCAB)
X = torch.tensor([[A, PAD], [B, A]])  # two observations: prompts ...
Y = torch.tensor([[B, EOS], [DOT, EOS]])  # ... and what was seen after the latent text
PRIOR = {"max_tokens": 2}
SEEN = {"max_tokens": 2}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_lm("gpt2", vocab=VOCAB, dtype=torch.float64)


# Problems with an exact posterior -------------------------------------------------------------------------------------


@dataclass
class Problem:
    """A Pyro model, the guide that is its posterior, and the exact posterior's support and log joint."""

    model: Callable
    posterior: Callable[[float], Callable]  # reward temperature -> guide


def texts_of(lm: LanguageModel, min_tokens: int = 0) -> Tensor:
    return Completion(lm, X[0], min_tokens=min_tokens, **PRIOR).enumerate_support()  # (K, E)


def one_text(lm: LanguageModel, min_tokens: int = 0, factor: Callable[[Tensor], Tensor] | None = None) -> Problem:
    """z ~ LM(x); y ~ LM(x z), for two observations in a plate; perhaps a factor on z."""

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(lm, X, min_tokens=min_tokens, **PRIOR))
            pyro.sample("y", Completion(lm, lm.join(X, z), **SEEN), obs=Y)
            if factor is not None:
                pyro.factor("f", factor(z))

    z = texts_of(lm, min_tokens)[:, None]
    joint = Completion(lm, X, min_tokens=min_tokens, **PRIOR).log_prob(z)
    joint = joint + Completion(lm, lm.join(X, z), **SEEN).log_prob(Y) + (0.0 if factor is None else factor(z))
    joint = joint.detach().T  # (2, K)

    def posterior(T: float = 1.0):
        def guide():
            with pyro.plate("data", 2):
                pyro.sample("z", Table(lm, texts_of(lm, min_tokens), joint / T))

        return guide

    return Problem(model, posterior)


def no_a_first(z: Tensor) -> Tensor:
    return torch.where(z[..., 0] == A, -torch.inf, 0.0).double()


def not_empty(z: Tensor) -> Tensor:
    return torch.where(z[..., 0] == EOS, -torch.inf, 0.0).double()


def far_apart(z: Tensor) -> Tensor:
    """Rewards over a range of hundreds of nats, none of them zero; a sample's prefixes lie far below it."""
    return 150.0 * text.length(z).double()


def two_plates(lm: LanguageModel) -> Problem:
    """Four observations in a 2 x 2 grid, each with its own latent text."""
    x = X[:, None].expand(2, 2, 2)
    y = torch.stack([Y, Y.flip(0)], 1)

    def model():
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 2, dim=-1):
            z = pyro.sample("z", Completion(lm, x, **PRIOR))
            pyro.sample("y", Completion(lm, lm.join(x, z), **SEEN), obs=y)

    z = texts_of(lm)[:, None, None]
    joint = (Completion(lm, x, **PRIOR).log_prob(z) + Completion(lm, lm.join(x, z), **SEEN).log_prob(y)).detach()

    def posterior(T: float = 1.0):
        def guide():
            with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 2, dim=-1):
                pyro.sample("z", Table(lm, texts_of(lm), joint.permute(1, 2, 0) / T))

        return guide

    return Problem(model, posterior)


def two_texts(lm: LanguageModel) -> Problem:
    """z ~ LM(x); w ~ LM(x z); y ~ LM(x z w): two latent texts, for two observations."""

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(lm, X, **PRIOR))
            w = pyro.sample("w", Completion(lm, lm.join(X, z), **PRIOR))
            pyro.sample("y", Completion(lm, lm.join(X, z, w), **SEEN), obs=Y)

    support = texts_of(lm)
    z, w = support[:, None, None], support[None, :, None]  # (K, K, 2, E)
    joint = Completion(lm, X, **PRIOR).log_prob(z) + Completion(lm, lm.join(X, z), **PRIOR).log_prob(w)
    joint = (joint + Completion(lm, lm.join(X, z, w), **SEEN).log_prob(Y)).detach()  # (K, K, 2)

    def posterior(T: float = 1.0):
        def guide():
            with pyro.plate("data", 2):
                z = pyro.sample("z", Table(lm, support, (joint / T).logsumexp(1).T))
                row = (z[..., None, :] == support).all(-1).int().argmax(-1)  # (..., 2)
                rest = (joint / T).permute(2, 0, 1)[torch.arange(2), row]  # (..., 2, K)
                pyro.sample("w", Table(lm, support, rest))

        return guide

    return Problem(model, posterior)


def category_first(lm: LanguageModel) -> Problem:
    """c ~ Categorical; z ~ LM(x_c); y ~ LM(z): an ordinary latent before the text."""
    prior = torch.tensor([0.8, 0.2], dtype=torch.float64)
    y = Y[0]

    def model():
        c = pyro.sample("c", dist.Categorical(prior))
        z = pyro.sample("z", Completion(lm, X[c], **PRIOR))
        pyro.sample("y", Completion(lm, lm.join(X[c], z), **SEEN), obs=y)

    z = texts_of(lm)[:, None]
    joint = Completion(lm, X, **PRIOR).log_prob(z) + Completion(lm, lm.join(X, z), **SEEN).log_prob(y) + prior.log()
    joint = joint.detach().T  # (2, K)

    def posterior(T: float = 1.0):
        def guide():
            c = pyro.sample("c", dist.Categorical(logits=(joint / T).logsumexp(-1)))
            pyro.sample("z", Table(lm, texts_of(lm), (joint / T)[c]))

        return guide

    return Problem(model, posterior)


def category_above_a_plate(lm: LanguageModel) -> Problem:
    """c ~ Categorical; z_i ~ LM(x_c), y_i ~ LM(z_i) in a plate: the plate does not enclose c, so u is joint over it."""
    prior = torch.tensor([0.8, 0.2], dtype=torch.float64)

    def model():
        c = pyro.sample("c", dist.Categorical(prior))
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(lm, X[c], **PRIOR))
            pyro.sample("y", Completion(lm, lm.join(X[c], z), **SEEN), obs=Y)

    z, x = texts_of(lm)[:, None, None], X[:, None]  # (K, c, data)
    joint = Completion(lm, x, **PRIOR).log_prob(z) + Completion(lm, lm.join(x, z), **SEEN).log_prob(Y)
    joint = joint.detach().permute(1, 2, 0)  # (c, data, K)

    def posterior(T: float = 1.0):
        def guide():
            c = pyro.sample("c", dist.Categorical(logits=(joint / T).logsumexp(-1).sum(-1) + prior.log() / T))
            with pyro.plate("data", 2):
                pyro.sample("z", Table(lm, texts_of(lm), (joint / T)[c, torch.arange(2)]))

        return guide

    return Problem(model, posterior)


MAKE = {
    "a category above a plate": category_above_a_plate,
    "one text": one_text,
    "from one token": lambda lm: one_text(lm, min_tokens=1),
    "a hard factor": lambda lm: one_text(lm, factor=no_a_first),
    "the empty text impossible": lambda lm: one_text(lm, factor=not_empty),
    "rewards far apart": lambda lm: one_text(lm, factor=far_apart),
    "two plates": two_plates,
    "two texts": two_texts,
    "a category first": category_first,
}
PROBLEMS = {name: cache(make) for name, make in MAKE.items()}


# One contract for every objective -------------------------------------------------------------------------------------


class ObjectiveContract:
    """What every GFlowNet objective promises; a subclass says how to make one."""

    def make(self, **kwargs) -> Objective:
        raise NotImplementedError

    def by_double_loop(self, u: dict, stop: dict, identified: bool) -> Tensor:
        """The loss of one observation from u[n, t] and q(stop)[n, t], n over samples and t over prefix lengths."""
        raise NotImplementedError

    @pytest.mark.parametrize("explore", [None, Tempered(1.5, 0.5)])
    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    @pytest.mark.parametrize("problem", PROBLEMS)
    def test_vanishes_at_the_posterior(self, lm, problem, temperature, explore):
        found = PROBLEMS[problem](lm)
        objective = self.make(num_particles=12, reward_temperature=temperature, exploration=explore)
        assert abs(objective.loss(found.model, found.posterior(temperature))) < 1e-6

    @pytest.mark.parametrize("prefixes", ["all", 2, 3])
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
    def test_equals_a_plain_double_loop(self, lm, case):
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

        options = {"exploration": Tempered(1.5, 0.5)} if case == "exploration" else {}
        options |= {"prefixes": 2} if case == "three prefixes" else {}
        objective = self.make(num_particles=5, reward_temperature=T, max_plate_nesting=1, **options)
        pyro.set_rng_seed(3)
        loss, balances = objective.loss_and_balances(found.model, guide)
        params = guide_lm.trainable_parameters()
        grads = torch.autograd.grad(loss, params)

        pyro.set_rng_seed(3)
        drawn = objective.draw(found.model, guide, (), {})["z"]  # (5, 2, E)
        (b,) = balances
        plain, q = Plain(lm), Completion(guide_lm, X, **limits)
        expected = torch.zeros((), dtype=torch.float64)
        for i in range(2):
            log_p, log_q, stop = {}, {}, {}
            x = tokens(X[i])
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
                    value = torch.full((2, 3), PAD)
                    value[:, : t + 1] = torch.tensor(cut)
                    log_q[n, t] = q.log_prob(value)[i]
                    stop[n, t] = q.token_log_probs(value)[i, t].exp().item()
            largest = max(log_p.values())
            u = {k: (p if p > -math.inf else largest - objective.floor) - log_q[k] for k, p in log_p.items()}
            expected = expected + self.by_double_loop(u, stop, identified=case != "from one token") / 2
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-8)
        for found_grad, plain_grad in zip(grads, torch.autograd.grad(expected, params), strict=True):
            assert (found_grad - plain_grad).abs().max() < 1e-6 * (1 + plain_grad.abs().max())

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


def adapted(lm: LanguageModel) -> LanguageModel:
    """A guide that is not its base model."""
    guide = lm.with_adapter(LoraConfig(r=2, target_modules="all-linear"))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(4)
        for p in guide.trainable_parameters():
            p.normal_(std=0.2)
    return guide


def lm_guide(guide_lm: LanguageModel) -> Callable:
    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", Completion(guide_lm, X, **PRIOR))

    return guide


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


# Identities -----------------------------------------------------------------------------------------------------------


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
    from lmppl.inference.gflownet.sub_tb import pairwise

    g = torch.Generator().manual_seed(0)
    u = torch.randn(6, 4, 3, generator=g, dtype=torch.float64)
    valid = torch.rand(6, 4, 3, generator=g) < 0.7
    at = torch.arange(6).view(6, 1, 1).expand(6, 4, 3)
    m = valid.sum(0)
    s1, s2 = (u * valid).sum(0), (u * u * valid).sum(0)
    expected = torch.where(m > 1, (m * s2 - s1**2) / (m * (m - 1) / 2).clamp(min=1), 0.0)
    assert (pairwise(u, valid, at, 1.0) - expected).abs().max() < 1e-12
    assert (pairwise(u, valid, at, 1.0 + 1e-12) - expected).abs().max() < 1e-9


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SubTB, VarGrad, PooledVarGrad])
@pytest.mark.parametrize("way", ["torch optimiser", "SVI"])
def test_training_halves_the_total_variation(lm, kind, way):
    """``objective(model, guide)`` under a torch optimiser, and as the ``loss`` of SVI over registered parameters."""
    guide_lm = adapted(lm)
    found, inner, objective = one_text(lm), lm_guide(guide_lm), kind(num_particles=16)
    params = guide_lm.trainable_parameters()
    before = [p.detach().clone() for p in params]

    def guide():
        for i, p in enumerate(params):
            pyro.param(f"guide_{i}", p)
        inner()

    if way == "SVI":
        step = SVI(found.model, guide, pyro.optim.Adam({"lr": 3e-2}), loss=objective).step
    else:
        loss_fn, optimizer = objective(found.model, inner), torch.optim.Adam(params, lr=3e-2)

        def step() -> float:
            optimizer.zero_grad()
            loss = loss_fn()
            loss.backward()
            optimizer.step()
            return loss.item()

    z = texts_of(lm)[:, None]
    exact = pyro.poutine.trace(found.posterior(1.0)).get_trace().nodes["z"]["fn"].log_prob(z).exp()

    def total_variation() -> float:
        with torch.no_grad():
            return (Completion(guide_lm, X, **PRIOR).log_prob(z).exp() - exact).abs().sum(0).mean().item() / 2

    start = total_variation()
    for _ in range(40):
        step()
    assert total_variation() < 0.5 * start
    assert all((p != q).any() for p, q in zip(params, before, strict=True))


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

    def reduce(self, u, balance, identified):
        return super().reduce(u, balance, True)


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


@pytest.mark.parametrize("problem", ["from one token", "a category first"])
def test_pairs_within_a_sample_do_not_identify_and_the_pooled_form_does(lm, problem):
    """Trained alike: the pooled form reaches the posterior; the un-pooled loss goes to zero far away from it."""
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
