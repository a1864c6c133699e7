"""What all training shares: the schedule, batches, steps that fail, how it ends."""

from __future__ import annotations

import functools
import json
import math

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from tasks import Task
from torch.utils.data import DataLoader, TensorDataset

from lmppl.distributions import Completion
from lmppl.inference import (
    DirectPreferenceOptimization,
    Enumeration,
    GFlowNet,
    PolicyGradient,
    ReweightedWakeSleep,
    StopTraining,
    SupervisedFineTuning,
    VarGrad,
)
from lmppl.inference.core.query import Query
from lmppl.inference.judging.quality import density_quality
from lmppl.inference.training.loop.batches import readable
from lmppl.inference.training.loop.schedules import warmed
from lmppl.inference.training.loop.verdict import judge, missed
from lmppl.inference.training.trainer import MOST_SKIPPED

QUIET = {"progress": False}
KINDS = (GFlowNet, PolicyGradient, ReweightedWakeSleep, SupervisedFineTuning, DirectPreferenceOptimization)


def adam(parameters, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr)


def batch_of(kind, task: Task) -> tuple:
    told = {SupervisedFineTuning: ("ab",), DirectPreferenceOptimization: ("ab", "cd")}.get(kind, ())
    return *task.args, *({"z": task.lm.encode([*texts], stop="eos")} for texts in told)


# -- the learning rate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 1, 20, 1000])
@pytest.mark.parametrize("steps", [1, 2, 5, 30, 100])
def test_the_learning_rate_rises_to_what_was_set_and_falls(steps, warmup):
    rates = [warmed(t, steps, warmup) for t in range(steps)]
    top = max(1, min(warmup, (steps + 1) // 2)) - 1
    assert max(rates) == rates[top] == 1.0 and min(rates) > 0
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(1 / (steps - top)), "a line that would be at zero after one step more"


def test_fit_sets_the_rate_and_puts_it_back_also_after_an_error():
    task, rates = Task(), []
    trainer = task.gflownet(lr=1e-3)

    def watch(step, metrics):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        if step == 1:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trainer.fit([task.args], 5, callback=watch, **QUIET)
    assert rates == [1e-3 * warmed(t, 5, 20) for t in range(2)]
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3
    assert len(trainer.history) == 2 and all("loss" in metrics for metrics in trainer.history)


# -- how it ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", [StopTraining, StopIteration])
def test_a_callback_ends_training(signal, tmp_path):
    task, whole = Task(), Task()
    expected = whole.gflownet().fit([whole.args], 6, **QUIET)

    def stop(step, metrics):
        metrics["mine"] = float(step)
        if step == 2:
            raise signal

    files = {"log": tmp_path / "log.jsonl", "checkpoint": tmp_path / "c"}
    trainer = task.gflownet()
    history = trainer.fit([task.args], 6, callback=stop, **files, **QUIET)
    assert [m["loss"] for m in history] == [m["loss"] for m in expected[:3]] and trainer.history is history
    lines = [json.loads(line) for line in files["log"].read_text().splitlines()]
    assert [line["mine"] for line in lines] == [0.0, 1.0, 2.0]
    rest = task.gflownet().fit([task.args], 6, **files, **QUIET)  # goes on after the step that it ended with
    assert [m["loss"] for m in rest] == [m["loss"] for m in expected[3:]]


def test_an_exception_in_a_callback_loses_no_line(tmp_path):
    task = Task()

    def fail(step, metrics):
        if step == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        task.gflownet().fit([task.args], 4, callback=fail, log=tmp_path / "log.jsonl", **QUIET)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [0, 1]


# -- steps that fail -----------------------------------------------------------------------------------------------


class Sick:
    """A guide whose gradient is NaN (a root at zero, times zero) at chosen steps; its loss is finite."""

    def __init__(self, kind=GFlowNet):
        self.task, self.bad = Task(), False
        self.extra = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.parameters = [*self.task.q.trainable_parameters(), self.extra]
        self.trainer = kind(self.task.model, self.guide, optimizer=adam(self.parameters))

    def guide(self, x, y):
        temperature = 1 + (torch.sqrt(self.extra * 0) if self.bad else self.extra * 0)
        with pyro.plate("stories", len(x)):
            prompt = self.task.q.join(y, x)
            pyro.sample("z", Completion(self.task.q, prompt, max_tokens=2, temperature=temperature))

    def state(self) -> list[torch.Tensor]:
        held = [p.detach().clone() for p in self.parameters]
        kept = self.trainer.optimizer.state
        return held + [v.clone() for p in self.parameters for v in kept[p].values() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_nan_updates_nothing(kind):
    sick = Sick(kind)
    batch = batch_of(kind, sick.task)
    sick.trainer.step(*batch)
    before, sick.bad = sick.state(), True
    with pytest.raises(FloatingPointError, match="norm nan; nothing was updated"):
        sick.trainer.step(*batch)
    assert all(torch.equal(a, b) for a, b in zip(before, sick.state(), strict=True))
    sick.bad = False
    assert math.isfinite(sick.trainer.step(*batch)["loss"])


def test_fit_skips_such_steps_and_says_so(tmp_path, caplog):
    sick = Sick()

    def at(step, metrics):
        sick.bad = step in (1, 2)  # steps 2 and 3

    history = sick.trainer.fit([sick.task.args], 5, callback=at, log=tmp_path / "log.jsonl", **QUIET)
    assert ["skipped" in metrics for metrics in history] == [False, False, True, True, False]
    assert all(p.isfinite().all() for p in sick.parameters)
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[2])
    assert line == {"step": 2, "loss": None, "skipped": 1.0}
    assert [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()][0].startswith("step 2 is skipped")


def test_many_in_a_row_end_the_training_and_leave_a_whole_checkpoint(tmp_path):
    sick = Sick()
    sick.bad = True
    before = [p.detach().clone() for p in sick.parameters]
    with pytest.raises(FloatingPointError, match=f"{MOST_SKIPPED} steps in a row"):
        sick.trainer.fit([sick.task.args], 30, checkpoint=tmp_path / "c", checkpoint_every=1, **QUIET)
    assert len(sick.trainer.history) == MOST_SKIPPED - 1
    assert all(torch.equal(a, b) for a, b in zip(before, sick.parameters, strict=True))


# -- batches -------------------------------------------------------------------------------------------------------


def rows(batches, steps: int) -> list[list[int]]:
    found = readable(batches, seed=3)
    given = [found(t) if callable(found) else found[t % len(found)] for t in range(steps)]
    return [[int(v) for v in batch[0]] for batch in given]


def test_loaders_are_read_again_and_shuffle_by_the_seed():
    data = TensorDataset(torch.arange(6))
    assert rows(DataLoader(data, batch_size=4), 5) == [[0, 1, 2, 3], [4, 5], [0, 1, 2, 3], [4, 5], [0, 1, 2, 3]]
    shuffled = functools.partial(DataLoader, data, batch_size=2, shuffle=True)
    first = rows(shuffled(), 9)
    assert all(sorted(sum(first[i : i + 3], [])) == list(range(6)) for i in (0, 3, 6)) and first[:3] != first[3:6]
    late = readable(shuffled(), seed=3)
    assert [int(v) for v in late(7)[0]] == first[7] and [int(v) for v in late(0)[0]] == first[0]


def test_iterators_go_on_and_end_in_one_line():
    steps = (torch.tensor([i]) for i in range(3))
    found = readable(steps)
    assert [int(found(t)[0]) for t in (0, 0, 1, 2, 2)] == [0, 0, 1, 2, 2]
    with pytest.raises(ValueError, match="batches: it ended after 3 batches"):
        found(3)
    with pytest.raises(ValueError, match="batches: there is no batch in it"):
        readable(iter(()))(0)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (TensorDataset(torch.arange(0)), "nothing in a TensorDataset"),
        (torch.arange(3), "a Tensor"),
        ((torch.arange(3), torch.arange(3)), r"write a list of them, \[\(x, y\)\]"),
        ([torch.arange(3)], "a Tensor"),
        ([{"x": 1}], "a dict"),
        ({"x": 1}, "a dict"),
        ("text", "a str"),
        (None, "NoneType"),
        (7, "got 7"),
        (DataLoader, "the class DataLoader"),
        (lambda: 1, "the step alone"),
        ([], "no batch"),
    ],
)
def test_other_kinds_are_refused_in_one_line(batches, said):
    with pytest.raises(ValueError, match=f"batches: .*{said}") as error:
        Task().gflownet().fit(batches, 2, **QUIET)
    assert "\n" not in str(error.value)


def test_training_on_a_loader_resumes_as_if_uninterrupted(tmp_path):
    def run(task, steps=5, **kwargs):
        loader = DataLoader(TensorDataset(*task.args), batch_size=1, shuffle=True)
        return [m["loss"] for m in task.gflownet().fit(loader, steps, **kwargs, **QUIET)]

    def stop(step, metrics):
        if step == 2:
            raise StopTraining

    expected, task = run(Task()), Task()
    assert run(task, checkpoint=tmp_path / "c", callback=stop) == expected[:3]
    assert run(task, checkpoint=tmp_path / "c") == expected[3:]


# -- hard conditions -----------------------------------------------------------------------------------------------


class Hard(Task):
    """z of at most three tokens begins with "ab" or with "ba": a condition that few texts satisfy."""

    def __init__(self, texts=((2, 3), (3, 2))):
        super().__init__(seed=3, vocab=8)
        self.texts = torch.tensor(texts)

    def model(self, x, y):
        with pyro.plate("stories", len(x)):
            z = pyro.sample("z", Completion(self.lm, x, max_tokens=3))
            holds = (z[..., None, :2] == self.texts).all(-1).any(-1)
            pyro.factor("holds", torch.zeros(holds.shape, dtype=torch.float64).masked_fill(~holds, -math.inf))

    def guide(self, x, y):
        with pyro.plate("stories", len(x)):
            pyro.sample("z", Completion(self.q, x, max_tokens=3))


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_the_default_finds_the_posterior_under_a_hard_condition(seed):
    task = Hard()
    exact = Enumeration(task.model).run(*task.args)
    trainer = task.gflownet(lr=1e-2)
    trainer.fit([task.args], 80, seed=seed, **QUIET)
    assert float(density_quality(exact, task.guide, task.args, {}).total_variation.max()) < 0.2
    assert float(exact.log_evidence.max()) < math.log(0.1)


def test_where_no_draw_is_possible_nothing_is_learned_and_fit_says_what_to_do(caplog):
    task = Hard(texts=((-1, -1),))
    before = [p.detach().clone() for p in task.q.trainable_parameters()]
    for objective in (None, VarGrad()):
        optimizer = torch.optim.SGD(task.q.trainable_parameters(), lr=1.0)
        trainer = GFlowNet(task.model, task.guide, objective, optimizer=optimizer)
        history = trainer.fit([task.args], 2, held_out=task.args, **QUIET)
        assert history[-1]["impossible"] == history[-1]["held_out_impossible"] == 1.0
        assert all(m["loss"] == 0 and m["grad_norm"] == 0 for m in history)
    assert all(torch.equal(a, b) for a, b in zip(before, task.q.trainable_parameters(), strict=True))
    said = caplog.records[-1].getMessage()
    assert "100% of the guide's draws are impossible" in said and "Proposal(masked)" in said and "demonstrate" in said


def test_what_a_guide_misses_is_estimated_from_the_evidence_of_other_draws():
    """Of Z = 1 the guide finds 1/4, in weights without spread; the model's own draws find a 1 in every tenth."""
    u, v = torch.full((100, 3), math.log(0.25)), torch.full((100, 3), -math.inf)
    v[::10] = math.log(10)
    assert missed(u, v) == pytest.approx(0.75)
    assert missed(torch.zeros(100, 3), v) == 0.0  # nothing is missed
    assert math.isnan(missed(u, v.masked_fill(torch.arange(100)[:, None] > 0, -math.inf)))  # too few to say
    assert math.isnan(missed(torch.full((100, 3), -math.inf), v))


@pytest.mark.parametrize(
    ("q", "lost"),
    [((2 / 3, 1 / 3, 0, 0), 0.0), ((0.9, 0.1, 0, 0), 0.9 - 2 / 3), ((1.0, 0, 0, 0), 1 / 3), ((0, 0, 1.0, 0), 1.0)],
)
def test_what_a_guide_lacks_is_its_total_variation_seen_from_the_posterior(q, lost):
    """Posterior (2/3, 1/3, 0, 0) in each of 20 observations; a standard error is taken off."""

    def model():
        with pyro.plate("data", 20):
            k = pyro.sample("k", dist.Categorical(torch.full((4,), 0.25)))
            pyro.factor("hard", torch.tensor([1.0, 0.5, 0.0, 0.0]).log()[k])

    def guide():
        with pyro.plate("data", 20):
            pyro.sample("k", dist.Categorical(torch.tensor(q)))

    pyro.set_rng_seed(0)
    assert judge(Query(model, guide))["held_out_lacking"] == pytest.approx(lost, abs=0.05)


def test_an_optimizer_that_computes_the_loss_again_is_refused():
    task = Task()
    lbfgs = torch.optim.LBFGS(task.q.trainable_parameters())
    with pytest.raises(ValueError, match="optimizer: LBFGS computes the loss again"):
        GFlowNet(task.model, task.guide, optimizer=lbfgs)


def test_what_a_callback_adds_is_logged_whatever_it_is(tmp_path):
    def fit(task, **kwargs):
        return task.gflownet().fit([task.args], 1, **kwargs)

    added = {"number": 2, "tensor": torch.tensor(0.5), "nothing": None, "words": "a b", "list": [1, 2]}
    history = fit(Task(), log=tmp_path / "log", callback=lambda step, metrics: metrics.update(added))
    (line,) = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert {name: line[name] for name in added} == added | {"tensor": 0.5} and line["loss"] == history[0]["loss"]
    with pytest.raises(ValueError, match="callback: the metric 'it' is a object, which the log cannot hold"):
        fit(Task(), log=tmp_path / "log", callback=lambda step, metrics: metrics.update(it=object()), **QUIET)
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["loss"] == history[0]["loss"]
    for wrong in ({"callback": 5}, {"identity": {"a": object()}}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            fit(Task(), checkpoint=tmp_path / "c", **wrong)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_training_where_gradients_are_off_says_so(kind, off):
    task = Task()
    trainer = kind(task.model, task.guide, optimizer=adam(task.q.trainable_parameters()))
    with off(), pytest.raises(RuntimeError, match="torch.no_grad"):
        trainer.step(*batch_of(kind, task))
