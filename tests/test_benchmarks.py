"""What the benchmarks count, and that each runs on a checkpoint."""

from __future__ import annotations

import json
from itertools import count

import peft
import pytest
import torch
import typer

from benchmarks import default_step, measuring, passes, sampling, step
from benchmarks.measuring import Goal, Matrices, Place, faster, operations, spread

WIDTH, VOCAB = 32, 64


@pytest.fixture
def pair():
    lm = sampling.language_model(WIDTH, VOCAB)
    return lm.with_adapter(peft.LoraConfig(r=16, target_modules="all-linear")), sampling.network(WIDTH, VOCAB)


def a_token(run, T=8):
    """Of the operations a T + c T^2 of passes over T tokens the first coefficient: all but attention."""
    once, twice = (operations(lambda n=n: run(torch.ones(1, n, dtype=torch.long))) for n in (T, 2 * T))
    return (4 * once - twice) / (2 * T)


def test_matrices_are_those_that_every_token_goes_through(pair):
    guide, plain = pair
    matrices = Matrices.of(plain, guide)
    assert matrices.layers == 4 * 12 * WIDTH**2 and matrices.output == VOCAB * WIDTH
    assert a_token(lambda ids: plain(ids, use_cache=False)) == matrices.forward(1)
    assert a_token(lambda ids: guide(ids, use_cache=False)) == matrices.forward(1, adapter=True)


def test_a_gradient_costs_frozen_matrices_one_more_product_and_an_adapters_two(pair):
    guide, plain = pair

    def gradient(ids):
        return torch.autograd.grad(guide(ids, use_cache=False).logits.sum(), guide.trainable_parameters())

    unasked = 2 * (3 * WIDTH * WIDTH + 16 * WIDTH)  # the gradient of the embeddings, below the first matrices
    assert a_token(gradient) == Matrices.of(plain, guide).training(1) - unasked


def test_contestants_take_turns_after_a_first_round():
    clock, ran = count(), []
    runs = {name: lambda name=name: ran.append((name, next(clock))) for name in "ab"}
    seconds = Place().timed(runs, 2)
    assert ran == [("a", 0), ("b", 1), ("a", 2), ("b", 3), ("a", 4), ("b", 5)]
    assert [len(s) for s in seconds.values()] == [2, 2]


def test_ratios_are_taken_within_each_repetition():
    ratios = faster({"generate": [2.0, 4.0, 9.0], "ours": [1.0, 1.0, 3.0]}, "generate", "ours")
    assert ratios == [2.0, 4.0, 3.0]
    assert spread(ratios) == "3.00 (2.00-4.00)"


def test_the_limits_are_operations_and_bytes_a_second():
    seconds = {"product": [2.0, 1.0, 9.0], "reading": [4.0], "ours": [1.0]}
    assert Place(dtype="bfloat16").speeds(seconds) == (2048**3, 8192**2 * 2 / 4)
    assert seconds == {"ours": [1.0]}


def test_the_peak_is_what_a_run_held_at_once_though_it_is_free_again():
    size = 2**28  # bytes

    def run():
        for _ in range(2):  # one after the other
            torch.ones(size, dtype=torch.uint8)

    assert 0.95 * size < Place().peak_memory(run) < 1.2 * size


def test_a_goal_is_a_bound_from_below_or_from_above():
    assert Goal("share", 0.6, 0.6).met and not Goal("share", 0.6, 0.59).met
    assert Goal("seconds", 40, 40, at_most=True).met and not Goal("seconds", 40, 41, at_most=True).met


@pytest.mark.parametrize(
    "benchmark, small",
    [
        (sampling, {"tokens": 3, "particles": [2], "prompt": [4], "repetitions": 1}),
        (passes, {"scored": (2, 3), "trained": (2, 3), "prompt": 2, "repetitions": 1}),
        (step, {"tokens": 2, "observed": 2, "particles": 2, "prompt": [3], "repetitions": 1}),
        (default_step, {"prompt": 2, "tokens": 2, "observed": 2, "batch": 2, "particles": 2, "repetitions": 1}),
    ],
)
def test_a_benchmark_runs_on_a_checkpoint(benchmark, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "PRODUCT", 64)
    monkeypatch.setattr(measuring, "READING", 64)
    sampling.language_model(WIDTH, VOCAB).save_pretrained(tmp_path / "lm")
    try:
        benchmark.main(out=tmp_path / "out.json", checkpoint=tmp_path / "lm", **small)
    except typer.Exit as missed:  # a share of peak, for instance
        assert missed.exit_code == 1
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["machine"]["processor"] and found["machine"]["operations a second"] > 0
    assert "GFLOP/s" in capsys.readouterr().out
