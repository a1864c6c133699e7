"""A checkpoint is taken up by the run that it is of and by no other; its log is then that of an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from tasks import Task

from lmppl.inference import GFlowNet, ReweightedWakeSleep, StopTraining, SubTB, TrajectoryBalance, VarGrad
from lmppl.inference.training.loop.identity import digest
from lmppl.locks import LockedError


def fit(task, where, steps=1, trainer=None, batches=None, **kwargs):
    trainer = trainer or task.gflownet()
    return trainer.fit(batches or [task.args], steps, **{"checkpoint": where, "progress": False, "seed": 5} | kwargs)


def sgd(task):
    return GFlowNet(task.model, task.guide, optimizer=torch.optim.SGD(task.q.trainable_parameters(), lr=1e-2))


def another_model(task):
    def reverse(x, y):
        task.model(x, y)

    return GFlowNet(reverse, task.guide, optimizer=torch.optim.AdamW(task.q.trainable_parameters(), lr=1e-2))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda d: fit(Task(), d, seed=6), "seed is 6 here and 5 there"),
        (lambda d: fit(Task(y=("cab", "dd")), d), "data differs"),
        (lambda d: fit(Task(), d, batches=lambda step: Task(y=("c", "d")).args), "data differs"),
        (lambda d: fit(Task(seed=4), d), "language model differs"),
        (lambda d: fit(Task(dtype=torch.float32), d), "language model differs"),
        (
            lambda d: fit(t := Task(), d, trainer=t.gflownet(num_particles=5)),
            "objective.num_particles is 5 here and 16",
        ),
        (lambda d: fit(t := Task(), d, trainer=t.gflownet(objective=SubTB())), "objective is 'SubTB' here"),
        (
            lambda d: fit(t := Task(), d, trainer=t.gflownet(objective=VarGrad(floor=9.0))),
            "floor is 9.0 here",
        ),
        (lambda d: fit(t := Task(), d, trainer=t.gflownet(clip=2.0)), "clip is 2.0 here and 1.0 there"),
        (
            lambda d: fit(t := Task(), d, trainer=t.trainer(ReweightedWakeSleep)),
            "trainer is 'Reweighted",
        ),
        (lambda d: fit(t := Task(), d, trainer=another_model(t)), "program 0 is 'another_model"),
        (lambda d: fit(t := Task(), d, trainer=sgd(t)), "the optimizer is SGD here and AdamW there"),
        (lambda d: fit(Task(), d, identity={"setting": "paper"}), "setting is 'paper' here and None there"),
    ],
)
def test_another_run_is_refused_and_nothing_of_either_is_changed(tmp_path, other, says):
    fit(Task(), tmp_path / "c")
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    with pytest.raises(ValueError, match=says):
        other(tmp_path / "c")
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before


def test_a_refused_run_keeps_its_parameters(tmp_path):
    fit(Task(), tmp_path / "c", 2)
    task = Task()
    before = [p.clone() for p in task.q.trainable_parameters()]
    with pytest.raises(ValueError, match="seed"):
        fit(task, tmp_path / "c", 2, seed=1)
    assert all(map(torch.equal, before, task.q.trainable_parameters()))


def test_a_longer_run_of_the_same_identity_goes_on(tmp_path):
    """Also with data from a function, on which nothing but the first batch is known."""
    data = {"batches": lambda step: Task().args, "identity": {"setting": "posterior"}}
    assert len(fit(Task(), tmp_path / "c", 1, **data)) == 1
    assert len(fit(Task(), tmp_path / "c", 3, **data)) == 2
    assert json.loads((tmp_path / "c" / "training.json").read_text())["step"] == 3


def test_what_is_not_a_checkpoint_is_refused_before_training(tmp_path):
    def untouched(step, metrics):
        raise AssertionError("it trained")

    for name, content in {"training.json": "{}", "training.safetensors": "years of work"}.items():
        there = tmp_path / name.replace(".", "-")
        there.mkdir()
        (there / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} was not written by lmppl"):
            fit(Task(), there, callback=untouched)
        assert [(path.name, path.read_text()) for path in there.iterdir()] == [(name, content)]
    (tmp_path / "notes.txt").write_text("years\nof work")
    for text in ("years\nof work", "years of work", '{"a": 1}\n', '{"step": 0}\nyears\n'):
        (tmp_path / "notes.txt").write_text(text)
        with pytest.raises(ValueError, match="notes.txt"):
            fit(Task(), tmp_path / "new", log=tmp_path / "notes.txt", callback=untouched)
        assert (tmp_path / "notes.txt").read_text() == text


def test_a_users_files_and_log_in_the_directory_stay(tmp_path):
    where = tmp_path / "c"
    where.mkdir()
    (where / "thesis.txt").write_text("years of work")
    for steps in (2, 3):
        fit(Task(), where, steps, log=where / "log.jsonl", checkpoint_every=1)
    names = ["lmppl.json", "log.jsonl", "thesis.txt", "training.json", "training.safetensors"]
    assert sorted(path.name for path in where.iterdir()) == names
    assert (where / "thesis.txt").read_text() == "years of work"
    assert [json.loads(line)["step"] for line in (where / "log.jsonl").read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize(
    "end", ["", '{"st', '{"step": 3, "loss', '{"step": 3, "loss": 1.0}', '{"step": 3}\n{"step": 4}\n']
)
def test_the_log_of_a_resumed_run_is_that_of_an_uninterrupted_one(tmp_path, end):
    """Lines of an earlier run before it stay; what a killed run wrote after its last checkpoint goes."""
    earlier = '{"step": 0, "loss": 9.0}\n{"step": 1, "loss": 8.0}\n'
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.jsonl").write_text(earlier)
    fit(Task(), tmp_path / "whole", 4, log=tmp_path / "whole" / "run.jsonl")

    def stop(step, metrics):
        if step == 3:
            raise KeyboardInterrupt

    log = tmp_path / "resumed" / "run.jsonl"
    with pytest.raises(KeyboardInterrupt):
        fit(Task(), tmp_path / "resumed", 4, log=log, checkpoint_every=2, callback=stop)
    with log.open("a") as file:
        file.write(end)
    fit(Task(), tmp_path / "resumed", 4, log=log)
    assert log.read_text() == (tmp_path / "whole" / "run.jsonl").read_text()
    assert log.read_text().startswith(earlier) and len(log.read_text().splitlines()) == 6


def test_a_second_run_in_the_same_place_is_refused(tmp_path):
    def inside(step, metrics):
        with pytest.raises(LockedError, match="c is in use by process"):
            fit(Task(), tmp_path / "c")
        with pytest.raises(LockedError, match="run.jsonl is in use by process"):
            fit(Task(), tmp_path / "d", log=tmp_path / "run.jsonl")

    fit(Task(), tmp_path / "c", log=tmp_path / "run.jsonl", callback=inside)
    assert sorted(path.name for path in tmp_path.rglob(".*")) == []


def test_parameters_that_are_not_finite_do_not_replace_a_good_checkpoint(tmp_path):
    task = Task()

    def spoil(step, metrics):
        if step == 1:
            with torch.no_grad():
                task.q.trainable_parameters()[0].fill_(torch.nan)

    with pytest.raises(FloatingPointError, match="not finite"):
        fit(task, tmp_path / "c", 3, checkpoint_every=1, callback=spoil)
    assert json.loads((tmp_path / "c" / "training.json").read_text())["step"] == 1
    assert len(fit(Task(), tmp_path / "c", 3)) == 2


def test_data_are_told_apart_by_all_that_is_in_them():
    found = [
        digest(data)
        for data in (
            [torch.zeros(2)], [torch.zeros(2, 1)], [torch.zeros(2, dtype=torch.long)], ["a", "b"], ["ab"], [["a"], "b"],
            {"a": 1}, {"a": 2}, (1, 2.0), None, torch.zeros(2).numpy(), [torch.ones(2, dtype=torch.bfloat16)],
        )
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert digest([torch.zeros(2)]) == digest((torch.zeros(2),))


def test_a_log_without_a_checkpoint_is_appended_to(tmp_path):
    for _ in range(2):
        fit(Task(), None, 2, log=tmp_path / "run.jsonl")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 0, 1] and [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]


KINDS = {
    "AdamW": {"lr": 1e-2, "amsgrad": True},
    "SGD": {"lr": 1e-2, "momentum": 0.9, "nesterov": True},
    "Adagrad": {"lr": 1e-2},
    "Rprop": {"lr": 1e-3},
    "Muon": {"lr": 1e-3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_optimizers_of_any_kind_and_several_groups_go_on_as_if_nothing_had_been(tmp_path, kind):
    """The parameters of 2 + 2 steps are those of 4, bit for bit, and so are the groups' options."""

    def run(stop, where):
        task = Task()
        own = task.q.trainable_parameters()
        groups = [{"params": own[:3], "lr": 1e-4}, {"params": own[3:], "weight_decay": 0.01}]
        optimizer = getattr(torch.optim, kind)(groups, **KINDS[kind])

        def callback(step, metrics):
            if step == stop:
                raise KeyboardInterrupt

        trainer = GFlowNet(task.model, task.guide, optimizer=optimizer, num_particles=4)
        try:
            fit(task, where, 4, trainer=trainer, callback=callback, checkpoint_every=2, warmup=1)
        except KeyboardInterrupt:
            assert stop is not None
        return own, [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    whole, options = run(None, None)
    run(3, tmp_path)
    resumed, found = run(None, tmp_path)
    assert all(map(torch.equal, whole, resumed)) and found == options


def test_other_options_of_the_optimizer_are_the_checkpoints_and_a_warning_says_so(tmp_path, caplog):
    fit(Task(), tmp_path, 1)
    fit(Task(), tmp_path, 2)
    assert "goes on" not in caplog.text
    trainer = (task := Task()).gflownet(lr=0.5)
    fit(task, tmp_path, 3, trainer=trainer)
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-2
    assert "with lr 0.01, and not with lr 0.5" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_last_save_is_not_lost(tmp_path, number):
    class Late(GFlowNet):
        def state(self):
            if self.history:
                os.kill(os.getpid(), number)
            return super().state()

    task, before = Task(), signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    try:
        with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt):
            fit(task, tmp_path, 1, trainer=task.trainer(Late))
    finally:
        signal.signal(signal.SIGINT, before)
    assert json.loads((tmp_path / "training.json").read_text())["step"] == 1


def test_a_learned_log_z_is_saved_from_the_start_and_goes_on_as_if_nothing_had_been(tmp_path):
    whole, parts = ([Task(), tmp_path / name] for name in ("whole", "parts"))
    trainers = [task.gflownet(objective=TrajectoryBalance()) for task, _ in (whole, parts)]
    history = fit(*whole, 4, trainer=trainers[0])

    def stop(step, metrics):
        if step == 1:
            raise StopTraining

    assert fit(*parts, 4, trainer=trainers[1], callback=stop) == history[:2]
    again = Task()
    trainer = again.gflownet(objective=TrajectoryBalance())
    assert fit(again, parts[1], 4, trainer=trainer) == history[2:]
    for p, q in zip(trainers[0].objective.parameters(), trainer.objective.parameters(), strict=True):
        assert torch.equal(p, q) and bool(p.count_nonzero())


def test_a_metric_called_step_is_not_the_logs(tmp_path):
    log = tmp_path / "log.jsonl"
    for steps in (1, 2):
        task = Task()
        fit(task, tmp_path / "c", steps, log=log, callback=lambda step, metrics: metrics.update(step=7.5))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1]
