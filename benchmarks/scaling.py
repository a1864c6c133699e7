"""How time and memory grow with every size of a problem, and how far a run is from the machine's limit.

    python -m benchmarks.scaling --out scaling.json

The problem is that of `benchmarks.step`: a latent text after a prompt, an observed one after both, on a randomly
initialised network. One size at a time grows; each cell is a process of its own, which reports processor seconds of one
thread, the tokens that went through the network, and its peak memory beyond what an idle one has. *Growth* is the slope
of log time against log size: 1 is linear, 0 means that the size does not matter. The *share of peak* compares the
matrix products' operations, as torch counts them, with what one large matrix product reaches in the same process.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import peft
import pyro
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sampling import language_model
from benchmarks.step import Task
from lmppl.engine.prompts import prompts
from lmppl.inference import GFlowNet, Importance, SubTB

START = {"particles": 16, "latent tokens": 8, "prompt tokens": 16, "vocabulary": 2048, "observations": 2}
GROWN = {
    "particles": (16, 64, 256, 1024),
    "latent tokens": (8, 16, 32, 64),
    "prompt tokens": (16, 64, 256),
    "vocabulary": (2048, 8192, 50257),
    "observations": (2, 8, 32),
}
WIDTH, OBSERVED = 128, 8
REPETITIONS = 3
PEAK = 2048  # width of the large matrix product


def runs(size: dict[str, int]) -> dict[str, tuple[Any, Callable[[], Any]]]:
    """What is measured, by name, each with its network."""
    torch.manual_seed(0)
    lm = language_model(WIDTH, size["vocabulary"])
    guide = lm.with_adapter(peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    task = Task(lm, guide, size["prompt tokens"], size["latent tokens"], OBSERVED, size["observations"])
    n = size["particles"]
    importance = Importance(task.model, num_particles=n, max_plate_nesting=1)
    optimizer = torch.optim.AdamW(guide.trainable_parameters(), lr=1e-5)
    trainer = GFlowNet(task.model, task.guide, SubTB(num_particles=n, max_plate_nesting=1), optimizer=optimizer)
    return {"importance": (lm.network, importance.run), "all prefixes, a step": (lm.network, trainer.step)}


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def cell(name: str, size: dict[str, int]) -> dict[str, Any]:
    """One cell, in a process of its own: the median of repetitions whose prompts are not known yet."""
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    network, run = runs(size)[name]
    runs(START)[name][1]()  # what a first run loads
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = []
    for _ in range(REPETITIONS):
        prompts(network).forget()
        before = network.tokens_scored
        taken.append(seconds(run))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle
    return {"seconds": sorted(taken)[REPETITIONS // 2], "tokens": network.tokens_scored - before, "MiB": peak / 1024}


def limit() -> dict[str, Any]:
    """Operations of one run over those of a large matrix product in the same time, and where the time goes."""
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    a = torch.randn(PEAK, PEAK)
    peak = 2 * PEAK**3 / min(seconds(lambda: a @ a) for _ in range(REPETITIONS))
    found: dict[str, Any] = {"peak GFLOP/s": peak / 1e9}
    for name, (_, run) in runs(START | {"particles": 64, "latent tokens": 16}).items():
        run()
        with FlopCounterMode(display=False) as counter:
            run()
        share = counter.get_total_flops() / min(seconds(run) for _ in range(REPETITIONS)) / peak
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            run()
        events = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
        total = sum(e.self_cpu_time_total for e in events)
        found[name] = {
            "share of peak": share,
            "where": [(e.key.removeprefix("aten::"), round(e.self_cpu_time_total / total, 3)) for e in events[:6]],
        }
    return found


def growth(points: list[tuple[int, float]]) -> float:
    """The slope of log y against log x between the last two points, where constant costs matter least."""
    (x0, y0), (x1, y1) = points[-2:]
    return math.log(y1 / y0) / math.log(x1 / x0)


def main(
    out: Annotated[Path | None, typer.Option(help="Write the measurements to this JSON file.")] = None,
    only: Annotated[str | None, typer.Option(help="One of the sizes.")] = None,
) -> None:
    """Measure every cell and print the tables."""
    console, measured = Console(width=118), []
    table = Table(title=f"one size at a time; the others are {START}")
    for column in ("run", "size", "values", "seconds", "growth", "tokens through the network", "peak MiB"):
        table.add_column(column)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in ("importance", "all prefixes, a step"):
            for axis, values in GROWN.items():
                if only not in (None, axis):
                    continue
                cells = [pool.submit(cell, name, START | {axis: v}).result() for v in values]
                measured.append({"run": name, "size": axis, "values": values, "cells": cells})
                slope = growth([(v, c["seconds"]) for v, c in zip(values, cells, strict=True)])
                shown = [", ".join(f"{c[k]:{f}}" for c in cells) for k, f in (("seconds", ".2f"), ("tokens", ",d"))]
                memory = ", ".join(f"{c['MiB']:.0f}" for c in cells)
                table.add_row(name, axis, ", ".join(map(str, values)), shown[0], f"{slope:.2f}", shown[1], memory)
        found = pool.submit(limit).result()
    console.print(table)
    console.print_json(data=found)
    if out is not None:
        out.write_text(json.dumps({"torch": torch.__version__, "cells": measured, "limit": found}, indent=1))


if __name__ == "__main__":
    typer.run(main)
