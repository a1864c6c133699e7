"""Successive halving of the settings for pretrained networks: who goes on, for how long, and what is kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from benchmarks.pretrained_recipes import (
    CANDIDATES,
    EMBEDDED,
    FIRST,
    Candidate,
    Setting,
    halve,
    make,
    markdown,
    rate_at,
    run,
    score,
    train,
)


def test_candidates_are_named_by_what_they_are():
    assert len({c.name for c in CANDIDATES}) == len(CANDIDATES) and FIRST in CANDIDATES
    for candidate in CANDIDATES:
        assert Candidate.of(candidate.name) == candidate
        recipe = candidate.recipe()
        assert (recipe.observations, recipe.particles) == (candidate.observations, candidate.particles)
        assert recipe.upper_layers == candidate.upper and recipe.adapter["r"] == candidate.rank


def test_the_rate_is_a_function_of_the_time():
    assert [rate_at(t) for t in (0.0, 0.05, 0.1, 0.55, 1.0, 2.0)] == pytest.approx([0, 0.5, 1, 0.5, 0, 0])


def test_the_better_half_goes_on_and_a_candidate_without_a_figure_does_not(tmp_path):
    candidates = [replace(FIRST, rank=r) for r in range(1, 8)]
    sd = {c.name: float(c.rank) for c in candidates} | {candidates[0].name: None}  # the first has no finite draw
    asked = []

    def runs(rung, left):
        asked.append([c.rank for c in left])
        found = {c.name: [{"sd_u": sd[c.name], "log_z": -1.0, "ess": 0.5, "steps": 10}] * 2 for c in left}
        return found

    rungs = halve(candidates, 9, runs)
    assert asked == [[1, 2, 3, 4, 5, 6, 7], [2, 3, 4, 5], [2, 3], [2]]
    assert [c.rank for c, _ in rungs[0]] == [2, 3, 4, 5, 6, 7, 1]
    assert score([{"sd_u": 2.0}, {"sd_u": 8.0}]) == 4.0 and score([{"sd_u": 2.0}, {"sd_u": None}]) == math.inf
    setting = Setting("lm", None, ("continuation", "infilling"), 10.0, 8, 32, 0, tmp_path)
    page = markdown(rungs, setting)
    assert "Rung 3: 40 processor minutes" in page and page.count(f"| {candidates[1].name} |") == 4
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1


def test_a_run_lasts_as_long_as_it_is_told_and_is_kept(tmp_path):
    candidate = replace(FIRST, rank=2, observations=2, particles=4, upper=0.5)
    now = iter(range(1000))
    found = train(make("continuation", EMBEDDED, None, candidate, 0), candidate, 12.0, 0, lambda: next(now))
    assert found["steps"] == 6 and found["tokens"] > 0  # the clock is asked twice a step: whether it ends, and the rate
    setting = Setting(EMBEDDED, None, ("continuation",), 1e-4, 2, 4, 0, tmp_path)
    found = run(setting, 1, "continuation", candidate)
    (path,) = (tmp_path / EMBEDDED).iterdir()
    assert path.name == f"continuation, 0.0002 minutes, {candidate.name}.json"
    assert found["sd_u"] > 0 and found["steps"] >= 1 and found["candidate"] == candidate.name
    path.write_text(json.dumps({"sd_u": 3.0}))
    assert run(setting, 1, "continuation", candidate) == {"sd_u": 3.0}
