"""Replay: what is stored, what leaves, what is drawn again, and which observations belong together."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS, Y, texts_of
from stored import Problem, contents, log_joint
from tables import Table

from lmppl import text
from lmppl.distributions import Completion
from lmppl.inference import GFlowNet, OnPolicy, Replay
from lmppl.inference.core import programs
from lmppl.inference.core.weights import log_density

# What is stored and what is drawn ---------------------------------------------------------------------------------


def test_what_is_stored_are_the_draws_with_their_log_joint():
    problem, replay = Problem(), Replay(capacity=100)
    gflownet = problem.gflownet(replay=replay, num_particles=12)
    pyro.set_rng_seed(0)
    metrics = [gflownet.step(*problem.args) for _ in range(3)]
    assert [m["replayed"] for m in metrics] == [0, 3, 3]
    stored = contents(replay)
    assert len(stored) == 2 and len(replay) == sum(map(len, stored)) > 10
    for i, entries in enumerate(stored):
        for tokens, log_p in entries.items():
            assert log_p == pytest.approx(log_joint(problem, tokens, i), abs=1e-9)
        for tokens, entry in replay._stored[list(replay._stored)[i]].items():
            assert entry.values["z"].tolist() == list(tokens[:-1])


def test_replayed_values_reach_the_loss(monkeypatch):
    """The last r of N particles are stored values, distinct in each observation; the rest are fresh."""
    problem, replay = Problem(), Replay(fraction=0.5)
    gflownet = problem.gflownet(replay=replay, num_particles=8)
    pyro.set_rng_seed(0)
    for _ in range(3):
        gflownet.step(*problem.args)
    before, seen = contents(replay), []
    original = gflownet.objective.loss_at
    monkeypatch.setattr(gflownet.objective, "loss_at", lambda *a: seen.append(a[-1]["z"]) or original(*a))
    gflownet.step(*problem.args)
    (z,) = seen  # (8, 2, E)
    replayed = min(4, *(len(b) for b in before))
    assert z.shape[:2] == (8, 2) and replayed == 4
    for i in range(2):
        rows = [tuple(t for t in row if t != text.PAD) for row in z[:, i].tolist()]
        again = rows[8 - replayed :]
        assert all((*row, -1) in before[i] for row in again) and len(set(again)) == replayed


def test_storing_and_replaying_cost_no_pass(monkeypatch):
    """A step scores the tokens of its fresh draws and of its loss, and no other."""
    problem, n = Problem(), 16
    gflownet = problem.gflownet(lr=0.0, replay=Replay(fraction=0.5), exploration=None, num_particles=n)
    gflownet.step(*problem.args)
    seen, original = [], gflownet.objective.loss_at
    monkeypatch.setattr(gflownet.objective, "loss_at", lambda *a: seen.append(a[-1]) or original(*a))
    before = gflownet.training_tokens
    pyro.set_rng_seed(0)
    again = int(gflownet.step(*problem.args)["replayed"])
    scored, network = gflownet.training_tokens - before, problem.lm.network
    before = network.tokens_scored
    pyro.set_rng_seed(0)
    fresh = gflownet.objective.draw(problem.model, problem.guide, problem.args, {}, n - again)
    original(problem.model, problem.guide, problem.args, {}, seen[0])
    assert again >= 4 and torch.equal(fresh["z"], seen[0]["z"][: n - again])
    assert network.tokens_scored - before == scored


def fill(replay: Replay, lm, rows: dict[str, float]) -> tuple:
    """Store these strings with these log p for one observation; the observations of the batch."""

    def model():
        z = pyro.sample("z", Completion(lm, lm.encode("a"), max_tokens=8))
        pyro.sample("y", Completion(lm, lm.join("a", z), max_tokens=2), obs=Y[0])

    seen = replay.observations(model, model_guide(lm), (), {}, 0)
    for string, log_p in rows.items():
        z = text.pad(lm.encode(string, stop="eos"), 9)
        replay.add(seen, {"z": z[None]}, torch.tensor([log_p], dtype=torch.float64))
    return seen


def model_guide(lm):
    return lambda: pyro.sample("z", Completion(lm, lm.encode("b"), max_tokens=8))


def strings(replay: Replay, lm) -> list[str]:
    return [lm.decode(torch.tensor(t[:-1])) for entries in replay._stored.values() for t in entries]


@pytest.mark.parametrize(
    ("priority", "left"),
    [("reward", {"a", "ab", "b"}), ("recency", {"bb", "b", "ba"}), ("both", {"a", "ab", "ba"})],
)
def test_what_leaves_when_the_buffer_is_full(lm, priority, left):
    replay = Replay(capacity=3, priority=priority)
    fill(replay, lm, {"a": -1.0, "aa": -9.0, "ab": -2.0, "bb": -6.0, "b": -3.0, "ba": -4.0})
    assert set(strings(replay, lm)) == left


def test_near_duplicates_and_duplicates_leave_the_better_one(lm):
    replay = Replay(min_distance=0.2)
    fill(replay, lm, {"aaaaaa": -3.0, "aaaaab": -4.0, "aaabaa": -2.0, "bbbbbb": -9.0})
    assert strings(replay, lm) == ["aaabaa", "bbbbbb"]
    exact = Replay()
    fill(exact, lm, {"aaaaaa": -3.0, "aaaaab": -4.0, "a": -8.0})
    fill(exact, lm, {"aaaaaa": -5.0})  # seen again: refreshed, its age kept
    assert strings(exact, lm) == ["aaaaaa", "aaaaab", "a"] and list(contents(exact)[0].values()) == [-5.0, -4.0, -8.0]
    fill(exact, lm, {"aaaaab": -torch.inf})
    assert strings(exact, lm) == ["aaaaaa", "a"]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_values_are_drawn_in_proportion_to_their_tempered_reward(lm, temperature):
    replay = Replay(temperature=temperature)
    rows = {"a": -1.0, "b": -2.0, "ab": -2.5, "bb": -5.0}
    seen = fill(replay, lm, rows)
    pyro.set_rng_seed(0)
    n = 2000
    count = dict.fromkeys(rows, 0)
    for _ in range(n):
        count[lm.decode(replay.draw(seen, 1, 0)["z"][0])] += 1
    p = (torch.tensor(list(rows.values()), dtype=torch.float64) / temperature).softmax(0)
    error = (p * (1 - p) / n).sqrt()
    assert ((torch.tensor(list(count.values())) / n - p).abs() < 5 * error).all()
    # What is unknown is as likely as the average, and all alike where all are unknown.
    replay.invalidate()
    count = dict.fromkeys(rows, 0)
    for _ in range(n):
        count[lm.decode(replay.draw(seen, 1, 0)["z"][0])] += 1
    error = (0.25 * 0.75 / n) ** 0.5
    assert all(abs(c / n - 0.25) < 5 * error for c in count.values())


def test_recency_draws_the_newest_and_both_half_of_each(lm):
    rows = {"a": -1.0, "b": -30.0, "ab": -30.0, "bb": -30.0}
    for priority, expected in [("recency", {"ab", "bb"}), ("both", {"bb", "a"})]:
        replay = Replay(priority=priority)
        drawn = replay.draw(fill(replay, lm, rows), 2, 0)["z"]
        assert set(lm.decode(drawn)) == expected


def test_the_fraction_is_a_schedule_and_every_observation_must_have_its_share(lm):
    replay = Replay(fraction=lambda step: 0.25 * step)
    seen = fill(replay, lm, {"a": -1.0, "b": -1.0, "ab": -1.0, "bb": -1.0, "ba": -1.0})
    assert [replay.available(seen, 8, step) for step in range(5)] == [0, 2, 4, 5, 5]
    assert replay.available(seen, 4, 4) == 3  # one particle at least is fresh


# What belongs together --------------------------------------------------------------------------------------------


def test_an_observation_is_recognised_in_any_batch_and_place():
    problem, replay = Problem(), Replay()
    both = problem.encode(["abc", "d"], ["cab", "ed"])
    one, other = problem.encode(["d"], ["ed"]), problem.encode(["abc"], ["cab"])
    swapped = problem.encode(["d", "abc", "d"], ["ed", "cab", "cab"])
    keys = [replay.observations(problem.model, problem.guide, a, {}, 1).keys for a in (both, one, other, swapped)]
    assert keys[0] == (*keys[2], *keys[1]) and keys[3][:2] == keys[0][::-1]
    assert keys[3][2] not in keys[0]  # a beginning of one and an ending of the other
    tasks = [replay.observations(problem.model, problem.guide, both, {}, 1, task=t).keys for t in (0, 1)]
    assert not set(tasks[0]) & set(tasks[1])


def test_keys_cost_no_token():
    problem = Problem()
    before = problem.lm.tokens_scored
    Replay().observations(problem.model, problem.guide, problem.args, {}, 1)
    assert problem.lm.tokens_scored == before


def test_a_key_of_ones_own():
    problem = Problem()
    replay = Replay(key=lambda x, y: ["one"] * len(x))
    keys = replay.observations(problem.model, problem.guide, problem.args, {}, 1).keys
    assert len(set(keys)) == 1
    with pytest.raises(ValueError, match="key"):
        Replay(key=lambda x, y: ["one"]).observations(problem.model, problem.guide, problem.args, {}, 1)


def test_the_observation_unseen_for_longest_is_forgotten():
    problem, replay = Problem(), Replay(max_observations=2)
    gflownet = problem.gflownet(replay=replay, num_particles=4)
    batches = [problem.encode([x], [y]) for x, y in [("a", "b"), ("b", "c"), ("c", "d")]]
    keys = [replay.observations(problem.model, problem.guide, b, {}, 1).keys[0] for b in batches]
    for i in (0, 1, 0, 2):
        gflownet.step(*batches[i])
    assert list(replay._stored) == [keys[0], keys[2]]


def test_several_sites_plates_and_masks_come_back_as_they_were(lm):
    """An ordinary latent, two texts and a plate that is not kept; masked texts do not tell values apart."""

    def model():
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.5])))
        with pyro.plate("data", 2):
            z = pyro.sample("z", Completion(lm, "a", max_tokens=2))
        with pyro.poutine.mask(mask=c == 1):
            w = pyro.sample("w", Completion(lm, "b", max_tokens=1))
        pyro.factor("f", 0.1 * (text.length(z).sum(-1, keepdim=True) + text.length(w)))

    pyro.set_rng_seed(0)
    replay = Replay(fraction=0.5, capacity=500)
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def guide():
        c = pyro.sample("c", dist.Categorical(logits=logits))
        with pyro.plate("data", 2):
            pyro.sample("z", Completion(lm, "a", max_tokens=2))
        with pyro.poutine.mask(mask=c == 1):
            pyro.sample("w", Completion(lm, "b", max_tokens=1))

    gflownet = GFlowNet(model, guide, optimizer=torch.optim.SGD([logits], lr=0.0), replay=replay, num_particles=16)
    for _ in range(6):
        gflownet.step()
    (entries,) = contents(replay)
    assert {t[-2] == -2 for t in entries if t[0] == 0} == {True}  # w is not there
    assert {t[-2] == -2 for t in entries if t[0] == 1} == {False}
    seen = replay.observations(model, guide, (), {}, 1)
    drawn = replay.draw(seen, 4, 0)
    assert {n: tuple(v.shape) for n, v in drawn.items()} == {"c": (4, 1), "z": (4, 2, 3), "w": (4, 1, 2)}
    before = dict(entries)
    at = {"nesting": 1, "particles": 4}
    held, target = (programs.trace(p, (), {}, programs.Substitute(drawn), **at) for p in (guide, model))
    replay.add(seen, drawn, log_density(target, seen.plates)[0], held)
    assert contents(replay)[0] == pytest.approx(before, abs=1e-9)


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"capacity": 0}, "capacity"),
        ({"fraction": 1.5}, "fraction"),
        ({"priority": "luck"}, "priority"),
        ({"temperature": 0.0}, "temperature"),
        ({"min_distance": 1.0}, "min_distance"),
        ({"max_observations": 0}, "max_observations"),
    ],
)
def test_bad_arguments_are_named(kwargs, name):
    with pytest.raises(ValueError, match=name):
        Replay(**kwargs)


def test_tables_have_no_prompt_and_are_told_apart_by_the_models(lm):
    found = PROBLEMS["one text"](lm)
    keys = Replay().observations(found.model, found.posterior(1.0), (), {}, 1).keys
    assert len(set(keys)) == 2
    logits = torch.zeros(len(texts_of(lm)))

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", Table(lm, texts_of(lm), logits))

    assert Replay().observations(found.model, guide, (), {}, 1).keys == keys
    assert isinstance(
        GFlowNet(found.model, guide, optimizer=torch.optim.SGD([logits], 0.1), exploration=OnPolicy()), GFlowNet
    )
