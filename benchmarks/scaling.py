"""How time and memory grow with every size of a problem, and how far a run is from the machine's limit.

    python -m benchmarks.scaling --out scaling.json
    python -m benchmarks.scaling --only vocabulary --tokenizer PATH    # the largest vocabulary is this tokenizer's
    python -m benchmarks.scaling --only particles --budget 2048        # a small token budget: memory stays as it is
    python -m benchmarks.scaling --checkpoint PATH --repetitions 1     # fewer and longer sizes, on a pretrained network

The problem is that of `benchmarks.step`: a latent text after a prompt, an observed one after both, on a randomly
initialised network unless there is a checkpoint. One size at a time grows; each cell is a process of its own, which
reports processor seconds of one thread, the tokens that went through the network, and its peak memory beyond what an
idle one has. *Growth* is the exponent k of size^k between the two largest sizes, where constant costs matter least: 1
is linear, 0 means that the size does not matter. The *share of peak* compares the matrix products' operations, as torch
counts them, with what one large matrix product reaches in the same process.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import pyro
import torch
import typer
from rich.console import Console
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer

from benchmarks.measuring import LORA, Checkpoint, Device, Dtype, Out, Place, introduce, operations, save
from benchmarks.paper.study import markdown
from benchmarks.sampling import language_model
from benchmarks.step import Task
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
PRETRAINED = {"particles": (16, 64), "latent tokens": (8, 32), "prompt tokens": (16, 500, 4000)}  # with 1 observation
SMALL = {"particles": 2, "latent tokens": 2, "prompt tokens": 2, "observations": 1}
RUNS = "importance", "SMC", "all prefixes, a step"
WIDTH, OBSERVED = 128, 8
REPETITIONS = 3


@dataclass(frozen=True)
class Network:
    """Which network: of a checkpoint, or a random one with a vocabulary of its own or a tokenizer's."""

    place: Place = Place()
    checkpoint: Path | None = None
    tokenizer: str | None = None
    budget: int = TOKEN_BUDGET

    def make(self, vocab: int) -> LanguageModel:
        if self.checkpoint is not None:
            lm = self.place.language_model(self.checkpoint)
        else:
            lm = language_model(WIDTH, vocab)
            self.place.put(lm.model)
        if self.tokenizer is not None:
            lm = LanguageModel(lm.model, AutoTokenizer.from_pretrained(self.tokenizer))
        lm.token_budget = self.budget  # its adapters' too
        return lm


def runs(lm: LanguageModel, size: dict[str, int]) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    guide = lm.with_adapter(LORA)
    task = Task(lm, guide, size["prompt tokens"], size["latent tokens"], OBSERVED, size["observations"])
    n = size["particles"]
    importance = Importance(task.model, num_particles=n, max_plate_nesting=1)
    optimizer = torch.optim.AdamW(guide.trainable_parameters(), lr=1e-5)
    trainer = GFlowNet(task.model, task.guide, SubTB(num_particles=n, max_plate_nesting=1), optimizer=optimizer)
    smc = SMC(task.model, num_particles=n, max_plate_nesting=1)
    return dict(zip(RUNS, (importance.run, smc.run, trainer.step), strict=True))


def alone() -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pyro.enable_validation(False)


def cell(name: str, size: dict[str, int], network: Network, repetitions: int) -> dict[str, Any]:
    """One cell, in a process of its own: the median of repetitions whose prompts are not known yet."""
    alone()
    lm = network.make(size["vocabulary"])
    if network.checkpoint is None:  # what a first run loads
        runs(Network().make(START["vocabulary"]), START)[name]()
    else:
        runs(lm, SMALL)[name]()
    run, taken = runs(lm, size)[name], []

    def repeat() -> None:
        for _ in range(repetitions):
            prompts(lm.network).forget()
            taken.append(network.place.seconds(run))

    before = lm.tokens_scored
    peak = network.place.peak_memory(repeat)
    return {
        "seconds": statistics.median(taken),
        "taken": taken,
        "tokens": (lm.tokens_scored - before) // repetitions,
        "MiB": peak / 2**20,
    }


def limit(network: Network, size: dict[str, int], names: Sequence[str], repetitions: int) -> dict[str, Any]:
    """Operations of one run over those of a large matrix product in the same time, and where the time goes."""
    alone()
    place = network.place
    peak, bandwidth = place.speeds(place.timed(place.limits(), REPETITIONS))
    found: dict[str, Any] = {"limits": (peak, bandwidth)}
    every = runs(network.make(size["vocabulary"]), size)
    for name in names:
        run = every[name]
        work = operations(run)  # and what a first run loads
        share = work / min(place.seconds(run) for _ in range(repetitions)) / peak
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
    out: Out = None,
    only: Annotated[list[str] | None, typer.Option(help="Some of the sizes.")] = None,
    run: Annotated[list[str] | None, typer.Option(help="Some of the runs.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Of a checkpoint: its vocabulary is the largest one.")] = None,
    repetitions: Annotated[int | None, typer.Option(help="Of each cell; default 3, of a checkpoint 1.")] = None,
    budget: Annotated[int, typer.Option(min=1, help="The networks' token budget.")] = TOKEN_BUDGET,
    checkpoint: Checkpoint = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Measure every cell and print the tables."""
    grown, start = dict(GROWN), dict(START)
    if checkpoint is not None:
        grown, start = dict(PRETRAINED), START | {"observations": 1}
    for name, value, known in (("--only", only, grown), ("--run", run, RUNS)):
        if unknown := set(value or ()) - set(known):
            raise typer.BadParameter(f"{sorted(unknown)} are none of {list(known)}", param_hint=name)
    if tokenizer is not None and checkpoint is None:
        grown["vocabulary"] = (*GROWN["vocabulary"][:-1], len(AutoTokenizer.from_pretrained(tokenizer)))
    repetitions = repetitions or (REPETITIONS if checkpoint is None else 1)
    network = Network(Place(device, dtype), checkpoint, budget=budget)
    names = run or (RUNS if checkpoint is None else RUNS[1:])
    measured, rows = [], []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in names:
            for axis in only or grown:
                cells = []
                for value in (sizes := grown[axis]):
                    real = tokenizer if axis == "vocabulary" and value == sizes[-1] else None
                    task = name, start | {axis: value}, replace(network, tokenizer=real), repetitions
                    cells.append(pool.submit(cell, *task).result())
                measured.append({"run": name, "size": axis, "values": sizes, "cells": cells})
                rows.append(row(name, axis, sizes, cells))
                print(rows[-1], file=sys.stderr)
        larger = start if checkpoint else start | {"particles": 64, "latent tokens": 16}
        found = pool.submit(limit, network, larger, names, repetitions).result()
    torch.set_num_threads(1)
    machine = introduce(network.place, [found.pop("limits")])
    print(f"One size at a time; the others are {start}. Token budget {budget:,}. Seconds: medians of {repetitions}.\n")
    print(markdown(("run", "size", "values", "seconds", "growth", "tokens", "growth", "peak MiB", "growth"), rows))
    Console(width=118).print_json(data=found)
    known = {"machine": machine, "checkpoint": checkpoint, "tokenizer": tokenizer, "budget": budget}
    save(out, **known, cells=measured, limit=found)


if __name__ == "__main__":
    typer.run(main)
