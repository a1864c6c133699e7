"""What `fit` sees on its way: early stopping, trackers, a verdict on held-out observations."""

from __future__ import annotations

import json
import math
from functools import partial

import pyro
import pytest
import torch
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from tasks import Task

from lmppl import text
from lmppl.distributions import Completion
from lmppl.inference import EarlyStopping, Enumeration, StopTraining
from lmppl.inference.training.loop.verdict import verdict

QUIET = {"progress": False}


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
                at.append(task.values())
            if step == last:
                raise KeyboardInterrupt

        try:
            history = task.gflownet(num_particles=4).fit(
                [task.args], 6, callback=watch, stop=stop, checkpoint=where, checkpoint_every=1, **QUIET
            )
        except KeyboardInterrupt:
            return [], task.values()
        return history, task.values()

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


def test_a_tracker_may_write_to_accelerates_log():
    """W&B's does when it starts; the log of accelerate fails in a process that it does not know."""

    class Talking(Notes):
        main_process_only = False  # else accelerate makes itself known

        def start(self):
            get_logger("lmppl").debug("started")
            super().start()

    AcceleratorState._reset_state(reset_partial_state=True)
    task, notes = Task(), Talking()
    task.gflownet().fit([task.args], 1, trackers=[notes], **QUIET)
    assert [line["step"] for line in notes.lines] == [0]


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


@pytest.mark.parametrize("rare", [False, True])
def test_fit_says_whether_lost_modes_were_looked_for(caplog, rare):
    """Not where the guide draws what explains the observation and the model almost never does."""
    task = Task()
    wanted = task.lm.encode("ff", stop="eos")

    def model(x, y):
        with pyro.plate("stories", len(x)):
            z = pyro.sample("z", Completion(task.lm, x, max_tokens=2, temperature=0.2))
            pyro.factor("seen", 60.0 * text.equal(z, wanted) if rare else torch.zeros(()))

    def guide(x, y):
        with pyro.plate("stories", len(x)):
            pyro.sample("z", Completion(task.q, x, max_tokens=2, allowed=wanted.unique()))

    task.model, task.guide = model, guide if rare else task.guide
    history = task.gflownet(num_particles=8).fit([task.args], 2, held_out=task.args, **QUIET)
    assert ("held_out_missed" in history[-1]) != rare
    assert ("not checked for lost modes" in caplog.text) == rare


@pytest.mark.slow
def test_fit_says_whether_it_has_converged(tmp_path):
    task, log = Task(layers=2), tmp_path / "log.jsonl"
    exact = Enumeration(task.model).run(*task.args)
    history = task.gflownet(num_particles=32).fit(
        [task.args], 180, held_out=task.args, evaluate_every=30, exact_sample=exact, log=log, **QUIET
    )
    looks = [m for m in history if "verdict" in m]
    assert len(looks) == 6 and looks[-1]["verdict"] == "converged"
    assert [json.loads(line).get("verdict") for line in log.read_text().splitlines()] == [
        m.get("verdict") for m in history
    ]
    log_z = float(exact.log_evidence.mean())
    assert abs(looks[-1]["held_out_log_z"] - log_z) < 0.1 and abs(looks[-1]["held_out_gap"]) < 0.2


@pytest.mark.slow
def test_both_bounds_hold_on_average():
    """Of 144 evaluations of a guide that is far off; each mean within 5 standard errors of its side."""
    task = Task()
    exact, trainer = Enumeration(task.model).run(*task.args), task.gflownet()
    torch.manual_seed(3)
    found = [trainer.evaluate(*task.args, num_particles=4, exact_sample=exact) for _ in range(144)]
    log_z = float(exact.log_evidence.mean())
    for name, sign in (("log_z", -1), ("log_z_model", -1), ("log_z_above", 1)):
        x = torch.tensor([f[f"held_out_{name}"] for f in found]).double()
        assert sign * (float(x.mean()) - log_z) > -5 * float(x.std()) / 12, name


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
    with pytest.raises(ValueError, match="exact_sample: it is a sample of the posterior of held_out="):
        fit(exact_sample={"z": task.args[0]})
    with pytest.raises(ValueError, match="exact_sample: expected a Posterior or the latent values"):
        fit(exact_sample=3, held_out=task.args)
