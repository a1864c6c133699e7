"""Training with replay: the posterior is what is learned, stale rewards are forgotten, a resumed run repeats."""

from __future__ import annotations

import json

import pyro
import pytest
import torch
from problems import PROBLEMS
from stored import Problem, contents, log_joint

from lmppl.distributions import Completion
from lmppl.inference import Enumeration, GFlowNet, Replay
from lmppl.inference.judging.quality import density_quality

# The model's parameters -------------------------------------------------------------------------------------------


def test_rewards_are_forgotten_when_the_model_moves_and_not_when_the_guide_does():
    problem, replay = Problem(), Replay()
    gflownet = problem.gflownet(replay=replay, num_particles=8)
    for _ in range(3):
        gflownet.step(*problem.args)
    replay.observations(problem.model, problem.guide, problem.args, {}, 1)
    known = [p for entries in contents(replay) for p in entries.values()]
    assert known and not any(p != p for p in known)  # the guide has moved three times
    with torch.no_grad():
        next(iter(problem.lm.network.base_parameters)).add_(0.01)
    replay.observations(problem.model, problem.guide, problem.args, {}, 1)
    assert all(p != p for entries in contents(replay) for p in entries.values())
    gflownet.step(*problem.args)  # replayed values are refreshed for free
    refreshed = [(i, t, p) for i, entries in enumerate(contents(replay)) for t, p in entries.items() if p == p]
    assert len(refreshed) >= 4
    for i, tokens, p in refreshed:
        assert p == pytest.approx(log_joint(problem, tokens, i), abs=1e-9)


# Demonstrations ---------------------------------------------------------------------------------------------------


def test_demonstrations_are_stored_with_their_log_joint():
    problem, replay = Problem(), Replay()
    gflownet = problem.gflownet(replay=replay)
    gflownet.demonstrate(*problem.args, values={"z": ["ab", "c"]})
    gflownet.demonstrate(*problem.args, values={"z": [["a", "b"], ["c", "de"]]})
    stored = contents(replay)
    eos = problem.lm.eos_id
    for i, expected in enumerate([["ab", "a", "c"], ["c", "b", "de"]]):
        assert list(stored[i]) == [(*problem.lm.encode(s).tolist(), eos, -1) for s in expected]
        for tokens, log_p in stored[i].items():
            assert log_p == pytest.approx(log_joint(problem, tokens, i), abs=1e-9)
    assert gflownet.step(*problem.args)["replayed"] == 3
    for bad in ({"w": ["a", "b"]}, {"z": ["a", "b", "c"]}, {"z": ["abcab", "a"]}):
        with pytest.raises(ValueError, match="values"):
            gflownet.demonstrate(*problem.args, values=bad)
    with pytest.raises(ValueError, match="replay"):
        problem.gflownet().demonstrate(*problem.args, values={"z": ["ab", "c"]})


# Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_loss_vanishes_at_the_posterior_on_what_is_replayed(lm, name):
    found = PROBLEMS[name](lm)
    dummy = torch.nn.Parameter(torch.zeros(()))
    guide = found.posterior(1.0)
    gflownet = GFlowNet(
        found.model,
        lambda: (guide(), dummy)[0],
        optimizer=torch.optim.SGD([dummy], lr=0.0),
        replay=Replay(fraction=0.5),
    )
    gflownet.descend = lambda loss: 0.0  # nothing to train
    pyro.set_rng_seed(0)
    metrics = [gflownet.step() for _ in range(3)]
    assert metrics[-1]["replayed"] > 0 and all(abs(m["loss"]) < 1e-6 for m in metrics)


def test_training_with_replay_reaches_the_exact_posterior():
    problem = Problem(vocab=6)
    exact = Enumeration(problem.model).run(*problem.args)
    before = density_quality(exact, problem.guide, problem.args, {}).total_variation
    replay = Replay(capacity=32, priority="both", min_distance=0.1)
    problem.gflownet(lr=2e-2, replay=replay).fit([problem.args], 100, progress=False)
    after = density_quality(exact, problem.guide, problem.args, {}).total_variation
    assert float(before.mean()) > 0.3 and float(after.max()) < 0.1


@pytest.mark.parametrize("priority", ["reward", "both"])
def test_a_resumed_run_with_replay_repeats_an_uninterrupted_one(tmp_path, priority):
    def options():
        return {"replay": Replay(capacity=6, priority=priority, fraction=0.5), "num_particles": 8}

    whole, first, second = Problem(), Problem(), Problem()
    uninterrupted = whole.gflownet(**options())
    expected = uninterrupted.fit([whole.args], 7, progress=False, seed=5)

    def stop_after_4(step, metrics):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.gflownet(**options()).fit(
            [first.args], 7, progress=False, seed=5, checkpoint=tmp_path / "c", checkpoint_every=2,
            callback=stop_after_4,
        )  # fmt: skip
    resumed = second.gflownet(**options())
    rest = resumed.fit([second.args], 7, progress=False, seed=5, checkpoint=tmp_path / "c")
    assert [m["loss"] for m in rest] == [m["loss"] for m in expected[4:]]
    assert contents(resumed.replay) == contents(uninterrupted.replay)
    assert json.loads((tmp_path / "c" / "training.json").read_text())["own"]["replay"]["texts"] == ["z"]


@pytest.mark.slow
def test_two_tasks_share_an_adapter_and_a_buffer_and_a_resumed_run_repeats(tmp_path):
    """Two models over the same prompts and observations, so that only the task tells their keys apart."""

    def tasks(problem):
        def reverse(x, y):  # z with the reward of its complement: other posterior, same prompts and observations
            with pyro.plate("stories", len(x)):
                z = pyro.sample("z", Completion(problem.lm, x, max_tokens=2))
                pyro.sample("y", Completion(problem.lm, problem.lm.join(z, x), max_tokens=4), obs=y)

        def backwards(x, y):
            with pyro.plate("stories", len(x)):
                pyro.sample("z", Completion(problem.q, problem.q.join(x, y), max_tokens=2))

        return [(problem.model, problem.guide, [problem.args]), (reverse, backwards, [problem.args])]

    def run(problem, steps, **kwargs):
        gflownet = problem.gflownet(lr=2e-2, replay=Replay(capacity=16))
        return gflownet, gflownet.fit(tasks(problem), steps, progress=False, seed=2, **kwargs)

    whole, first, second = Problem(), Problem(), Problem()
    gflownet, expected = run(whole, 5)
    assert sorted(key[:2] for key in gflownet.replay._stored) == ["0:", "0:", "1:", "1:"]

    def stop(step, metrics):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(first, 5, checkpoint=tmp_path / "c", checkpoint_every=3, callback=stop)
    _, rest = run(second, 5, checkpoint=tmp_path / "c")
    assert [m["loss"] for m in rest] == [m["loss"] for m in expected[3:]]

    problem = Problem(vocab=5)
    run(problem, 140)
    for model, guide, _ in tasks(problem):
        exact = Enumeration(model).run(*problem.args)
        assert float(density_quality(exact, guide, problem.args, {}).total_variation.max()) < 0.1
