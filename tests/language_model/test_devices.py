"""Tensors are made where the model's are; on a GPU the figures are those of the CPU."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_script import FIT, Task
from torch.overrides import TorchFunctionMode

import lmppl
from lmppl.inference import (
    SMC,
    DetailedBalance,
    DirectPreferenceOptimization,
    Enumeration,
    Importance,
    MetropolisHastings,
    PolicyGradient,
    PooledVarGrad,
    Replay,
    ReweightedWakeSleep,
    SubTB,
    SupervisedFineTuning,
    TrajectoryBalance,
    VarGrad,
    VariationalEM,
)
from lmppl.language_model import View
from lmppl.models import EXPERIMENTS

PACKAGE = str(Path(lmppl.__file__).parent)
FACTORIES = {
    torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.arange, torch.linspace, torch.rand, torch.randn,
    torch.randint, torch.tensor,
}  # fmt: skip
# What is on the CPU on purpose, or sent on at once; by file and function.
ELSEWHERE = {
    "recomputing.py:_agrees",
    "prompts.py:_trial",
    "decoding.py:_shared",
    "reading.py:_tree_agrees",  # these three are drawn on the CPU and sent to the network's device in the same line
    "rows.py:covering",  # likewise
    "rows.py:first_equal",  # sent to the rows' device in the next line
    "verdict.py:judge",  # k-hats: numbers for Python
    "exploration.py:draw",  # the text's distribution takes it to its own device
    "observations.py:_there",  # compared on the CPU
    "replay.py:_choose",  # the buffer is on the CPU
    "trajectory_balance.py:__init__",
    "trajectory_balance.py:_features",  # log Z: taken to the device where it is used
    "weights.py:_total",  # of no site at all: SMC and Metropolis send it on
    "metropolis.py:step",  # which move and which site: numbers for Python
}


class Watch(TorchFunctionMode):
    """Notes where the package makes a tensor, other than a single number, without saying on which device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in FACTORIES and (kwargs or {}).get("device") is None and out.dim():
            frame = sys._getframe(1).f_code
            if frame.co_filename.startswith(PACKAGE):
                self.found.add(f"{Path(frame.co_filename).name}:{frame.co_name}")
        return out


def fit(trainer: Any, *args: Any) -> None:
    trainer.fit([args], 2, held_out=args[:2], **FIT)


OBJECTIVES = (SubTB(prefixes=3), VarGrad(), PooledVarGrad(), TrajectoryBalance(), DetailedBalance())
LOOPS: dict[str, Callable[[Task], Any]] = {
    **{type(o).__name__: lambda t, o=o: fit(t.gflownet(o, replay=Replay(fraction=0.5)), *t.args) for o in OBJECTIVES},
    "SFT": lambda t: fit(SupervisedFineTuning(t.model, t.guide, optimizer=t.optimizer), *t.args, {"z": t.z}),
    "DPO": lambda t: fit(
        DirectPreferenceOptimization(t.model, t.guide, optimizer=t.optimizer), *t.args, {"z": t.z}, {"z": t.z.flip(0)}
    ),
    "PPO": lambda t: fit(PolicyGradient(t.model, t.guide, optimizer=t.optimizer, algorithm="ppo"), *t.args),
    "wake-sleep": lambda t: fit(ReweightedWakeSleep(t.model, t.guide, optimizer=t.optimizer), *t.args),
    "EM": lambda t: fit(
        VariationalEM(t.model, None, Enumeration(t.model), torch.optim.SGD(t.p.trainable_parameters(), lr=0.1)), *t.args
    ),
    "SMC": lambda t: SMC(t.model, num_particles=20, ess_threshold=0.9).run(*t.args).resample(),
    "twisted SMC": lambda t: SMC(t.model, t.guide, num_particles=20, twist="flow").run(*t.args).khat,
    "Metropolis": lambda t: MetropolisHastings(t.model, num_chains=4, num_samples=3, warmup=2).run(*t.args),
    "importance": lambda t: Importance(t.model, t.guide, num_particles=60).run(*t.args).table("z", 0),
}


@pytest.mark.parametrize("name", LOOPS)
def test_no_loop_makes_a_tensor_without_saying_where(name):
    with Watch() as watch:
        LOOPS[name](Task())
    assert watch.found <= ELSEWHERE


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_where_its_language_model_is(name, monkeypatch):
    embedded, asked = View.embedded.__func__, []

    def load(cls, which, *, device=None):
        asked.append(str(device))
        return embedded(cls, which, device=device)

    monkeypatch.setattr(View, "embedded", classmethod(load))
    with Watch() as watch:
        experiment = EXPERIMENTS[name](device="cpu", **({"warm_start": 0} if name == "arithmetic" else {}))
        tasks = experiment.batches if isinstance(experiment.batches, list) else [(None, None, experiment.batches)]
        for *_, batches in tasks:
            batches(0)
    assert set(asked) == {"cpu"} and watch.found <= ELSEWHERE


def test_the_watch_sees_what_it_should(monkeypatch):
    watch = Watch()
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", str(Path(__file__).parent))
    with watch:
        torch.zeros(2), torch.zeros(()), torch.ones(2, device="cpu")
    assert watch.found == {"test_devices.py:test_the_watch_sees_what_it_should"}


# -- where there is a GPU ----------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def on_gpu() -> Task:
    task = Task()
    task.lm.model.to("cuda")  # the network of all views
    task.args, task.z = tuple(a.cuda() for a in task.args), task.z.cuda()
    return task


@gpu
@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_runs_on_a_gpu(name):
    LOOPS[name](on_gpu())


@gpu
def test_on_a_gpu_the_figures_are_those_of_the_cpu():
    host, device = Task(), on_gpu()
    exact = [Enumeration(t.model).run(*t.args) for t in (host, device)]
    assert exact[1].log_weights.is_cuda
    assert torch.allclose(exact[0].log_weights, exact[1].log_weights.cpu(), atol=1e-8)
    histories = [
        SupervisedFineTuning(t.model, t.guide, optimizer=t.optimizer).fit([(*t.args, {"z": t.z})], 3, **FIT)
        for t in (host, device)
    ]
    for a, b in zip(*histories, strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    objective = SubTB(num_particles=4)
    values = objective.draw(host.model, host.guide, host.args, {})
    losses = []
    for t in (host, device):
        held = {name: v.to(t.lm.device) for name, v in copy.copy(values).items()}
        losses.append(objective.loss_at(t.model, t.guide, t.args, {}, held)[0].item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@gpu
def test_on_a_gpu_an_experiment_has_the_exact_posterior_of_the_cpu():
    found = {}
    for device in ("cpu", "cuda"):
        experiment = EXPERIMENTS["random_number"](device=device)
        assert {t.device.type for t in (*experiment.test, *experiment.held_out, *experiment.batches(0))} == {device}
        found[device] = experiment.exact.run(*experiment.test).log_evidence.cpu()
    assert torch.allclose(found["cpu"], found["cuda"], atol=1e-4)
