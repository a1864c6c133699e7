"""So many minutes: what is chosen fits into them, and more of them never buy less."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmppl.inference import GFlowNet, Task
from lmppl.inference.training.loop.evaluation import JUDGED
from lmppl.models import Plan, Recipe, infilling, plan
from lmppl.models.budget import EVERY, LEAST, LOOKS, STEPS, Size, choose, looks, sizes

MINUTES, SECONDS = st.floats(0.001, 1e4), st.floats(1e-3, 100)
SIZES = st.builds(Size, st.integers(1, 40), st.integers(1, 300))


def line(a: float, b: float):
    """Seconds of a step: so many, and so many a draw."""
    return lambda size: a + b * size.draws


@given(SIZES)
def test_sizes_go_up_to_the_recipes_by_about_twice_the_draws(most):
    found = sizes(most)
    assert found[-1] == most and found == sorted(found)
    for small, large in zip(found, found[1:], strict=False):
        assert small in (Size(large[0] // 2, large[1]), Size(large[0], large[1] // 2))
    assert all(size[i] >= min(most[i], LEAST[i]) for size in found for i in (0, 1))
    assert all(found[0][i] < 2 * LEAST[i] for i in (0, 1))  # as small as it may be


@given(SIZES, SECONDS, SECONDS, MINUTES, MINUTES, st.integers(1, 3000))
def test_what_is_chosen_fits_and_more_time_never_buys_fewer_draws(most, a, b, some, other, wanted):
    cost, to_try = line(a, b), sizes(most)
    chosen = [choose(60 * minutes, cost, to_try, wanted) for minutes in sorted((some, other))]
    for minutes, (size, steps) in zip(sorted((some, other)), chosen, strict=True):
        assert steps * cost(size) <= 60 * minutes * (1 + 1e-12)
        assert (steps + 1) * cost(size) > 60 * minutes * (1 - 1e-12)
        assert size == to_try[0] or steps >= wanted  # steps before draws
        assert size == most or wanted * cost(to_try[to_try.index(size) + 1]) > 60 * minutes
    (size, steps), (larger, more) = chosen
    assert steps * size.draws <= more * larger.draws and size <= larger


def test_steps_first_then_draws_then_steps_again():
    """c = 1 + mn / 8 seconds, 100 steps wanted: 2 x 4 takes 2 s, 2 x 8 takes 3, 4 x 8 takes 5, ..., 8 x 16 takes 17."""
    cost, to_try = line(1.0, 1 / 8), sizes(Size(8, 16))
    asked = []

    def counted(size):
        asked.append(size)
        return cost(size)

    assert choose(120.0, counted, to_try, 100) == (Size(2, 4), 60) and set(asked) == {Size(2, 4)}
    assert choose(299.0, cost, to_try, 100) == (Size(2, 4), 149)
    assert choose(301.0, counted, to_try, 100) == (Size(2, 8), 100) and max(asked) == Size(4, 8)  # no larger is tried
    assert choose(600.0, cost, to_try, 100) == (Size(4, 8), 120)
    assert choose(3400.0, cost, to_try, 100) == (Size(8, 16), 200)
    assert choose(1.0, cost, to_try, 100) == (Size(2, 4), 0)


@given(SECONDS, SECONDS, st.integers(1, 16), st.integers(1, 5000))
def test_looks_take_no_more_than_their_share(seconds, one, observations, steps):
    some, every = looks(seconds, one, observations, steps)
    assert 0 <= some <= observations and every >= 1
    if some:
        times = math.ceil(steps / every)  # the last one at the last step
        assert (times + JUDGED) * some * one <= seconds * (1 + 1e-9) and every >= EVERY
    else:
        assert (5 + JUDGED) * one > seconds * (1 - 1e-9)


# -- measured on an experiment -----------------------------------------------------------------------------------------


class Clock:
    """Every step takes so long as its size says; a look takes a second."""

    def __init__(self, cost) -> None:
        self.now, self.cost = 0.0, cost

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def experiment():
    return infilling.experiment(recipe=Recipe(steps=100, adapter={"r": 2, "target_modules": "all-linear"}))


def maker(clock: Clock, seen: list):
    """Trainers whose steps take the clock's time, and what batches and particles they were given."""

    class Timed(GFlowNet):
        first = True

        def step(self, *args, **kwargs):
            found = super().step(*args, **kwargs)
            size = Size(len(args[0]), self.objective.num_particles)
            clock.now += clock.cost(size) + 5.0 * Timed.first  # what is done once
            Timed.first = False
            seen.append(size)
            return found

        def evaluate(self, *args, **kwargs):
            clock.now += 1.0
            return {}

    def make(own):
        return Timed(own.model, own.guide, optimizer=own.optimizer(), num_particles=own.recipe.particles)

    return make


@pytest.mark.parametrize(
    ("minutes", "size", "why"),
    [
        (2.0, Size(2, 4), "the fewest draws, and still fewer than 100 steps, which seldom suffice"),
        (12.0, Size(4, 8), "the most draws with which the recipe's 100 steps fit"),
        (60.0, Size(8, 16), "the recipe's size, with which 100 steps fit"),
    ],
)
def test_a_plan_is_what_was_measured_and_leaves_the_guide_alone(experiment, minutes, size, why):
    """c = 1 + mn / 8 seconds, as above."""
    clock, seen = Clock(line(1.0, 1 / 8)), []
    before = [p.detach().clone() for p in experiment.guide_lm.trainable_parameters()]
    state = torch.get_rng_state()
    found = plan(experiment, minutes, maker(clock, seen), clock)
    assert all(map(torch.equal, before, experiment.guide_lm.trainable_parameters()))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in experiment.guide_lm.trainable_parameters())
    left = 60 * minutes - (5 + 2 * 2.0 + 1.0)  # two steps of 2 x 4, the first with what is done once, and a look
    assert Size(found.observations, found.particles) == size and found.seconds == clock.cost(size)
    assert found.steps == math.floor(STEPS * left / found.seconds) and found.why == why
    assert (found.held_out, found.evaluate_every) == looks(LOOKS * left, 1.0, 16, found.steps)
    assert seen[:2] == [LEAST, LEAST] and size in seen
    assert f"{found.steps:,} steps of {size} draws" in str(found) and why in str(found)
    assert Plan.saved({"seed": 0} | found.identity) == found and Plan.saved({"seed": 0}) is None


def test_a_time_for_no_step_is_refused_with_the_time_for_enough(experiment):
    clock = Clock(line(1.0, 1 / 8))
    with pytest.raises(ValueError, match="minutes: 0.1 are too few: a step of 2 x 4 draws takes 2.0 s, .*100 steps"):
        plan(experiment, 0.1, maker(clock, []), clock)
    for wrong in (0, -1.0, math.inf, 1e308, math.nan, "5"):
        with pytest.raises(ValueError, match="minutes: must be a positive number"):
            plan(experiment, wrong)


def test_parts_of_batches_are_all_of_them(experiment):
    """Of 8 observations 3 at a time: two steps a batch, and two observations wait for another pass."""
    part = experiment.sized(3, 5)
    assert part.recipe.particles == 5 and part.gflownet().objective.num_particles == 5
    for step in range(6):
        rows = slice(step % 2 * 3, step % 2 * 3 + 3)
        assert all(map(torch.equal, part.batches(step), (x[rows] for x in experiment.batches(step // 2))))
    tasks = infilling.experiment()
    tasks.batches = [Task(tasks.model, tasks.guide, tasks.batches)]
    (task,) = tasks.sized(4, 5).batches
    assert task.model == tasks.model and all(len(x) == 4 for x in task.batch(3))
    few = experiment.sized(50, 5)  # more than a batch has
    assert all(map(torch.equal, few.batches(2), experiment.batches(2)))
