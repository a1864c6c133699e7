"""Reweighted wake-sleep: the wake gradient, the dreams and the sleep loss are those of the formulas."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from five_sigma import assert_counts
from four_texts import One, close, still
from problems import PRIOR, SEEN, X, Y, adapted, lm_guide, one_text, texts_of
from reference import Law, Plain, tokens
from tasks import Task

from lmppl.distributions import Completion
from lmppl.inference import ReweightedWakeSleep, dreams
from lmppl.inference.core.plates import Plates
from lmppl.inference.core.query import Query
from lmppl.inference.training.densities import Densities, Drawn
from lmppl.inference.training.reweighted_wake_sleep import wake_loss


def test_the_wake_gradient_is_the_plain_formula(lm):
    """-sum_n w_n grad log q(z_n): weights by one text at a time through the network, in Python."""
    guide_lm = adapted(lm)
    found, guide, N = one_text(lm), lm_guide(guide_lm), 5
    parameters = guide_lm.trainable_parameters()
    pyro.set_rng_seed(0)
    drawn = Drawn(Query(found.model, guide), N).values["z"]  # (5, 2, E)
    pyro.set_rng_seed(0)
    trainer = ReweightedWakeSleep(found.model, guide, num_particles=N, **still(parameters))
    metrics = trainer.step()
    plain, expected = Plain(lm), torch.zeros((), dtype=torch.float64)
    log_q = Completion(guide_lm, X, **PRIOR).log_prob(drawn)
    q = log_q.detach().exp()
    for i in range(2):
        x, w = tokens(X[i]), []
        for n in range(N):
            z = tokens(drawn[n, i])
            seen = Law(plain, x + z[:-1], SEEN["max_tokens"]).log_prob(tokens(Y[i]))
            w.append(math.exp(Law(plain, x, PRIOR["max_tokens"]).log_prob(z) + seen) / q[n, i].item())
        for n in range(N):
            expected = expected - w[n] / sum(w) * log_q[n, i] / 2
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-9)
    found_grad = [p.grad for p in parameters]
    assert close(found_grad, list(torch.autograd.grad(expected, parameters)), 1e-6)


def test_the_wake_gradient_vanishes_at_the_posterior_and_only_there(lm):
    at = One(lm).log_prior + One(lm).log_likelihood
    for shift, vanishes in ((0.0, True), (0.5, False)):
        one = One(lm, at + shift * torch.tensor([1.0, 0.0, -1.0, 0.0]))
        trainer = one.still(ReweightedWakeSleep, num_particles=2)
        found = one.expected_gradient(trainer)
        assert (found.abs().max() < 1e-10) == vanishes


def test_an_element_of_zero_weights_teaches_nothing():
    log_p = torch.tensor([[-1.0, -torch.inf], [-torch.inf, -torch.inf]])
    log_q = torch.tensor([[-2.0, -2.0], [-3.0, -3.0]], requires_grad=True)
    loss = wake_loss(Densities(log_p, log_p, log_q, Plates((), (), (2,), 1)))
    loss.sum().backward()
    assert loss.tolist() == [2.0, 0.0] and log_q.grad.tolist() == [[-1.0, 0.0], [0.0, 0.0]]


def test_dreams_are_draws_of_the_joint(lm):
    """Frequencies of (z, y') among 6000 dreams against p(z) p(y | z): cells of 20 or more expected, within 5 sigma."""
    n = 6000

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Completion(lm, x, **PRIOR))
            pyro.deterministic("what", z)
            pyro.sample("y", Completion(lm, lm.join(x, z), **SEEN), obs=y)

    x, y = X[1].expand(n, 2), Y[0].expand(n, 2)
    (same, dreamt), values = dreams(model)(x, y)
    assert same is x and list(values) == ["z"]
    support = texts_of(lm)
    z = support[:, None]
    joint = Completion(lm, X[1], **PRIOR).log_prob(z)
    joint = (joint + Completion(lm, lm.join(X[1], z), **SEEN).log_prob(support)).exp().detach()  # (z, y)
    rows = [(text[:, None] == support).all(-1).int().argmax(-1) for text in (values["z"], dreamt)]
    counts = torch.zeros_like(joint).index_put_(tuple(rows), torch.ones(n, dtype=torch.float64), accumulate=True)
    assert joint.sum() == pytest.approx(1.0)
    assert_counts(counts, joint, n, rare=20, cells=6)


def test_the_sleep_loss_is_the_log_likelihood_of_the_dream():
    task = Task(dtype=torch.float64)
    dreamt = (task.args[0], task.lm.encode(["ab", "c"], stop="eos"))
    z = task.lm.encode(["bb", ""], stop="eos")
    trainer = task.trainer(ReweightedWakeSleep, wake=0.0, sleep=2.0, simulate=lambda x, y: (dreamt, {"z": z}))
    expected = -task.q_of(*dreamt).log_prob(z).mean().item()
    metrics = trainer.step(*task.args)
    assert metrics["sleep"] == pytest.approx(expected, abs=1e-10)
    assert metrics["loss"] == pytest.approx(2 * expected, abs=1e-10)
