"""Programs whose number of texts depends on earlier ones, by masks; and auxiliary sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import peft
import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import A, B, adapted
from pyro import poutine
from tables import Table
from torch import Tensor

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.inference import (
    SMC,
    DetailedBalance,
    Enumeration,
    GFlowNet,
    Importance,
    MetropolisHastings,
    PooledVarGrad,
    Replay,
    SiteMismatch,
    SubTB,
    VarGrad,
)
from lmppl.text import PAD, equal

OBJECTIVES = [SubTB, DetailedBalance, VarGrad, PooledVarGrad]
X = torch.tensor([[A, PAD], [B, A]])  # two questions
Y = torch.tensor([[B, 0], [1, 0]])  # and their answers
LIMITS = {"max_tokens": 1}


def goes_on(thought: Tensor) -> Tensor:
    """A thought that is an "a" has a second one; the empty thought and all others have none."""
    return thought[..., 0] == A


def starts(thought: Tensor) -> Tensor:
    """The other way round: the empty thought has a second one."""
    return thought[..., 0] != A


@dataclass
class Tree:
    """z1 ~ LM(x); z2 ~ LM(x z1) if z1 goes on; y ~ LM(x z1 z2) observed; ``joint`` (z1, z2, data) of all values."""

    model: Callable
    guide: Callable  # of two functions that give z1's and z2's distribution
    support: Tensor
    joint: Tensor  # log p(z1, z2, y), for a z2 that is not there: as if it were the first value, others -inf
    alive: Tensor  # (z1,)


def tree(lm: LanguageModel, alive: Callable[[Tensor], Tensor] = goes_on) -> Tree:
    def last(z1, z2):
        return torch.where(alive(z1)[..., None], z2, lm.encode("").new_full((1,), PAD))

    def model():
        with pyro.plate("data", 2):
            z1 = pyro.sample("z1", Completion(lm, X, **LIMITS))
            with poutine.mask(mask=alive(z1)):
                z2 = pyro.sample("z2", Completion(lm, lm.join(X, z1), **LIMITS))
            pyro.sample("y", Completion(lm, lm.join(X, z1, last(z1, z2)), max_tokens=2), obs=Y)

    def guide(first: Callable, second: Callable):
        def run():
            with pyro.plate("data", 2):
                z1 = pyro.sample("z1", first())
                with poutine.mask(mask=alive(z1)):
                    pyro.sample("z2", second(z1))

        return run

    support = Completion(lm, X[0], **LIMITS).enumerate_support()  # (K, 2)
    K = len(support)
    joint = torch.full((K, K, 2), -torch.inf, dtype=torch.float64)
    with torch.no_grad():
        for i, z1 in enumerate(support):  # plain loops: one text at a time
            for k in range(2):
                x = X[k][X[k] != PAD]
                first = Completion(lm, x, **LIMITS).log_prob(z1)
                if not alive(z1):
                    joint[i, 0, k] = first + Completion(lm, lm.join(x, z1), max_tokens=2).log_prob(Y[k])
                    continue
                for j, z2 in enumerate(support):
                    second = Completion(lm, lm.join(x, z1), **LIMITS).log_prob(z2)
                    seen = Completion(lm, lm.join(x, z1, z2), max_tokens=2).log_prob(Y[k])
                    joint[i, j, k] = first + second + seen
    return Tree(model, guide, support, joint, alive(support))


TREES = {
    "a goes on": cache(tree),
    "the empty thought goes on": cache(lambda lm: tree(lm, starts)),
    "all go on": cache(lambda lm: tree(lm, lambda z: z[..., 0] >= 0)),
    "none goes on": cache(lambda lm: tree(lm, lambda z: z[..., 0] < 0)),
}


def row_of(support: Tensor, value: Tensor) -> Tensor:
    return equal(value[..., None, :], support).int().argmax(-1)


def exact_guide(lm: LanguageModel, found: Tree, T: float = 1.0, tables: list[Tensor] | None = None) -> Callable:
    """The posterior p^(1/T), or a guide of these tables: logits (data, z1) and (data, z1, z2)."""
    joint = (found.joint / T).permute(2, 0, 1)  # (data, z1, z2)
    first, second = (joint.logsumexp(-1), joint) if tables is None else tables
    second = torch.where(found.alive[:, None], second, 0.0)

    def pick(z1):
        return second[torch.arange(2), row_of(found.support, z1)]

    return found.guide(lambda: Table(lm, found.support, first), lambda z1: Table(lm, found.support, pick(z1)))


def total_variation(found: Tree, tables: list[Tensor]) -> float:
    with torch.no_grad():
        first, second = tables[0].log_softmax(-1), tables[1].log_softmax(-1)
        only = torch.full_like(second, -torch.inf)
        only[..., 0] = 0.0
        log_q = first[..., None] + torch.where(found.alive[:, None], second, only)
        p = found.joint.permute(2, 0, 1).flatten(1).softmax(-1)
        return (log_q.flatten(1).exp() - p).abs().sum(-1).max().item() / 2


# Objectives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("name", TREES)
def test_the_loss_vanishes_at_the_posterior_and_not_elsewhere(lm, kind, name):
    found = TREES[name](lm)
    for T in (1.0, 2.0):
        pyro.set_rng_seed(0)
        assert abs(kind(num_particles=32, reward_temperature=T).loss(found.model, exact_guide(lm, found, T))) < 1e-6
    pyro.set_rng_seed(0)
    assert kind(num_particles=32).loss(found.model, exact_guide(lm, found, 1.5)) > 1e-3


@pytest.mark.parametrize("name", ["a goes on", "the empty thought goes on"])
def test_u_and_its_weights_equal_a_plain_double_loop(lm, name):
    """Every (site, prefix, sample): log p, log q, what is valid and what the stop weighs, one value at a time."""
    found = TREES[name](lm)
    g = torch.Generator().manual_seed(0)
    K = len(found.support)
    tables = [
        torch.randn(2, K, generator=g, dtype=torch.float64),
        torch.randn(2, K, K, generator=g, dtype=torch.float64),
    ]
    guide = exact_guide(lm, found, tables=tables)
    pyro.set_rng_seed(1)
    objective = PooledVarGrad(num_particles=40)
    drawn = objective.draw(found.model, guide, (), {})
    rows = {s: row_of(found.support, drawn[s]) for s in ("z1", "z2")}  # (40, 2)
    log_first, log_second = (t.log_softmax(-1) for t in tables)
    empty = int(row_of(found.support, torch.tensor([0, PAD])))
    for b in objective.balances(found.model, guide, (), {}, drawn):
        assert b.log_p.shape == (2, 40, 2)
        for n in range(40):
            for k in range(2):
                i, j = (int(rows[s][n, k]) for s in ("z1", "z2"))
                real = found.alive[i]
                lengths = int(found.support[i if b.site == "z1" else j][0] != 0)
                ways = range(lengths + 1) if b.site == "z1" or real else [lengths]
                for t in range(2):
                    assert bool(b.valid[t, n, k]) == (t in ways), (b.site, t, i, j)
                    if t not in ways:
                        continue
                    a, c = (i, j) if t == lengths else (empty, j) if b.site == "z1" else (i, empty)
                    there = bool(found.alive[a])
                    log_p = found.joint[a, c if there else 0, k]
                    log_q = log_first[k, a] + (log_second[k, a, c] if there else 0.0)
                    assert float(b.log_p[t, n, k]) == pytest.approx(float(log_p), abs=1e-9)
                    assert float(b.log_q[t, n, k]) == pytest.approx(float(log_q), abs=1e-9)
                    if b.site == "z2" and not real:  # a text that is not there has ended for certain
                        assert float(b.stop[t, n, k]) == 1.0 and bool(b.last[t, n, k])
                    else:
                        own = log_first[k] if b.site == "z1" else log_second[k, i]
                        stop = own[empty].exp() if t == 0 else torch.ones(())
                        assert float(b.stop[t, n, k]) == pytest.approx(float(stop), abs=1e-9)


@pytest.mark.parametrize("name", ["a goes on", "the empty thought goes on"])
def test_stop_weights_integrate_the_stopping_time_of_texts_that_are_there(lm, name):
    """sum_t w_t f(z1, z2_1..t) over the prefixes of samples is unbiased for E_q f; what is not there counts once."""
    found, n = TREES[name](lm), 4000
    guide = exact_guide(lm, found, 2.0)
    pyro.set_rng_seed(0)
    objective = PooledVarGrad(num_particles=n)
    drawn = objective.draw(found.model, guide, (), {})
    b = objective.balances(found.model, guide, (), {}, drawn)[1]
    alive = found.alive[row_of(found.support, drawn["z1"])]
    estimate = (b.stop * b.valid * torch.where(alive, b.at + 2, 1.0)).sum(0)  # (n, 2)
    q = (found.joint / 2.0).flatten(0, 1).softmax(0).view_as(found.joint)
    length = (found.support[:, 0] != 0).double()
    exact = (q * torch.where(found.alive[:, None], length + 2, 1.0)[..., None]).sum((0, 1))
    assert b.site == "z2"
    assert ((estimate.mean(0) - exact).abs() < 5 * estimate.std(0) / n**0.5).all()


class Undefined(dist.Normal):
    """A density that is NaN below zero."""

    def log_prob(self, value):
        return super().log_prob(value).masked_fill(value < 0, torch.nan)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_what_is_not_there_may_be_impossible_or_undefined(lm, kind):
    """u, loss and gradients are those of the program without the masked sites."""
    guide_lm = adapted(lm)

    def make(masked: bool):
        def model():
            with pyro.plate("data", 2):
                z1 = pyro.sample("z1", Completion(lm, X, **LIMITS))
                if masked:
                    with poutine.mask(mask=torch.zeros(z1.shape[:-1], dtype=torch.bool)):
                        pyro.sample("z2", Completion(lm, lm.join(X, z1), max_tokens=1, min_tokens=1))
                        pyro.sample("s", Undefined(0.0, 1.0))
                pyro.sample("y", Completion(lm, lm.join(X, z1), max_tokens=2), obs=Y)

        def guide():
            with pyro.plate("data", 2):
                z1 = pyro.sample("z1", Completion(guide_lm, X, **LIMITS))
                if masked:
                    with poutine.mask(mask=torch.zeros(z1.shape[:-1], dtype=torch.bool)):
                        pyro.sample("z2", Completion(guide_lm, guide_lm.join(X, z1), **LIMITS))
                        pyro.sample("s", dist.Normal(0.0, 1.0))

        return model, guide

    objective, found = kind(num_particles=12), []
    pyro.set_rng_seed(0)
    values = objective.draw(*make(True), (), {})
    assert bool((values["s"] < 0).any()) and bool((values["z2"][..., 0] == 0).any())
    for masked in (True, False):
        held = values if masked else {"z1": values["z1"]}
        balances = objective.balances(*make(masked), (), {}, held)
        first = replace(balances[0], identifies=False)
        reduced = objective.reduce(objective.residual(first), first).mean()
        found.append((balances[0], reduced, torch.autograd.grad(reduced, guide_lm.trainable_parameters())))
    assert torch.allclose(found[0][0].u, found[1][0].u) and torch.equal(found[0][0].valid, found[1][0].valid)
    assert torch.allclose(found[0][1], found[1][1])
    assert all(torch.allclose(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))


# Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_training_reaches_the_exact_posterior(lm, kind):
    found = TREES["a goes on" if kind in (VarGrad, SubTB) else "the empty thought goes on"](lm)
    K = len(found.support)
    tables = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, K), (2, K, K))]
    gflownet = GFlowNet(
        found.model,
        lambda: exact_guide(lm, found, tables=tables)(),
        kind(num_particles=12),
        optimizer=torch.optim.Adam(tables, lr=0.15),
    )
    assert total_variation(found, tables) > 0.2
    gflownet.fit([()], 100 if kind is SubTB else 80, progress=False)
    assert total_variation(found, tables) < 0.05


def test_importance_and_enumeration_agree_with_the_loops(lm):
    """Evidence and marginals; a text that is not there follows what proposes it."""
    found = TREES["a goes on"](lm)
    log_z = found.joint.flatten(0, 1).logsumexp(0)
    exact = Enumeration(found.model).run()
    assert (exact.log_evidence - log_z).abs().max() < 1e-9
    guide = exact_guide(lm, found, 1.0)
    assert (Importance(found.model, guide, num_particles=4).run().log_evidence - log_z).abs().max() < 1e-9
    p = found.joint.permute(2, 0, 1).flatten(1).softmax(-1).view(2, *found.joint.shape[:2]).sum(-1)
    for k in range(2):
        table = dict(exact.table("z1", k))
        for i, z1 in enumerate(found.support):
            assert table[lm.decode(z1)] == pytest.approx(float(p[k, i]), abs=1e-9)


@pytest.mark.slow
def test_an_adapter_learns_the_tree(lm):
    """The same with a guide that is a language model: two thoughts, one adapter."""
    found = TREES["a goes on"](lm)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        q = lm.with_adapter(peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))

    def guide():
        with pyro.plate("data", 2):
            z1 = pyro.sample("z1", Completion(q, q.join(Y, X), **LIMITS))
            with poutine.mask(mask=goes_on(z1)):
                pyro.sample("z2", Completion(q, q.join(Y, X, z1), **LIMITS))

    def tables():
        with torch.no_grad():
            first = Completion(q, q.join(Y, X), **LIMITS).log_prob(found.support[:, None])
            z1, z2 = found.support[:, None, None], found.support[None, :, None]
            second = Completion(q, q.join(Y, X, z1), **LIMITS).log_prob(z2)
        return [first.T, second.permute(2, 0, 1)]

    assert total_variation(found, tables()) > 0.15
    optimizer = torch.optim.AdamW(q.trainable_parameters(), lr=2e-2)
    GFlowNet(found.model, guide, optimizer=optimizer, replay=Replay()).fit([()], 60, progress=False)
    assert total_variation(found, tables()) < 0.06


# Auxiliary sites ----------------------------------------------------------------------------------------------------


AUXILIARY = {"is_auxiliary": True}


def with_auxiliary(lm: LanguageModel, kind: str, *, backward: bool = True) -> tuple[Callable, Callable, Tensor]:
    """z ~ LM(x), y ~ LM(x z), and an auxiliary a ~ r(a | z) in the model (if ``backward``); a text or a category.

    The model; a guide of q(a), q(z | a) made of tables (data, a) and (data, a, z); and the optimal log q(a, z).
    """
    support = Completion(lm, X[0], **LIMITS).enumerate_support()
    K = len(support) if kind == "text" else 3
    g = torch.Generator().manual_seed(0)
    r = torch.randn(len(support), K, generator=g, dtype=torch.float64).log_softmax(-1)  # (z, a): any will do

    def auxiliary(logits):
        return Table(lm, support, logits) if kind == "text" else dist.Categorical(logits=logits)

    def row(a):
        return row_of(support, a) if kind == "text" else a

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(lm, X, **LIMITS))
            if backward:
                pyro.sample("a", auxiliary(r[row_of(support, z)]), infer=AUXILIARY)
            pyro.sample("y", Completion(lm, lm.join(X, z), max_tokens=2), obs=Y)

    def guide(first, second):
        with pyro.plate("data", 2):
            a = pyro.sample("a", auxiliary(first), infer=AUXILIARY)
            pyro.sample("z", Table(lm, support, second[torch.arange(2), row(a)]))

    with torch.no_grad():
        z = support[:, None]
        joint = Completion(lm, X, **LIMITS).log_prob(z) + Completion(lm, lm.join(X, z), max_tokens=2).log_prob(Y)
    log_q = joint.T[:, None] + (r.T if backward else torch.zeros_like(r.T))  # (data, a, z)
    return model, guide, log_q


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("a_is", ["text", "category"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_auxiliary_site_leaves_the_posterior_as_it_is(lm, kind, a_is, backward):
    """The optimum is p(z | y) r(a | z), whatever r is; with no r in the model a is uniform."""
    model, guide, log_q = with_auxiliary(lm, a_is, backward=backward)
    objective = kind(num_particles=32)
    pyro.set_rng_seed(0)
    assert abs(objective.loss(model, lambda: guide(log_q.logsumexp(-1), log_q))) < 1e-6
    assert objective.loss(model, lambda: guide(log_q.logsumexp(-1), 0.5 * log_q)) > 1e-3
    marginal = log_q.flatten(1).softmax(-1).view_as(log_q).sum(1)  # (data, z)
    found = Enumeration(with_auxiliary(lm, a_is, backward=False)[0]).run()
    for k in range(2):
        table = dict(found.table("z", k))
        for i, z in enumerate(Completion(lm, X[0], **LIMITS).enumerate_support()):
            assert table[lm.decode(z)] == pytest.approx(float(marginal[k, i]), abs=1e-9)


def test_training_with_a_backward_policy_reaches_the_posterior(lm):
    model, guide, log_q = with_auxiliary(lm, "text")
    tables = [torch.zeros(s, dtype=torch.float64, requires_grad=True) for s in (log_q.shape[:2], log_q.shape)]
    optimizer = torch.optim.Adam(tables, lr=0.2)
    gflownet = GFlowNet(model, lambda: guide(*tables), optimizer=optimizer)
    gflownet.fit([()], 60, progress=False)
    with torch.no_grad():
        found = tables[0].log_softmax(-1)[..., None] + tables[1].log_softmax(-1)
        p = log_q.flatten(1).softmax(-1).view_as(log_q).sum(1)
        assert float((found.exp().sum(1) - p).abs().sum(-1).max()) / 2 < 0.05
    posterior = gflownet.run(num_particles=50)
    assert set(posterior.samples) == {"z"}
    error = (posterior.log_evidence - log_q.flatten(1).logsumexp(-1)).abs()
    assert (error < 5 * (1 / posterior.ess - 1 / 50).clamp(min=1e-4).sqrt()).all()


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("a_is", ["text", "category"])
def test_an_auxiliary_site_leaves_the_evidence_as_it_is(lm, a_is, backward):
    """Under the optimal guide every weight is the evidence; with no r in the model a is uniform."""
    model, guide, log_q = with_auxiliary(lm, a_is, backward=backward)
    log_evidence = Enumeration(with_auxiliary(lm, a_is, backward=False)[0]).run().log_evidence
    log_q = log_q - log_q.flatten(1).logsumexp(-1)[:, None, None]

    def optimal():
        guide(log_q.logsumexp(-1), log_q)

    for algorithm in (
        Importance(model, optimal, 8),
        SMC(model, optimal, 8, ess_threshold=0),
        SMC(model, optimal, 8, ess_threshold=0, twist="stop"),
    ):
        posterior = algorithm.run()
        assert torch.allclose(posterior.log_weights.exp() * 8, log_evidence.exp().expand(8, 2), rtol=1e-9), algorithm


@pytest.mark.parametrize("backward", [True, False])
def test_smc_resamples_with_an_auxiliary_site(lm, backward):
    model, guide, log_q = with_auxiliary(lm, "category", backward=backward)
    log_evidence = Enumeration(with_auxiliary(lm, "category", backward=False)[0]).run().log_evidence
    pyro.set_rng_seed(0)
    smc = SMC(model, lambda: guide(torch.zeros_like(log_q[..., 0]), 0.5 * log_q), 64, ess_threshold=1.0)
    ratio = torch.stack([(smc.run().log_evidence - log_evidence).exp() for _ in range(30)])
    assert ((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / 30**0.5).all()
    assert (ratio.std(0) / 30**0.5 < 0.05).all()


def test_an_auxiliary_site_whose_values_are_not_equally_many(lm):
    """z is 0 or 1; a has one value at z = 0, and three at z = 1."""
    of_z = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)

    def model():
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.25, dtype=torch.float64)))

    def guide():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)))
        pyro.sample("a", dist.Categorical(of_z[z.long()]), infer=AUXILIARY)

    pyro.set_rng_seed(0)
    for algorithm in (Importance(model, guide, 20_000), SMC(model, guide, 20_000)):
        posterior = algorithm.run()
        assert abs(float(posterior.log_evidence)) < 5 * (1 / float(posterior.ess) - 1 / 20_000) ** 0.5
        assert dict(posterior.table("z"))[1.0] == pytest.approx(0.25, abs=0.02)
    chains = MetropolisHastings(model, guide, num_chains=2000, num_samples=4, warmup=20, moves="independence").run()
    assert dict(chains.table("z"))[1.0] == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 2000) ** 0.5)


@pytest.mark.parametrize("algorithm", [Importance, SMC])
def test_the_values_of_an_auxiliary_vector_are_counted_along_each_axis(algorithm):
    """Uniform in the guide, as it is in the model, so that every weight is the evidence."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.25, dtype=torch.float64)))
        pyro.factor("f", 0 * z - 1.0)

    def guide():
        pyro.sample("a", dist.Bernoulli(torch.full((2, 3), 0.5, dtype=torch.float64)).to_event(2), infer=AUXILIARY)
        pyro.sample("b", dist.Categorical(torch.ones(2, 5, dtype=torch.float64)).to_event(1), infer=AUXILIARY)
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.25, dtype=torch.float64)))

    posterior = algorithm(model, guide, 8).run()
    assert torch.allclose(posterior.log_weights + torch.tensor(8.0).double().log(), torch.tensor(-1.0).double())


@pytest.mark.parametrize("algorithm", [Importance, SMC, MetropolisHastings])
def test_an_auxiliary_site_that_decides_where_the_others_can_be_is_refused(algorithm):
    """With r = 1/2 the evidence would be 1/2, and right if every value of a can go with every z."""
    disjoint, overlapping = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], [[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]])

    def model():
        with pyro.plate("data", 40):  # of many sites in a plate the density is small without being zero
            pyro.sample("w", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("z", dist.Categorical(torch.tensor([0.25, 0.25, 0.5])))

    def guide_of(table):
        def guide():
            a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.5)), infer=AUXILIARY)
            with pyro.plate("data", 40):
                pyro.sample("w", dist.Bernoulli(0.4 + 0.2 * a))
            pyro.sample("z", dist.Categorical(table[a.long()]))

        return guide

    pyro.set_rng_seed(0)
    number = {"num_chains" if algorithm is MetropolisHastings else "num_particles": 64}
    algorithm(model, guide_of(overlapping), **number).run()
    with pytest.raises(SiteMismatch, match="auxiliary sites \\['a'\\].*'z'"):
        algorithm(model, guide_of(disjoint), **number).run()


def test_training_has_the_same_target_where_values_are_not_equally_many():
    """The loss is zero where q(z) = p(z) and a is uniform over its values given z; not where q(a, z) = c p(z)."""
    few = torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)

    def model():
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.25, dtype=torch.float64)))

    def guide_of(one):
        def guide():
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(one, dtype=torch.float64)))
            pyro.sample("a", dist.Categorical(few[z.long()]), infer=AUXILIARY)

        return guide

    pyro.set_rng_seed(0)
    objective = VarGrad(num_particles=32)
    assert abs(objective.loss(model, guide_of(0.25))) < 1e-9
    assert objective.loss(model, guide_of(0.5)) > 0.1  # of three values each as likely as the only one: 3 x 1/4 to 3/4


@pytest.mark.parametrize("fn", [dist.Normal(0.0, 1.0), dist.Poisson(1.0)])
@pytest.mark.parametrize("algorithm", [Importance, SMC, MetropolisHastings])
def test_an_auxiliary_site_over_which_nothing_is_uniform_is_named(lm, fn, algorithm):
    def model(backward):
        z = pyro.sample("z", Completion(lm, X[0], **LIMITS))
        if backward:
            pyro.sample("a", fn, infer=AUXILIARY)
        pyro.sample("y", Completion(lm, lm.join(X[0], z), max_tokens=2), obs=Y[0])

    def guide(backward):
        pyro.sample("a", fn, infer=AUXILIARY)
        pyro.sample("z", Completion(lm, X[0], **LIMITS))

    algorithm(model, guide).run(True)
    with pytest.raises(SiteMismatch, match="auxiliary site 'a' is not in the model"):
        algorithm(model, guide).run(False)


@pytest.mark.parametrize("algorithm", [Importance, SMC])
def test_pyros_guides_of_continuous_sites_transform_an_auxiliary_one(algorithm):
    """log k is Gaussian before and after x is seen, and the guide draws it from its posterior as a; k = exp a."""

    def model():
        k = pyro.sample("k", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("x", dist.LogNormal(k.log(), 1.0), obs=torch.tensor(2.0, dtype=torch.float64))

    def guide():
        a = pyro.sample("a", dist.Normal(torch.tensor(2.0).double().log() / 2, 0.5**0.5), infer=AUXILIARY)
        pyro.sample("k", dist.Delta(a.exp(), log_density=-a))

    log_evidence = dist.LogNormal(torch.zeros(()).double(), 2**0.5).log_prob(torch.tensor(2.0).double())
    posterior = algorithm(model, guide, 16).run()
    assert torch.allclose(posterior.log_weights.exp() * 16, log_evidence.exp().expand(16), rtol=1e-6)
