"""Two processes give what one gives: losses, parameters, metrics, checkpoints, posteriors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import distributed_script as script
import pytest
import torch
from forked import forked
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT
from safetensors.torch import load_file

from lmppl import randomness
from lmppl.inference import Importance, Sharded
from lmppl.inference.processes.distributed import world
from lmppl.randomness import Part

VERDICT = ("held_out_missed", "held_out_lacking", "held_out_khat")  # of one process alone
NAMES = [check.__name__ for check in script.CHECKS]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[list[dict[str, Any]], Path]:
    """The figures of both of two processes, and the directory they wrote to."""
    out = tmp_path_factory.mktemp("two")
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    as_torchrun = [common | {"TORCHELASTIC_RUN_ID": "two", "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    for run in forked(partial(script.main, out), as_torchrun):
        assert run.returncode == 0, run.stderr[:10000] + run.stderr[-2000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)], out


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two nested results differ by more than 1e-5; tokens scored, packing and verdicts are no part of them."""
    if isinstance(a, dict):
        a, b = ({k: v for k, v in x.items() if k not in VERDICT} for x in (a, b))
        return [f"{where}: {a.keys() ^ b.keys()}"] * (a.keys() != b.keys()) + [
            d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{where}.{k}")
        ]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)}"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}.{i}")]
    if isinstance(a, float):
        return [] if a == b or abs(a - b) < 1e-5 else [f"{where}: {a} and {b}"]
    return [] if a == b else [f"{where}: {a} and {b}"]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_what_one_gives(name, two, tmp_path):
    both, _ = two
    assert [results["processes"] for results in both] == [2, 2]
    one = getattr(script, name)(tmp_path)
    for results in both:
        assert differences(one, results[name]) == []
    if "history" in one:
        first, *_, last = one["history"]
        assert abs(first["loss"] - last["loss"]) > 1e-3  # they are not alike because nothing happened


def test_the_first_process_alone_writes(two, tmp_path):
    both, out = two
    expected = script.gflownet(tmp_path)
    for file in ("run.jsonl", "resumed.jsonl"):
        lines = [json.loads(line) for line in (out / file).read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(len(lines))) and len(lines) in (4, 5)
    tensors, one = (load_file(where / "whole" / "training.safetensors") for where in (out, tmp_path))
    assert tensors.keys() == one.keys() and any(key.startswith("own.replay") for key in one)
    assert all(torch.allclose(one[key], tensors[key], atol=1e-5, equal_nan=True) for key in one)
    assert len(expected["history"]) == len(both[0]["gflownet"]["history"])


def test_a_run_begun_on_two_processes_goes_on_on_one(two):
    both, out = two
    task = script.Task()
    state = json.loads((out / "resumed" / "training.json").read_text())
    assert state["step"] == 5
    trainer = task.gflownet(replay=script.Replay(fraction=0.5))
    assert trainer.fit([task.args], 5, checkpoint=out / "resumed", **script.FIT) == []
    parameters = script.found([], task.q.trainable_parameters())["parameters"]
    assert differences(parameters, both[0]["resumed"]["parameters"]) == []
    uninterrupted = script.Task()
    whole = uninterrupted.gflownet(replay=script.Replay(fraction=0.5))
    history = whole.fit([uninterrupted.args], 5, **script.FIT)
    assert differences(history[2:], both[0]["resumed"]["history"]) == []
    assert differences(script.found([], uninterrupted.q.trainable_parameters())["parameters"], parameters) == []


def test_draws_that_are_not_those_of_one_process_are_as_good(two):
    """Means of unbiased estimates, relative to the truth, within 5 of their standard errors of 1."""
    (results, other), _ = two
    found = results["otherwise"]
    assert found == other["otherwise"]
    for mean, error in (("mean", "error"), ("smc", "smc_error")):
        z = (torch.tensor(found[mean]) - 1) / torch.tensor(found[error])
        assert len(z) == 5 and float(z.abs().max()) < 5 and max(found[error]) < 0.15
    # One observation on both processes: two independent draws agree with probability 0.34, not always.
    assert abs(found["agreement"] - 0.34) < 5 * (0.34 * 0.66 / 3000) ** 0.5


def test_what_cannot_be_shared_out_is_refused(two):
    both, _ = two
    expected = {
        "few": "1 observations are fewer than 2 processes",
        "lengths": r"these have lengths [3, 5]",
        "nothing": r"these have lengths []",
        "subsampled": "'data' is subsampled",
        "joint": "its leftmost plate around every site has size () for 5 observations",
        "shared": "batches: model and guide read other texts",
        "stranger": "optimizer: it holds 1 parameter (a tensor of shape (5,)), but none of the guide's own",
        "algorithm": "algorithm: expected one with .model and .run, got Parameter",
        "zero": "at data 4: the observation or a factor",
    }
    for results in both:
        assert results["refused"].keys() == expected.keys()
        for name, message in expected.items():
            assert message in results["refused"][name]


@given(
    total=st.integers(1, 9),
    size=st.integers(1, 4),
    left=st.integers(1, 3),
    middle=st.integers(1, 3),
    right=st.integers(0, 2),
)
def test_the_parts_of_a_batch_draw_what_the_whole_draws(total, size, left, middle, right):
    """Parts along the plate at -2 of (left, total, middle, *right axes), whatever their number, and in sequence."""
    size = min(size, total)
    event = (2,) * right
    torch.manual_seed(1)
    whole = [torch.rand(left, total, middle, *event), torch.rand(3), torch.rand(2, total, dtype=torch.float64)]
    parts = []
    for rank in range(size):
        start, stop = rank * total // size, (rank + 1) * total // size
        torch.manual_seed(1)
        with randomness.partly(Part(start, stop, total, -2, rank)):
            own = [randomness.uniform((left, stop - start, middle, *event), right=right)]
            own.append(randomness.uniform((3,)))  # what all observations share
            own.append(randomness.uniform((2, stop - start), axis=1, dtype=torch.float64))
        parts.append(own)
    assert torch.equal(torch.cat([p[0] for p in parts], 1), whole[0])
    assert all(torch.equal(p[1], whole[1]) for p in parts)
    assert torch.equal(torch.cat([p[2] for p in parts], 1), whole[2])


def test_apart_draws_differ_and_leave_the_common_stream_alone():
    found, after = [], []
    for rank, count in ((0, 3), (1, 5)):
        torch.manual_seed(1)
        with randomness.partly(Part(0, 1, 2, -1, rank)):
            with randomness.apart():
                found.append(torch.rand(count)[:3])
            after.append(torch.rand(2))
    assert not torch.equal(*found) and torch.equal(*after)


def test_on_one_process_nothing_is_shared_out():
    assert world() == (0, 1)
    task = script.Task()
    torch.manual_seed(0)
    plain = Importance(task.model, task.guide, num_particles=5).run(*task.args)
    torch.manual_seed(0)
    alone = Sharded(Importance(task.model, task.guide, num_particles=5)).run(*task.args)
    assert torch.equal(plain.log_weights, alone.log_weights) and torch.equal(plain.samples["z"], alone.samples["z"])


CONFIGURATIONS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda p: p.stem)
def test_accelerate_reads_the_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 8 * config.num_machines and config.distributed_type.value == "MULTI_GPU"


@pytest.mark.slow
def test_the_example_gives_the_same_on_two_processes_started_by_accelerate():
    script_, found = "examples/several_processes.py", []
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGURATIONS[0]), "--num_processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for command in ([script_], [*launch, script_]):
        run = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        assert run.returncode == 0, run.stderr[-5000:]
        found.append([line for line in run.stdout.splitlines() if "log evidence" in line])
    (one,), (two,) = found
    assert one.startswith("1 processes") and two == one.replace("1 processes", "2 processes")
