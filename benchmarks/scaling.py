"""How time and memory grow with every size of a problem, and how far a run is from the machine's limit.

    python -m benchmarks.scaling --out scaling.json
    python -m benchmarks.scaling --only vocabulary --tokenizer PATH    # the largest vocabulary is this tokenizer's
    python -m benchmarks.scaling --only particles --budget 2048        # a small token budget: memory stays as it is

The problem is that of `benchmarks.step`: a latent text after a prompt, an observed one after both, on a randomly
initialised network. One size at a time grows; each cell is a process of its own, which reports processor seconds of one
thread, the tokens that went through the network, and its peak memory beyond what an idle one has. *Growth* is the
exponent k of size^k between the two largest sizes, where constant costs matter least: 1 is linear, 0 means that the
size does not matter. The *share of peak* compares the matrix products' operations, as torch counts them, with what one
large matrix product reaches in the same process.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import peft
import pyro
import torch
import typer
from rich.console import Console
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer

from benchmarks.paper.study import markdown
from benchmarks.sampling import language_model
from benchmarks.step import Task, operations, product
from lmppl import LanguageModel
from lmppl.engine.prompts import prompts
from lmppl.inference import SMC, GFlowNet, Importance, SubTB
from lmppl.language_model import TOKEN_BUDGET

START = {"particles": 16, "latent tokens": 8, "prompt tokens": 16, "vocabulary": 2048, "observations": 2}
GROWN = {
    "particles": (16, 64, 256, 1024),
    "latent tokens": (8, 16, 32, 64),
    "prompt tokens": (16, 64, 224),
    "vocabulary": (2048, 8192, 50257),
    "observations": (2, 8, 32, 128),
}
RUNS = "importance", "SMC", "all prefixes, a step"
WIDTH, OBSERVED = 128, 8
REPETITIONS = 3


def runs(
    size: dict[str, int], tokenizer: str | None = None, budget: int = TOKEN_BUDGET
) -> dict[str, tuple[Any, Callable[[], Any]]]:
    """What is measured, by name, each with its network."""
    torch.manual_seed(0)
    lm = language_model(WIDTH, size["vocabulary"])
    if tokenizer is not None:
        lm = LanguageModel(lm.model, AutoTokenizer.from_pretrained(tokenizer))
    lm.token_budget = budget  # its adapters' too
    guide = lm.with_adapter(peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    task = Task(lm, guide, size["prompt tokens"], size["latent tokens"], OBSERVED, size["observations"])
    n = size["particles"]
    importance = Importance(task.model, num_particles=n, max_plate_nesting=1)
    optimizer = torch.optim.AdamW(guide.trainable_parameters(), lr=1e-5)
    trainer = GFlowNet(task.model, task.guide, SubTB(num_particles=n, max_plate_nesting=1), optimizer=optimizer)
    smc = SMC(task.model, num_particles=n, max_plate_nesting=1)
    return {name: (lm.network, run) for name, run in zip(RUNS, (importance.run, smc.run, trainer.step), strict=True)}


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def cell(name: str, size: dict[str, int], tokenizer: str | None, repetitions: int, budget: int) -> dict[str, Any]:
    """One cell, in a process of its own: the median of repetitions whose prompts are not known yet."""
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    network, run = runs(size, tokenizer, budget)[name]
    runs(START)[name][1]()  # what a first run loads
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = []
    for _ in range(repetitions):
        prompts(network).forget()
        before = network.tokens_scored
        taken.append(seconds(run))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle
    return {
        "seconds": statistics.median(taken),
        "taken": taken,
        "tokens": network.tokens_scored - before,
        "MiB": peak / 1024,
    }


def limit() -> dict[str, Any]:
    """Operations of one run over those of a large matrix product in the same time, and where the time goes."""
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    large, multiply = product()
    most = large / min(seconds(multiply) for _ in range(REPETITIONS))
    found: dict[str, Any] = {"peak GFLOP/s": most / 1e9}
    for name, (_, run) in runs(START | {"particles": 64, "latent tokens": 16}).items():
        run()
        share = operations(run) / min(seconds(run) for _ in range(REPETITIONS)) / most
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            run()
        events = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
        total = sum(e.self_cpu_time_total for e in events)
        found[name] = {
            "share of peak": share,
            "where": [(e.key.removeprefix("aten::"), round(e.self_cpu_time_total / total, 3)) for e in events[:6]],
        }
    return found


def growth(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log y against log x between the last two points; NaN where one is nothing, as memory may be."""
    if min(values[-2:]) <= 0:
        return math.nan
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def row(name: str, axis: str, sizes: Sequence[int], cells: list[dict[str, Any]]) -> list[str]:
    """Of one run and size: the figures in order of size, and how each grows."""
    shown = []
    for key, form in (("seconds", ".2f"), ("tokens", ",d"), ("MiB", ".0f")):
        values = [c[key] for c in cells]
        shown += ["  ".join(f"{v:{form}}" for v in values), f"{growth(sizes, values):.1f}"]
    return [name, axis, "  ".join(f"{v:,}" for v in sizes), *shown]


def main(
    out: Annotated[Path | None, typer.Option(help="Write the measurements to this JSON file.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Some of the sizes.")] = None,
    run: Annotated[list[str] | None, typer.Option(help="Some of the runs.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Of a checkpoint: its vocabulary is the largest one.")] = None,
    repetitions: Annotated[int, typer.Option(help="Timed repetitions of each cell.")] = REPETITIONS,
    budget: Annotated[int, typer.Option(min=1, help="The networks' token budget.")] = TOKEN_BUDGET,
) -> None:
    """Measure every cell and print the tables."""
    for name, value, known in (("--only", only, GROWN), ("--run", run, RUNS)):
        if unknown := set(value or ()) - set(known):
            raise typer.BadParameter(f"{sorted(unknown)} are none of {list(known)}", param_hint=name)
    grown = dict(GROWN)
    if tokenizer is not None:
        grown["vocabulary"] = (*GROWN["vocabulary"][:-1], len(AutoTokenizer.from_pretrained(tokenizer)))
    measured, rows = [], []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in run or RUNS:
            for axis in only or grown:
                sizes = grown[axis]
                real = {sizes[-1]: tokenizer} if axis == "vocabulary" else {}
                cells = [
                    pool.submit(cell, name, START | {axis: v}, real.get(v), repetitions, budget).result() for v in sizes
                ]
                measured.append({"run": name, "size": axis, "values": sizes, "cells": cells})
                rows.append(row(name, axis, sizes, cells))
                print(rows[-1], file=sys.stderr)
        found = pool.submit(limit).result()
    print(f"One size at a time; the others are {START}. Token budget {budget:,}. Seconds: medians of {repetitions}.\n")
    print(markdown(("run", "size", "values", "seconds", "growth", "tokens", "growth", "peak MiB", "growth"), rows))
    Console(width=118).print_json(data=found)
    if out is not None:
        versions = {"torch": torch.__version__, "tokenizer": tokenizer, "budget": budget}
        out.write_text(json.dumps({**versions, "cells": measured, "limit": found}, indent=1))


if __name__ == "__main__":
    typer.run(main)
