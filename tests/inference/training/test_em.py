"""Variational EM: its gradient is the likelihood's, whole or by mini-batches, for every E-step, and it climbs."""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations

import pyro
import pytest
import torch
from em_task import ADAM, SGD, SIZE, Task

from lmppl.distributions import Completion
from lmppl.inference import SMC, Enumeration, Importance, MetropolisHastings, ReweightedWakeSleep, VariationalEM


@pytest.mark.parametrize("max_particles", [256, 8])
def test_with_the_exact_posterior_the_gradient_is_the_likelihoods(max_particles):
    task = Task()
    expected = task.gradient(task.log_joint().logsumexp(0).sum())
    found = task.ascent(task.still(Enumeration(task.model), max_particles=max_particles))
    assert float((found - expected).abs().max()) < 1e-8 < 1e-2 < float(expected.abs().max())


def test_metrics_with_the_exact_posterior():
    task = Task()
    metrics = task.still(Enumeration(task.model)).step(*task.args)
    with torch.no_grad():
        log_joint = task.log_joint()
    expected = task.log_likelihood()
    assert metrics["log_evidence"] == pytest.approx(expected, abs=1e-10) and metrics["gap"] == 0
    assert metrics["elbo"] == metrics["log_evidence"]
    surrogate = (log_joint.softmax(0) * log_joint).sum().item()
    assert metrics["surrogate"] == pytest.approx(surrogate, abs=1e-10) and metrics["loss"] == -metrics["surrogate"]


def test_a_value_of_weight_zero_has_no_gradient_not_even_nan():
    """A factor log(s * 0) for half of the values: its own derivative is 0/0."""
    task = Task()
    s = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    x, y = task.args

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", Completion(task.p, x, **SIZE))
            pyro.sample("y", Completion(task.p, task.p.join(x, z), **SIZE), obs=y)
            pyro.factor("f", (s * (z[..., 0] != 2).double()).log())

    em = VariationalEM(model, None, Enumeration(model), SGD([*task.theta, s], lr=0.0))
    em.step()
    z = Completion(task.p, x, **SIZE).enumerate_support()
    expected = task.gradient(task.log_joint().masked_fill(z[..., 0] == 2, -torch.inf).logsumexp(0).sum())
    found = -torch.cat([p.grad.flatten() for p in task.theta])
    assert float((found - expected).abs().max()) < 1e-8
    assert -s.grad.item() == pytest.approx(3 / 0.7, abs=1e-8)


def test_an_observation_that_is_impossible_teaches_nothing():
    task = Task()
    x, y = task.args

    def model(x, y):
        with pyro.plate("data", 3):
            z = pyro.sample("z", Completion(task.p, x, **SIZE))
            pyro.sample("y", Completion(task.p, task.p.join(x, z), **SIZE), obs=y)
            pyro.factor("f", torch.tensor([0.0, -torch.inf, 0.0], dtype=torch.float64))

    em = VariationalEM(model, None, Enumeration(model), SGD(task.theta, lr=0.0))
    found = task.ascent(em)
    expected = task.gradient(task.log_joint().logsumexp(0)[[0, 2]].sum())
    assert float((found - expected).abs().max()) < 1e-8


# -- mini-batches ------------------------------------------------------------------------------------------------------


def test_subsamples_given_average_to_the_gradient_of_all_data():
    task = Task()
    em = task.still(Enumeration(task.model))
    pairs = [torch.tensor(pair) for pair in combinations(range(3), 2)]
    mean = torch.stack([task.ascent(em, *task.args, subsample=pair) for pair in pairs]).mean(0)
    expected = task.gradient(task.log_joint().logsumexp(0).sum())
    assert float((mean - expected).abs().max()) < 1e-8
    full = em.step(*task.args)
    parts = [em.step(*task.args, subsample=pair) for pair in pairs]
    for name in ("surrogate", "log_evidence"):
        assert sum(m[name] for m in parts) / 3 == pytest.approx(full[name], abs=1e-8)


@pytest.mark.parametrize("kind", ["enumeration", "gflownet"])
def test_a_subsample_that_the_plate_draws_is_one_for_inference_and_m_step(kind):
    task = Task(layers=2)
    e_step = Enumeration(task.model) if kind == "enumeration" else task.gflownet(lr=0.0)
    em = task.still(e_step, num_particles=64, exact=Enumeration(task.model))
    log_evidence = task.log_joint().logsumexp(0).detach()
    sums = {pair: 1.5 * log_evidence[list(pair)].sum().item() for pair in combinations(range(3), 2)}
    gradients = {p: task.gradient(1.5 * task.log_joint().logsumexp(0)[list(p)].sum()) for p in sums}
    seen = set()
    for _ in range(12):
        metrics = em.step(*task.args, subsample_size=2)
        found = -torch.cat([p.grad.flatten() for p in task.theta])
        (pair,) = [p for p, value in sums.items() if abs(value - metrics["log_likelihood"]) < 1e-8]
        seen.add(pair)
        near = {p: float((found - g).norm() / g.norm()) for p, g in gradients.items()}
        assert near[pair] < (1e-8 if kind == "enumeration" else 0.5) and min(near, key=near.__getitem__) == pair
    assert len(seen) == 3


def test_a_subsampled_plate_that_leaves_a_latent_out_is_refused():
    task = Task()
    x, y = task.args

    def model():
        z = pyro.sample("z", Completion(task.p, x[0], **SIZE))
        with pyro.plate("data", 3, subsample_size=2) as i:
            pyro.sample("y", Completion(task.p, task.p.join(x[i], z), **SIZE), obs=y[i])

    with pytest.raises(ValueError, match="plate 'data' is subsampled"):
        VariationalEM(model, None, Importance(model), SGD(task.theta, lr=0.0)).step()


# -- the E-steps -------------------------------------------------------------------------------------------------------

E_STEPS = {
    "SMC": lambda t: SMC(t.model, num_particles=400, ess_threshold=0.8),
    "Metropolis": lambda t: MetropolisHastings(t.model, num_chains=60, num_samples=1, warmup=12),
    "guide": lambda t: t.gflownet(lr=0.0, num_particles=2),
}


@pytest.mark.parametrize("name", E_STEPS)
def test_every_e_step_gives_the_gradient_of_the_likelihood(name):
    """The length of the gradient along the true one, whose bias of order 1/N is far below the standard error."""
    task = Task()
    expected = task.gradient(task.log_joint().logsumexp(0).sum())
    em = task.still(E_STEPS[name](task), num_particles=1000)
    along = torch.stack([task.ascent(em) @ expected / (expected @ expected) for _ in range(10)])
    error = along.std() / 10**0.5
    assert error < 0.03 and abs(along.mean() - 1) < 5 * error


def test_without_weights_the_gradient_is_the_elbos():
    task = Task()
    x, y = task.args
    em = task.still(task.gflownet(lr=0.0, num_particles=2), num_particles=200, weighted=False)
    log_joint = task.log_joint()
    z = Completion(task.p, x, **SIZE).enumerate_support()
    with torch.no_grad():
        log_q = Completion(task.q, task.q.join(y, x), **SIZE).log_prob(z)
    expected = task.gradient((log_q.exp() * log_joint).sum())
    other = task.gradient(task.log_joint().logsumexp(0).sum())
    along, metrics = [], []
    for _ in range(12):
        metrics.append(em.step(*task.args))
        found = -torch.cat([p.grad.flatten() for p in task.theta])
        along.append(found @ expected / (expected @ expected))
    error = torch.stack(along).std() / 12**0.5
    assert error < 0.05 and abs(torch.stack(along).mean() - 1) < 5 * error
    assert abs(other @ expected / (expected @ expected) - 1) > 5 * error  # the two gradients can be told apart
    elbo = (log_q.exp() * (log_joint - log_q)).sum().item()
    values = torch.tensor([m["elbo"] for m in metrics])
    assert abs(values.mean() - elbo) < 5 * values.std() / 12**0.5
    assert all(m["gap"] == pytest.approx(m["log_evidence"] - m["elbo"]) for m in metrics)


# -- climbing ----------------------------------------------------------------------------------------------------------


def test_exact_em_with_backtracking_never_falls():
    def rounds(n: int, backtrack: bool) -> tuple[list[float], list[dict[str, float]]]:
        task = Task()
        em = VariationalEM(task.model, None, Enumeration(task.model), SGD(task.theta, lr=0.3), backtrack=backtrack)
        metrics = [em.step(*task.args) for _ in range(n)]
        return [m["log_evidence"] for m in metrics] + [task.log_likelihood()], metrics

    values, metrics = rounds(20, backtrack=True)
    rise = torch.tensor(values).diff()
    assert float(rise.min()) > -1e-6 and float(rise[:3].min()) > 0.05
    assert sum(m["halvings"] for m in metrics) > 5
    gain = torch.tensor([m["gain"] for m in metrics])
    assert bool((gain >= 0).all()) and bool((rise - gain > -1e-6).all())  # the likelihood rises by at least Q's gain
    plain, _ = rounds(4, backtrack=False)
    assert float(torch.tensor(plain).diff().min()) < -0.1  # these steps are too long without it


def test_several_m_steps_climb_the_same_surrogate():
    task, other = Task(), Task()
    one = VariationalEM(task.model, None, Enumeration(task.model), SGD(task.theta, lr=0.01), backtrack=True)
    five = VariationalEM(
        other.model, None, Enumeration(other.model), SGD(other.theta, lr=0.01), backtrack=True, m_steps=5
    )
    a, b = one.step(*task.args), five.step(*other.args)
    assert b["gain"] > 2 * a["gain"] > 0
    with torch.no_grad():
        start = Task().log_joint()
        q = (start - start.logsumexp(0)).exp()
        assert (q * (other.log_joint() - start)).sum().item() == pytest.approx(b["gain"], abs=1e-9)


ENDS = {
    "exact": lambda t: Enumeration(t.model),
    "GFlowNet": lambda t: t.gflownet(),
    "wake-sleep": lambda t: ReweightedWakeSleep(t.model, t.guide, optimizer=ADAM(t.phi, lr=1e-2)),
    "SMC": lambda t: SMC(t.model, num_particles=32),
}


@cache
def end(name: str) -> float:
    """Nats an observation after 30 rounds: two prompts seen with two endings each, so that -log 2 is the best."""
    task = Task(x=["ab", "ab", "b", "b"], y=["cb", "", "a", "cb"], layers=2)
    assert task.log_likelihood() / 4 < -4
    e_step = ENDS[name](task)
    em = VariationalEM(task.model, getattr(e_step, "guide", None), e_step, ADAM(task.theta, lr=3e-2))
    em.fit([task.args], 30, progress=False)
    return task.log_likelihood() / 4


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("GFlowNet", "wake-sleep")), "SMC"]
)
def test_amortised_and_sampled_em_end_near_exact_em(name):
    assert -0.8 < end("exact") < -math.log(2)
    assert abs(end(name) - end("exact")) < 0.1
