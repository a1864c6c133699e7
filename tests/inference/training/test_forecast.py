"""What `fit` says it will cost is what it costs: exactly where steps are alike, by a clock of the test's own."""

from __future__ import annotations

import logging
import re

import peft
import pyro
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tasks import Task
from tiny import flat_lm

from lmppl.distributions import Completion
from lmppl.inference import EarlyStopping, GFlowNet
from lmppl.inference.training.loop.cost import Cost, Forecast, Spent, duration
from lmppl.inference.training.loop.evaluation import JUDGED, LOOK, Looks

LINE = re.compile(
    r"(at most )?([\d,]+)( of [\d,]+)? steps( left)?: (now )?about ([\d,.]+)( M)? tokens, .* "
    r"\(([\d,]+) tokens and .* s a step.*\)"
)


class Clock:
    """Time passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float, answer=None):
        self.now += seconds
        return answer


class Run:
    """A run whose steps, looks and checkpoints take known times, told step by step as the loop of `fit` does."""

    def __init__(self, start, steps, every, save_every, *, seconds, look=(0.5, 0.25), save=1.0, turns=1, held_out=True):
        self.clock, self.tokens = Clock(), 0
        self.start, self.steps, self.save_every, self.seconds, self.save = start, steps, save_every, seconds, save
        self.spent = Spent(lambda: self.tokens, self.clock)
        fixed, each = look  # seconds of a look, and of each draw

        def evaluate(draws):
            return self.clock.after(fixed + each * draws, {"held_out_sd_u": 1.0, "held_out_impossible": 0.0,
                                                           "held_out_ess": 1.0})  # fmt: skip

        whole = fixed + each * LOOK
        judge = lambda: self.clock.after(JUDGED * whole, {})  # noqa: E731
        self.looks = Looks(evaluate if held_out else None, judge, every, steps)
        self.forecast = Forecast(start, steps, self.spent, self.looks, save_every, turns, False)

    def go(self) -> dict[int, str]:
        """What is said after each step."""
        said = {}
        with self.spent.on(self.spent.saves):
            self.clock.after(self.save)
        for step in range(self.start, self.steps):
            mark = self.spent.mark()
            self.clock.after(self.seconds(step))
            self.tokens += 1000 + step % 2
            if self.looks.at(step):
                with self.spent.on(self.spent.looks):
                    self.looks(step)
            if (step + 1) % self.save_every == 0 or step + 1 == self.steps:
                with self.spent.on(self.spent.saves):
                    self.clock.after(self.save)
            self.spent.add(mark)
            if line := self.forecast(step + 1):
                said[step + 1] = line
        return said

    @property
    def taken(self) -> float:
        return self.clock() - self.spent.began


@given(
    st.integers(3, 60), st.integers(0, 40), st.integers(1, 30), st.integers(1, 30), st.floats(0.01, 50),
    st.floats(0, 9), st.floats(0, 1), st.floats(0, 5), st.floats(0, 100), st.booleans(),
)  # fmt: skip
def test_a_run_of_equal_steps_takes_what_was_said(
    steps, start, every, save_every, step, fixed, each, save, once, held_out
):
    """Whatever the first step holds besides; looks by two small ones, which count too."""
    start = min(start, steps - 3)
    run = Run(
        start, steps, every, save_every, seconds=lambda i: step + once * (i == start), look=(fixed, each), save=save,
        held_out=held_out,
    )  # fmt: skip
    assert list(run.go()) == [start + 2]
    assert run.forecast.said == pytest.approx(run.taken, rel=1e-9)


def test_each_task_has_its_first_step():
    """Two tasks, whose steps take 2 and 4 seconds, and 10 more at first."""
    run = Run(0, 20, 50, 100, seconds=lambda i: 2 + 2 * (i % 2) + 10 * (i < 2), turns=2, held_out=False)
    assert list(run.go()) == [4]
    assert run.forecast.said == run.taken


def test_what_proves_wrong_is_said_again_once():
    """A step takes one second at first and two from the fifth on: it shows after a tenth of the steps."""
    run = Run(0, 300, 100, 1000, seconds=lambda i: 1 + (i > 3), held_out=False)
    said = run.go()
    assert list(said) == [2, 30]
    assert said[2] == "300 steps: about 300,000 tokens, 5 min 2 s (1,001 tokens and 1.0 s a step)"
    assert said[30].startswith("300 steps: now about 300,000 tokens, 9 min 30 s") and "1.9 s a step" in said[30]
    assert list(Run(0, 300, 100, 1000, seconds=lambda i: 1 + 0.1 * (i > 3), held_out=False).go()) == [2]


def test_a_resumed_run_says_what_is_left_and_looks_are_told():
    run = Run(400, 1000, 100, 500, seconds=lambda i: 30.0, look=(20.0, 2.5))
    (line,) = run.go().values()
    # 600 steps of 30 s; six looks of 180 s, the last one's judgement three more; two small looks of 30 and 60 s
    assert run.forecast.said == 600 * 30 + 9 * 180 + 90 + 1 + 2  # checkpoints
    assert line == (
        "600 of 1,000 steps left: about 601,000 tokens, 5 h 29 min "
        "(1,001 tokens and 30.0 s a step; 6 looks at held_out, each 3 min)"
    )


def test_the_sum():
    cost = Cost(10, 100.0, 2.0, 3.0, 5.0, 2, 0.5, 250, 7.0)
    assert cost.total_tokens == 250 + 10 * 100 and cost.total_seconds == 7 + 10 * 2 + 3 * 5 + 2 * 0.5


def test_times_are_never_rounded_to_sixty():
    assert [duration(s) for s in (59.94, 59.96, 3_569, 3_571, 3_599.7, 86_399, 172_799)] == [
        "59.9 s", "1 min", "59 min 29 s", "59 min 31 s", "1 h", "24 h", "2 d",
    ]  # fmt: skip


# -- of a real `fit` ---------------------------------------------------------------------------------------------------


class Fixed(Task):
    """z of six tokens, always: no draw is longer than another."""

    def __init__(self) -> None:
        self.lm = flat_lm(seed=3, vocab=24)
        self.q = self.lm.with_adapter(peft.LoraConfig(r=2, target_modules="all-linear"))
        self.args = self.encode(("abc", "d"), ("cab", "ed"))

    def model(self, x, y):
        with pyro.plate("stories", len(x)):
            z = pyro.sample("z", Completion(self.lm, x, max_tokens=6, stop=None))
            pyro.sample("y", Completion(self.lm, self.lm.join(x, z), max_tokens=4), obs=y)

    def q_of(self, x, y):
        return Completion(self.q, self.q.join(y, x), max_tokens=6, stop=None)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="lmppl")

    def lines() -> list[re.Match]:
        found = [LINE.fullmatch(r.message) for r in caplog.records if " steps" in r.message and "about" in r.message]
        assert all(found), caplog.text
        caplog.clear()
        return found

    return lines


def number(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_tokens_foretold_are_those_that_are_counted(said, accumulate):
    """Within 3%: what draws have in common is read once, so that steps differ by a few tokens."""
    task = Fixed()
    trainer = task.gflownet(num_particles=8)
    trainer.fit([task.args], 12, accumulate=accumulate, progress=False)
    (line,) = said()
    assert line[2] == "12" and not line[1] and not line[4]
    assert number(line[6]) == pytest.approx(trainer.training_tokens, rel=0.03)
    assert number(line[8]) == pytest.approx(trainer.training_tokens / 12, rel=0.05)


def test_it_is_shown_beside_the_progress_only_where_there_is_one(said, capsys):
    task = Task()
    task.gflownet(num_particles=4).fit([task.args], 4, progress=False)
    assert capsys.readouterr() == ("", "") and len(said()) == 1
    task.gflownet(num_particles=4).fit([task.args], 4)
    (line,) = said()
    out, err = capsys.readouterr()
    assert out == "" and line.string in err.splitlines()
    task.gflownet(num_particles=4).fit([task.args], 2)  # nothing is left to be said of
    assert said() == [] and "about" not in capsys.readouterr().err


def test_a_rule_may_end_it_and_a_resumed_run_has_less_to_do(said, tmp_path):
    task = Task()
    options = {"progress": False, "checkpoint": tmp_path / "c", "held_out": task.args, "evaluate_every": 2}
    task.gflownet(num_particles=4).fit([task.args], 4, **options)
    assert "2 looks at held_out" in said()[0].string
    stop = EarlyStopping(patience=9)
    task.gflownet(num_particles=4).fit([task.args], 9, stop=stop, **options)
    (line,) = said()
    assert line.string.startswith("at most 5 of 9 steps left: about ")


def test_small_looks_leave_training_and_its_log_as_they_were(said):
    """A look at held-out observations that is not due until the end: it is tried, and nothing of it stays."""

    def run(**options):
        task = Task()
        trainer = task.gflownet(num_particles=4)
        history = trainer.fit([task.args], 5, progress=False, **options)
        return task.values(), trainer.training_tokens, history

    plain, tokens, history = run()
    looked, same, other = run(held_out=Task().args, evaluate_every=50)
    assert all((p == q).all() for p, q in zip(plain, looked, strict=True)) and tokens == same
    assert history[:-1] == other[:-1] and set(history[-1]) < set(other[-1])
    first, second = said()
    assert "held_out" not in first.string and "one look at held_out, " in second.string


def test_tasks_take_turns(said):
    one, two = Task(), Fixed()
    optimizer = one.gflownet().optimizer
    optimizer.add_param_group({"params": list(two.q.trainable_parameters())})
    trainer = GFlowNet(one.model, one.guide, optimizer=optimizer, num_particles=4)
    tasks = [(one.model, one.guide, [one.args]), (two.model, two.guide, [two.args])]
    trainer.fit(tasks, 12, progress=False)
    (line,) = said()
    assert number(line[6]) == pytest.approx(trainer.training_tokens, rel=0.1)
