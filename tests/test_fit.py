"""What `fit` can be told: data sets, schedulers, accumulation, early stopping, trackers, a verdict on the way."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
import transformers
from accelerate.tracking import GeneralTracker
from tasks import Task
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lmppl.inference import (
    EarlyStopping,
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
from lmppl.inference.training.batches import readable
from lmppl.inference.training.schedules import warmed
from lmppl.inference.training.verdict import verdict

QUIET = {"progress": False}
KINDS = {
    "gflownet": GFlowNet,
    "policy gradient": PolicyGradient,
    "wake": ReweightedWakeSleep,
    "supervised": SupervisedFineTuning,
}


def batch_of(kind, task: Task, part: slice = slice(None)) -> tuple:
    args = tuple(x[part] for x in task.args)
    return (*args, {"z": task.lm.encode(["a", "b"], stop="eos")[part]}) if kind is SupervisedFineTuning else args


def sgd(task: Task, kind, lr: float = 1.0, **kwargs):
    optimizer = torch.optim.SGD(task.q.trainable_parameters(), lr=lr)
    return kind(task.model, task.guide, optimizer=optimizer, clip=math.inf, **kwargs)


def values(task: Task) -> list[torch.Tensor]:
    return [p.detach().clone() for p in task.q.trainable_parameters()]


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
        ([(1,)], {"batch_size": 2}, "batch_size: it is that of a Dataset"),
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
        return rates, values(task)

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
        (LambdaLR(other, lambda t: 1.0), "this LambdaLR is of another one"),
        (ReduceLROnPlateau(trainer.optimizer), "that needs no figure"),
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
        before = values(task)
        halves = [batch_of(SupervisedFineTuning, task, slice(i, i + 1)) for i in (0, 1)]
        trainer = sgd(task, SupervisedFineTuning)
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
    before, deltas, losses = values(task), [], []
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
    start = values(other)
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
        return history, values(task), len(trainer.replay)

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
        with pytest.raises(ValueError, match=f"accumulate: {type(trainer).__name__} .* give larger batches"):
            trainer.fit([task.args], 2, accumulate=2, **QUIET)
    assert len(task.trainer(PolicyGradient, algorithm="ppo", epochs=1).fit([task.args], 1, accumulate=2, **QUIET)) == 1
    with pytest.raises(ValueError, match="accumulate: must be at least 1"):
        task.gflownet().fit([task.args], 1, accumulate=0, **QUIET)


# -- early stopping ----------------------------------------------------------------------------------------------------


def told(figures):
    """A callback that adds these figures, one a step."""
    return lambda step, metrics: metrics.update(figure=figures[step])


@pytest.mark.parametrize(
    ("options", "figures", "steps", "best"),
    [
        ({}, [3, 2, 1, 1, 1, 1, 0], 6, 2),
        ({"patience": 1}, [3, 2, 4, 1], 3, 1),
        ({"patience": 2, "least": 0.5}, [3, 2.7, 2.6, 1], 3, 0),
        ({"patience": 2, "larger": True}, [1, 2, 1, 1.5, 3], 4, 1),
        ({"patience": 2}, [1, math.nan, math.nan, 0], 3, 0),
        ({"patience": 2}, [2, 3, 1, 2, 0, 1], 6, 4),
    ],
)
def test_a_figure_that_no_longer_improves_ends_training(options, figures, steps, best):
    task, stop = Task(), EarlyStopping("figure", **options)
    history = task.gflownet(num_particles=4).fit([task.args], len(figures), callback=told(figures), stop=stop, **QUIET)
    assert len(history) == steps and (stop.best_step, stop.best_value) == (best, figures[best])


def test_the_best_parameters_are_kept_and_a_resumed_run_goes_on_counting(tmp_path):
    figures, at = [3, 1, 2, 2, 2, 2], []

    def run(last: int | None, where=None, patience: int = 3):
        task, stop = Task(), EarlyStopping("figure", patience=patience, best=True)

        def watch(step, metrics):
            told(figures)(step, metrics)
            if step == 1:
                at.append(values(task))
            if step == last:
                raise KeyboardInterrupt

        try:
            history = task.gflownet(num_particles=4).fit(
                [task.args], 6, callback=watch, stop=stop, checkpoint=where, checkpoint_every=1, **QUIET
            )
        except KeyboardInterrupt:
            return [], values(task)
        return history, values(task)

    history, kept = run(None)
    assert len(history) == 5 and all(map(torch.equal, kept, at[0]))
    run(3, tmp_path / "c")
    rest, resumed = run(None, tmp_path / "c")
    assert rest == history[3:] and all(map(torch.equal, kept, resumed))
    again, resumed = run(None, tmp_path / "c")
    assert again == [] and all(map(torch.equal, kept, resumed)), "it had ended"
    assert len(run(None, tmp_path / "c", patience=4)[0]) == 1


def test_held_out_figures_are_looked_at_where_they_are_measured():
    task, stop = Task(), EarlyStopping("held_out_sd_u", patience=1, least=100.0)
    history = task.gflownet(num_particles=4).fit(
        [task.args], 20, held_out=task.args, evaluate_every=2, stop=stop, **QUIET
    )
    assert len(history) == 4 and stop.best_step == 1
    assert EarlyStopping("held_out_ess").larger and not EarlyStopping("loss").larger


def test_wrong_rules_are_refused():
    task = Task()
    fit = partial(task.gflownet(num_particles=4).fit, [task.args], 2, **QUIET)
    for stop, said, options in (
        (EarlyStopping(), "stop: 'held_out_sd_u' is measured on held_out=", {}),
        (EarlyStopping("held_out_sdu"), "no metric 'held_out_sdu'", {"held_out": task.args, "evaluate_every": 1}),
        (EarlyStopping, "stop: expected a function", {}),
        (3, "stop: expected a function", {}),
    ):
        with pytest.raises(ValueError, match=said):
            fit(stop=stop, **options)
    for wrong in ({"patience": 0}, {"least": -1.0}, {"figure": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EarlyStopping(**wrong)


def test_a_function_may_stop_too_and_a_rule_may_be_a_callback():
    def enough(step, metrics):
        if step == 1:
            raise StopTraining

    task = Task()
    assert len(task.gflownet(num_particles=4).fit([task.args], 5, stop=enough, **QUIET)) == 2
    rule = EarlyStopping("seen", patience=1)
    rule.larger = True

    def seen(step, metrics):
        rule(step, {"seen": 1.0})

    assert len(task.gflownet(num_particles=4).fit([task.args], 5, callback=seen, **QUIET)) == 2


# -- trackers ----------------------------------------------------------------------------------------------------------


class Notes(GeneralTracker):
    """Writes down what it is told."""

    name, requires_logging_directory = "notes", False

    def __init__(self):
        super().__init__()
        self.tracker, self.lines, self.settings, self.finished = None, [], {}, 0

    tracker = None

    def start(self):
        self.tracker = "open"

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **kwargs):
        self.lines.append({"step": step, **values})

    def finish(self):
        self.finished += 1


def test_a_tracker_is_told_what_the_log_is(tmp_path):
    task, notes, log = Task(), Notes(), tmp_path / "log.jsonl"
    task.gflownet().fit(
        [task.args], 3, held_out=task.args, trackers=[notes], log=log, seed=4,
        callback=lambda step, metrics: metrics.update(tensor=torch.tensor(0.5), words="a b", nothing=None), **QUIET,
    )  # fmt: skip
    lines = [{k: v for k, v in json.loads(line).items() if v is not None} for line in log.read_text().splitlines()]
    assert notes.lines == lines and lines[0]["tensor"] == 0.5 and lines[-1]["verdict"] and notes.finished == 1
    assert (notes.settings["seed"], notes.settings["steps"], notes.settings["trainer"]) == (4, 3, "GFlowNet")
    assert all(isinstance(v, bool | int | float | str) for v in notes.settings.values())
    task.gflownet().fit([task.args], 1, trackers=[notes], **QUIET)
    assert len(notes.lines) == 4 and notes.finished == 1, "one that is started belongs to others"


def test_a_tracker_is_finished_after_an_error():
    def fail(step, metrics):
        raise KeyError

    task, notes = Task(), Notes()
    with pytest.raises(KeyError):
        task.gflownet().fit([task.args], 3, trackers=[notes], callback=fail, **QUIET)
    assert notes.finished == 1


def test_other_trackers_are_refused(tmp_path):
    task = Task()
    for wrong, said in (
        (["tensorbord"], "'tensorbord'"),
        ("tensorboard", "a list"),
        ([Notes], "class Notes"),
        (3, "3"),
    ):
        with pytest.raises(ValueError, match=f"trackers: .*{said}"):
            task.gflownet().fit([task.args], 1, trackers=wrong, checkpoint=tmp_path / "c", **QUIET)
    assert not (tmp_path / "c").exists()


def test_a_tracker_that_is_not_installed_is_told(tmp_path):
    from accelerate.tracking import get_available_trackers

    missing = next(name for name in ("aim", "clearml", "swanlab") if name not in map(str, get_available_trackers()))
    with pytest.raises(ImportError, match=f"trackers: '{missing}' is not installed; pip install {missing}"):
        Task().gflownet().fit([Task().args], 1, trackers=[missing], **QUIET)


def test_tensorboard_writes_beside_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    task = Task()
    history = task.gflownet().fit([task.args], 3, trackers=["tensorboard"], log=tmp_path / "log.jsonl", **QUIET)
    events = EventAccumulator(str(tmp_path / "trackers" / "GFlowNet")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([m["loss"] for m in history], rel=1e-5)


# -- a verdict on the way ----------------------------------------------------------------------------------------------

GOOD = {"held_out_sd_u": 0.1, "held_out_ess": 0.95, "held_out_impossible": 0.0}


@pytest.mark.parametrize(
    ("found", "before", "said"),
    [
        ({}, [], "converged"),
        ({}, [{"held_out_sd_u": 5.0}], "converged"),
        ({"held_out_missed": 0.5}, [], "suspect: the guide misses 50%"),
        ({"held_out_missed": 0.5}, [{"held_out_sd_u": 5.0}], "suspect: the guide misses 50%"),
        ({"held_out_khat": 0.9}, [], "suspect: k-hat is 0.9"),
        ({"held_out_gap": 3.0}, [], "suspect: the bounds of log Z are 3 nats apart"),
        ({"held_out_ess": 0.6}, [], "converged"),
        ({"held_out_ess": 0.6}, [{"held_out_sd_u": 0.2}], "improving"),
        ({"held_out_ess": 0.3}, [], "suspect: the effective sample size is 0.3"),
        ({"held_out_ess": 0.05}, [{"held_out_sd_u": 0.2}], "improving"),
        ({"held_out_ess": 0.05}, [{"held_out_sd_u": 0.105}], "suspect: the effective sample size is 0.05"),
        ({"held_out_ess": 0.05, "held_out_impossible": 0.9}, [{"held_out_sd_u": 9.0}], "suspect: "),
        ({"held_out_ess": 0.05, "held_out_impossible": 0.6}, [{"held_out_impossible": 0.9}], "improving"),
    ],
)
def test_the_verdict(found, before, said):
    assert verdict(GOOD | found, [GOOD | x for x in before]).startswith(said)


def test_fit_says_whether_it_has_converged(tmp_path):
    task, log = Task(), tmp_path / "log.jsonl"
    exact = Enumeration(task.model).run(*task.args)
    history = task.gflownet(num_particles=32).fit(
        [task.args], 300, held_out=task.args, evaluate_every=50, exact_sample=exact, log=log, **QUIET
    )
    looks = [m for m in history if "verdict" in m]
    assert len(looks) == 6 and looks[-1]["verdict"] == "converged"
    assert [json.loads(line).get("verdict") for line in log.read_text().splitlines()] == [
        m.get("verdict") for m in history
    ]
    log_z = float(exact.log_evidence.mean())
    assert abs(looks[-1]["held_out_log_z"] - log_z) < 0.1 and abs(looks[-1]["held_out_gap"]) < 0.2


def test_both_bounds_hold_on_average():
    """Of 400 evaluations of a guide that is far off; each mean within 5 standard errors of its side."""
    task = Task()
    exact, trainer = Enumeration(task.model).run(*task.args), task.gflownet()
    torch.manual_seed(3)
    found = [trainer.evaluate(*task.args, num_particles=4, exact_sample=exact) for _ in range(400)]
    log_z = float(exact.log_evidence.mean())
    for name, sign in (("log_z", -1), ("log_z_model", -1), ("log_z_above", 1)):
        x = torch.tensor([f[f"held_out_{name}"] for f in found]).double()
        assert sign * (float(x.mean()) - log_z) > -5 * float(x.std()) / 20, name
    z = torch.tensor([math.exp(f["held_out_log_z_above"] - f["held_out_log_z"]) for f in found])
    assert float(z.mean()) > 1


def test_a_look_costs_at_most_twice_an_importance_run():
    task = Task()
    trainer = task.gflownet()

    def tokens(work) -> int:
        before = task.lm.network.tokens_scored
        work()
        return task.lm.network.tokens_scored - before

    plain = tokens(lambda: trainer.run(*task.args, num_particles=64))
    assert 0 < tokens(lambda: trainer.evaluate(*task.args)) <= 2 * plain


def test_a_resumed_run_gives_the_verdicts_of_an_uninterrupted_one(tmp_path):
    def run(stop, where=None):
        def watch(step, metrics):
            if step == stop:
                raise StopTraining

        task = Task()
        return task.gflownet(num_particles=4).fit(
            [task.args], 8, held_out=task.args, evaluate_every=2, callback=watch, checkpoint=where, **QUIET
        )

    whole = run(None)
    assert run(3, tmp_path / "c") + run(None, tmp_path / "c") == whole


def test_wrong_exact_samples_are_refused():
    task = Task()
    fit = partial(task.gflownet().fit, [task.args], 1, **QUIET)
    with pytest.raises(ValueError, match="exact_sample: it is one of the posterior of held_out="):
        fit(exact_sample={"z": task.args[0]})
    with pytest.raises(ValueError, match="exact_sample: expected a Posterior or the latent values"):
        fit(exact_sample=3, held_out=task.args)
