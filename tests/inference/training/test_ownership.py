"""Whose parameters an optimiser may move: all of the guide's or the model's, and no others."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from em_task import Task as EMTask
from pyro.infer import SVI, Trace_ELBO
from tasks import Task
from test_training import KINDS, QUIET, adam, batch_of

from lmppl.distributions import Completion
from lmppl.inference import (
    Enumeration,
    GFlowNet,
    TrajectoryBalance,
    VariationalEM,
)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_of_others_is_refused_by_name(kind, tmp_path):
    task = Task()
    other, own = task.lm.with_adapter(task.q._adapter.config), task.q.trainable_parameters()
    batch = batch_of(kind, task)
    refused = {
        "none of the guide's own": other.trainable_parameters(),
        "does not hold 1 parameter ": own[1:],
        "of the model, which training must not change": [*own, *task.lm.network.base_parameters],
    }
    for said, parameters in refused.items():
        trainer = kind(task.model, task.guide, optimizer=adam(parameters))
        with pytest.raises(ValueError, match=f"optimizer: .*{said}") as error:
            trainer.fit([batch], 2, checkpoint=tmp_path / "c", **QUIET)
        assert ".weight'" in str(error.value) and not (tmp_path / "c").exists()
        with pytest.raises(ValueError, match=said):
            trainer.step(*batch)
    assert len(kind(task.model, task.guide, optimizer=adam(own)).fit([batch], 1, **QUIET)) == 1


def test_a_parameter_of_pyros_or_of_a_closure_is_missed_by_name():
    task, scale = Task(), torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def guide(x, y, own=None):
        t = pyro.param("heat", torch.ones((), dtype=torch.float64), constraint=dist.constraints.positive)
        with pyro.plate("stories", len(x)):
            pyro.sample("z", Completion(task.q, task.q.join(y, x), max_tokens=2, temperature=t * scale))

    optimizer = adam(task.q.trainable_parameters())
    with pytest.raises(ValueError, match=r"does not hold 1 parameter \('heat'\) of the guide.*unconstrained"):
        GFlowNet(task.model, guide, optimizer=optimizer).step(*task.args)
    optimizer.add_param_group({"params": [pyro.param("heat").unconstrained()]})
    with pytest.raises(ValueError, match=r"does not hold 1 parameter \(a tensor of shape \(\)\)"):
        GFlowNet(task.model, guide, optimizer=optimizer).step(*task.args)
    scale.requires_grad_(False)  # what is not to train
    GFlowNet(task.model, guide, optimizer=optimizer).step(*task.args)
    scale.requires_grad_(True)
    optimizer.add_param_group({"params": [scale]})
    GFlowNet(task.model, guide, optimizer=optimizer).step(*task.args)


def test_a_parameter_of_pyros_that_comes_later_is_looked_for():
    task, late = Task(), {"on": False}

    def guide(x, y):
        t = pyro.param("heat", torch.ones((), dtype=torch.float64)) if late["on"] else 1.0
        with pyro.plate("stories", len(x)):
            pyro.sample("z", Completion(task.q, task.q.join(y, x), max_tokens=2, temperature=t))

    trainer = GFlowNet(task.model, guide, optimizer=adam(task.q.trainable_parameters()))
    trainer.step(*task.args)
    late["on"] = True
    with torch.no_grad():
        guide(*task.args)
    with pytest.raises(ValueError, match="'heat'"):
        trainer.step(*task.args)


def test_what_is_right_is_not_refused():
    """Learned log Z, another adapter of the base, a module of both programs, a partial, frozen parameters."""
    task = Task()
    GFlowNet(task.model, task.guide, TrajectoryBalance(), optimizer=adam(task.q.trainable_parameters())).step(
        *task.args
    )

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.prior = task.q, torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
            self.mean = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

        def model(self, x, y):
            with pyro.plate("stories", len(x)):
                pyro.sample("k", dist.Categorical(logits=self.prior))
                pyro.sample("z", Completion(task.lm, x, max_tokens=2))

        def guide(self, x, y, least=0.0):
            with pyro.plate("stories", len(x)):
                pyro.sample("k", dist.Categorical(logits=self.mean * torch.arange(3.0, dtype=torch.float64)))
                pyro.sample("z", Completion(self.q, x, max_tokens=2))

    both = Both()
    trained = [*task.q.trainable_parameters(), both.mean]
    GFlowNet(both.model, functools.partial(both.guide, least=1.0), optimizer=adam(trained)).step(*task.args)
    with pytest.raises(ValueError, match="does not hold 1 parameter .'mean'"):
        GFlowNet(both.model, both.guide, optimizer=adam(trained[:-1])).step(*task.args)
    frozen = task.q.trainable_parameters()[0].requires_grad_(False)
    frozen.grad = None
    GFlowNet(task.model, task.guide, optimizer=adam(task.q.trainable_parameters())).step(*task.args)
    assert frozen.grad is None and all(p.grad is not None for p in task.q.trainable_parameters())


def test_em_refuses_optimizers_of_others_and_takes_the_model_s_for_the_m_step():
    task = EMTask()
    other = task.lm.with_adapter(task.p._adapter.config)
    exact, e_step = Enumeration(task.model), task.gflownet()
    foreign = GFlowNet(task.model, task.guide, optimizer=adam(other.trainable_parameters()))
    refused = {
        "m_optimizer: it holds .* none of the model's own": (exact, other.trainable_parameters()),
        "m_optimizer: it does not hold 1 parameter .*lora": (e_step, task.theta[1:]),
        "m_optimizer: it holds parameters of the guide": (e_step, [*task.theta, *task.phi]),
        "e_step: its optimizer: it holds .* none of the guide's own": (foreign, task.theta),
    }
    for said, (step, parameters) in refused.items():
        guide = getattr(step, "guide", None)
        with pytest.raises(ValueError, match=said):
            VariationalEM(task.model, guide, step, adam(parameters)).step(*task.args)
    for step in (exact, e_step):
        VariationalEM(task.model, getattr(step, "guide", None), step, adam(task.theta)).step(*task.args)


def test_a_module_s_own_parameters_are_the_view_s():
    """``pyro.module("q", q)`` shows `pyro.infer.SVI` the adapter, and leaves the target alone."""
    task = Task()

    def guide(x, y):
        pyro.module("q", task.q)
        task.guide(x, y)

    own, base = task.q.trainable_parameters(), task.lm.network.base_parameters
    assert {id(p) for p in task.q.parameters()} == {id(p) for p in own}
    before = [p.detach().clone() for p in [*own, *base]]
    SVI(task.model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO()).step(*task.args)
    moved = [not torch.equal(a, b) for a, b in zip(before, [*own, *base], strict=True)]
    assert any(moved[: len(own)]) and not any(moved[len(own) :])
    assert all(name.startswith("q$$$") and "lora" in name for name in pyro.get_param_store())


@pytest.mark.parametrize("kind", KINDS)
def test_layers_computed_again_train_the_same(kind):
    """transformers' checkpointing lets embeddings be leaves that ask for a gradient, which are nobody's parameters."""
    trained = []
    for again in (False, True):
        task = Task()
        if again:
            task.lm.model.activation_checkpointing_enable()
        own = task.q.trainable_parameters()
        torch.manual_seed(0)
        kind(task.model, task.guide, optimizer=adam(own)).fit([batch_of(kind, task)], 2, seed=0, **QUIET)
        trained.append([x.detach().clone() for x in own])
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
