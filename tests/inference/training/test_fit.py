"""What `fit` can be told: data sets, schedulers, accumulation."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import transformers
from tasks import Task
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lmppl.inference import (
    DirectPreferenceOptimization,
    Enumeration,
    GFlowNet,
    PolicyGradient,
    Replay,
    ReweightedWakeSleep,
    StopTraining,
    SupervisedFineTuning,
    VariationalEM,
    dreams,
)
from lmppl.inference.training.loop.batches import readable
from lmppl.inference.training.loop.schedules import warmed

QUIET = {"progress": False}
KINDS = {
    "gflownet": GFlowNet,
    "policy gradient": PolicyGradient,
    "wake": ReweightedWakeSleep,
    "supervised": SupervisedFineTuning,
    "preferences": DirectPreferenceOptimization,
}


def batch_of(kind, task: Task, part: slice = slice(None)) -> tuple:
    args = tuple(x[part] for x in task.args)
    told = {SupervisedFineTuning: ("ab",), DirectPreferenceOptimization: ("ab", "cd")}.get(kind, ())
    return *args, *({"z": task.lm.encode([*texts], stop="eos")[part]} for texts in told)


def sgd(task: Task, kind, lr: float = 1.0, **kwargs):
    optimizer = torch.optim.SGD(task.q.trainable_parameters(), lr=lr)
    return kind(task.model, task.guide, optimizer=optimizer, clip=math.inf, **kwargs)


def moved(task: Task, before: list[torch.Tensor]) -> torch.Tensor:
    pairs = zip(task.q.trainable_parameters(), before, strict=True)
    return torch.cat([(p.detach() - b).flatten() for p, b in pairs])


# -- data --------------------------------------------------------------------------------------------------------------


def rows(batches, steps: int, **kwargs) -> list[list[int]]:
    found = readable(batches, seed=3, **kwargs)
    return [[int(v) for v in found(t)[0]] for t in range(steps)]


class Numbers(IterableDataset):
    def __iter__(self):
        return iter([(i, i) for i in range(5)])


class Ragged(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return (torch.zeros(i + 1),)


def test_a_data_set_is_shuffled_and_put_together_by_torchs_collation():
    data = TensorDataset(torch.arange(6))
    found = rows(data, 9, batch_size=2)
    assert all(sorted(sum(found[i : i + 3], [])) == list(range(6)) for i in (0, 3, 6)) and found[:3] != found[3:6]
    assert [len(batch) for batch in rows(TensorDataset(torch.arange(12)), 3)] == [8, 4, 8]
    assert [int(v) for v in readable(data, seed=3, batch_size=2)(4)[0]] == found[4]  # by the step alone


def test_an_iterable_data_set_is_read_in_its_order_and_again():
    assert rows(Numbers(), 5, batch_size=2) == [[0, 1], [2, 3], [4], [0, 1], [2, 3]]


def test_training_on_a_data_set_is_training_on_its_loader():
    one, two = Task(), Task()
    loader = DataLoader(TensorDataset(*two.args), batch_size=1, shuffle=True)
    found = one.gflownet().fit(TensorDataset(*one.args), 4, batch_size=1, **QUIET)
    assert found == two.gflownet().fit(loader, 4, **QUIET)
    task = Task()
    data = (task.model, task.guide, TensorDataset(*task.args))
    assert len(task.gflownet().fit([data, (task.model, task.guide, [task.args])], 2, batch_size=2, **QUIET)) == 2


def test_data_that_cannot_be_put_together_is_refused_in_one_line():
    for batches, options, said in (
        (Ragged(), {}, r"cannot be put together .* lmppl.text.pad"),
        ([(1,)], {"batch_size": 2}, "batch_size: it is for a Dataset only"),
        (Numbers(), {"batch_size": 0}, "batch_size: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            readable(batches, **options)(0)
        assert "\n" not in str(error.value)


# -- learning rates ----------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "lambda": lambda o: LambdaLR(o, lambda t: 0.5**t),
    "step": lambda o: StepLR(o, 2, gamma=0.1),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=6),
    "one cycle": lambda o: OneCycleLR(o, max_lr=1e-2, total_steps=6),
    "sequential": lambda o: SequentialLR(o, [StepLR(o, 1), CosineAnnealingLR(o, 4)], milestones=[2]),
    "transformers": lambda o: transformers.get_scheduler("cosine", o, num_warmup_steps=2, num_training_steps=6),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_stepped_once_an_update_saved_and_restored(name, tmp_path):
    def run(stop: int | None, where, steps: int = 6):
        task, rates = Task(), []
        optimizer = torch.optim.AdamW(task.q.trainable_parameters(), lr=1e-2)
        scheduler = SCHEDULERS[name](optimizer)
        trainer = GFlowNet(task.model, task.guide, optimizer=optimizer, num_particles=4)

        def watch(step, metrics):
            rates.append(scheduler.get_last_lr()[0])  # it has been stepped
            if step == stop:
                raise KeyboardInterrupt

        try:
            trainer.fit(
                [task.args], steps, scheduler=scheduler, callback=watch, checkpoint=where, checkpoint_every=2, **QUIET
            )
        except KeyboardInterrupt:
            assert stop is not None
        return rates, task.values()

    plain = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    alone = SCHEDULERS[name](plain)
    expected = []
    for _ in range(6):
        plain.step()
        alone.step()
        expected.append(alone.get_last_lr()[0])
    rates, whole = run(None, None)
    assert rates == pytest.approx(expected)
    run(4, tmp_path / "c")
    again, resumed = run(None, tmp_path / "c")
    assert again == pytest.approx(expected[4:]) and all(map(torch.equal, whole, resumed))
    with pytest.raises(ValueError, match="scheduler is None here"):
        Task().gflownet(num_particles=4).fit([Task().args], 6, checkpoint=tmp_path / "c", **QUIET)


def test_without_a_scheduler_the_rates_are_the_built_in_ones():
    task, rates = Task(), []
    trainer = task.gflownet(lr=1e-3)
    trainer.fit([task.args], 5, callback=lambda t, m: rates.append(trainer.optimizer.param_groups[0]["lr"]), **QUIET)
    assert rates == [1e-3 * warmed(t, 5, 20) for t in range(5)]


def test_what_is_no_scheduler_of_the_optimizer_is_refused():
    task = Task()
    trainer = task.gflownet()
    other = torch.optim.SGD(task.q.trainable_parameters(), lr=1.0)
    late = LambdaLR(trainer.optimizer, lambda t: 1.0)
    for wrong, said in (
        (5, "got 5"),
        (LambdaLR, "the class LambdaLR"),
        (LambdaLR(other, lambda t: 1.0), "this LambdaLR is over another optimizer"),
        (ReduceLROnPlateau(trainer.optimizer), "that needs no metric"),
        ([late, late], "several are of one optimizer"),
    ):
        with pytest.raises(ValueError, match=f"scheduler: .*{said}"):
            trainer.fit([task.args], 2, scheduler=wrong, **QUIET)
    trainer.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="it knows 1 of the optimizer's 2 parameter groups; make it after the trainer"):
        trainer.fit([task.args], 2, scheduler=late, **QUIET)


# -- accumulation ------------------------------------------------------------------------------------------------------


def test_k_batches_an_update_are_one_batch_k_times_as_large():
    """Without draws, exactly: maximum likelihood of given texts."""
    found = []
    for batches, k in (([batch_of(SupervisedFineTuning, Task())], 1), (None, 2)):
        task = Task()
        before = task.values()
        halves = [batch_of(SupervisedFineTuning, task, slice(i, i + 1)) for i in (0, 1)]
        trainer = sgd(task, SupervisedFineTuning, lr=0.1)
        rate = LambdaLR(trainer.optimizer, lambda t: 1.0)
        history = trainer.fit(batches or halves, 3, accumulate=k, scheduler=rate, **QUIET)
        found.append((moved(task, before), history))
    (one, whole), (two, parts) = found
    assert float((one - two).abs().max()) < 1e-12 and float(one.abs().max()) > 1e-3
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-12)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-12)


@pytest.mark.parametrize("name", [*KINDS, "sleep"])
def test_the_gradient_is_the_mean_of_the_batches_own(name):
    """Steps of rate 1 from the same parameters, one after the other on the same stream of draws, and their mean."""
    kind, extra = KINDS.get(name, ReweightedWakeSleep), {}
    task = Task()
    if name == "sleep":
        extra = {"wake": 0.5, "sleep": 0.5, "simulate": dreams(task.model)}
    batches = [batch_of(kind, task), batch_of(kind, task, slice(0, 1)), batch_of(kind, task, slice(1, 2))]
    before, deltas, losses = task.values(), [], []
    trainer = sgd(task, kind, **extra)
    torch.manual_seed(7 * 1_000_003)  # of the first step of the seed 7
    for batch in batches:
        losses.append(trainer.step(*batch)["loss"])
        deltas.append(moved(task, before))
        with torch.no_grad():
            for p, value in zip(task.q.trainable_parameters(), before, strict=True):
                p.copy_(value)
    other = Task()
    other_kind = dict(extra, simulate=dreams(other.model)) if name == "sleep" else extra
    trainer = sgd(other, kind, **other_kind)
    start = other.values()
    (metrics,) = trainer.fit(
        batches, 1, seed=7, accumulate=3, scheduler=LambdaLR(trainer.optimizer, lambda t: 1.0), **QUIET
    )
    expected = torch.stack(deltas).mean(0)
    assert float((moved(other, start) - expected).abs().max()) < 1e-12 and float(expected.abs().max()) > 1e-6
    assert metrics["loss"] == pytest.approx(sum(losses) / 3) and metrics["grad_norm"] == pytest.approx(
        float(expected.norm())
    )


def test_batches_and_tasks_take_turns_as_they_do_without():
    def seen(k: int, steps: int) -> list[tuple[int, int]]:
        task, found = Task(), []

        def batches(of: int):
            return lambda number: found.append((of, number)) or task.args

        tasks = [(task.model, task.guide, batches(i)) for i in (0, 1)]
        task.gflownet(num_particles=4).fit(tasks, steps, accumulate=k, **QUIET)
        return found

    assert seen(3, 2) == seen(1, 6) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]


def test_accumulation_resumes_with_its_replay_buffer(tmp_path):
    def run(steps: int, where=None):
        task = Task()
        trainer = task.gflownet(replay=Replay(fraction=0.5), num_particles=4)
        batches = [tuple(x[i : i + 1] for x in task.args) for i in (0, 1)]
        history = trainer.fit(
            batches, 6, accumulate=2, checkpoint=where, callback=partial(end, steps), checkpoint_every=2, **QUIET
        )
        return history, task.values(), len(trainer.replay)

    def end(steps: int, step: int, metrics):
        if step + 1 == steps:
            raise StopTraining

    history, whole, stored = run(6)
    run(3, tmp_path / "c")
    rest, resumed, again = run(6, tmp_path / "c")
    assert rest == history[3:] and all(map(torch.equal, whole, resumed)) and stored == again
    assert history[-1]["replayed"] == 2
    with pytest.raises(ValueError, match="accumulate is None here and 2 there"):
        Task().gflownet(replay=Replay(fraction=0.5), num_particles=4).fit(
            [tuple(x[i : i + 1] for x in Task().args) for i in (0, 1)], 6, checkpoint=tmp_path / "c", **QUIET
        )


def test_what_updates_several_times_a_batch_is_refused():
    task = Task()
    em = VariationalEM(task.model, None, Enumeration(task.model), torch.optim.SGD([torch.zeros(1)], lr=1.0))
    for trainer in (task.trainer(PolicyGradient, algorithm="ppo"), em):
        with pytest.raises(ValueError, match=f"accumulate: {type(trainer).__name__} .* use larger batches"):
            trainer.fit([task.args], 2, accumulate=2, **QUIET)
    assert len(task.trainer(PolicyGradient, algorithm="ppo", epochs=1).fit([task.args], 1, accumulate=2, **QUIET)) == 1
    with pytest.raises(ValueError, match="accumulate: must be at least 1"):
        task.gflownet().fit([task.args], 1, accumulate=0, **QUIET)
