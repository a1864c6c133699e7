"""Shared parts of the benchmarks: clocks, the machine and its limits, networks of a checkpoint, goals and tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import peft
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.paper.study import markdown
from lmppl import LanguageModel, files

# Options that they share.
Out = Annotated[Path | None, typer.Option(help="Write the measurements to this JSON file.")]
Checkpoint = Annotated[Path | None, typer.Option(help="A pretrained network; default: a random one.", exists=True)]
Device = Annotated[str, typer.Option(help="cpu, or cuda: then wall-clock seconds are counted.")]
Dtype = Annotated[str, typer.Option(help="The networks' precision, for instance bfloat16.")]
InMarkdown = Annotated[bool, typer.Option("--markdown", help="Print tables in Markdown.")]

PRODUCT, READING = 2048, 8192  # widths of the square matrices that the machine's limits are measured with
LORA = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


@dataclass(frozen=True)
class Place:
    """Where the networks are, and in which precision."""

    device: str = "cpu"
    dtype: str = "float32"

    @property
    def options(self) -> dict[str, Any]:
        """For a new tensor."""
        return {"device": self.device, "dtype": getattr(torch, self.dtype)}

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    def now(self) -> float:
        """Seconds: the processor's, or where another device works those on the wall, once its work is done."""
        if self.on_cpu:
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, run: Callable[[], Any]) -> float:
        start = self.now()
        run()
        return self.now() - start

    def timed(self, runs: dict[str, Callable[[], Any]], repetitions: int, warm: bool = True) -> dict[str, list[float]]:
        """Seconds of every run of each contestant; they take turns, so that a busy machine slows all alike.

        ``warm``: all run once before anything is counted.
        """
        for run in runs.values() if warm else ():
            run()
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repetitions):
            for name, run in runs.items():
                taken[name].append(self.seconds(run))
        return taken

    def peak_memory(self, run: Callable[[], Any]) -> int:
        """Bytes that a run needs at most, above what there is before it.

        In main memory that is what the process holds, so that room left free by earlier work is not seen: measure in a
        fresh process.
        """
        if not self.on_cpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            run()
            return torch.cuda.max_memory_allocated(self.device) - before
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        before = status("VmRSS")
        run()
        return status("VmHWM") - before

    def put(self, network: Any) -> Any:
        return network.to(**self.options)

    def language_model(self, checkpoint: Path) -> LanguageModel:
        transformers.logging.disable_progress_bar()
        return LanguageModel.from_pretrained(checkpoint, **self.options)

    def plain(self, checkpoint: Path) -> Any:
        """The network as transformers makes it."""
        transformers.logging.disable_progress_bar()
        made = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=self.options["dtype"])
        return self.put(made).eval()

    def limits(self) -> dict[str, Callable[[], Any]]:
        """What is timed between the contestants, for `speeds`: a large matrix product, and one with a single vector."""
        a, b = (torch.randn(width, width, **self.options) for width in (PRODUCT, READING))
        return {"product": lambda: a @ a, "reading": lambda: b @ b[0]}

    def speeds(self, seconds: dict[str, list[float]]) -> tuple[float, float]:
        """What the machine reaches at most, operations and bytes a second, of medians; taken out of ``seconds``."""
        product, reading = (statistics.median(seconds.pop(name)) for name in ("product", "reading"))
        return 2 * PRODUCT**3 / product, READING**2 * self.options["dtype"].itemsize / reading

    def machine(self) -> dict[str, Any]:
        """What the figures were measured on, and with."""
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
        gpu = {} if self.on_cpu else {"gpu": torch.cuda.get_device_name(self.device)}
        return {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            **gpu,
            **asdict(self),
            **versions,
        }


def processor() -> str:
    """The model's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def status(key: str) -> int:
    """Bytes, from what the system says of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise KeyError(key)


# Work -----------------------------------------------------------------------------------------------------------------


def operations(run: Callable[[], Any]) -> int:
    """Of a run's matrix products, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class Matrices(NamedTuple):
    """Numbers in the matrices that a token goes through: of the layers, the output layer, and an adapter."""

    layers: int
    output: int
    adapter: int

    @classmethod
    def of(cls, plain: Any, guide: LanguageModel) -> Matrices:
        """Those of a network as transformers makes it, and of a view of it."""
        output = plain.get_output_embeddings().weight
        looked_up = {id(m.weight) for m in plain.modules() if isinstance(m, nn.Embedding)} | {id(output)}
        layers = sum(p.numel() for p in plain.parameters() if p.dim() == 2 and id(p) not in looked_up)
        return cls(layers, output.numel(), sum(p.numel() for p in guide.trainable_parameters() if p.dim() == 2))

    def forward(self, tokens: int, adapter: bool = False) -> int:
        """Operations of reading tokens and saying what follows each: two a number, attention left out."""
        return 2 * tokens * (self.layers + self.output + adapter * self.adapter)

    def training(self, tokens: int) -> int:
        """Of a pass under the adapter and its gradient: frozen matrices once each way, the adapter's three times."""
        return tokens * (4 * (self.layers + self.output) + 6 * self.adapter)


# What was found -------------------------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """What was asked, and what was reached."""

    what: str
    asked: float
    reached: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.reached <= self.asked if self.at_most else self.reached >= self.asked


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median and, in brackets, range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def faster(seconds: dict[str, list[float]], base: str, name: str) -> list[float]:
    """How many times as fast as the base, in each repetition."""
    return [b / s for b, s in zip(seconds[base], seconds[name], strict=True)]


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], in_markdown: bool = False) -> None:
    """Print a table."""
    if in_markdown:
        print(f"{title}\n\n{markdown(header, rows)}")
        return
    table = Table(title=title, title_justify="left")
    for column in header:
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=118).print(table)


def introduce(place: Place, limits: Sequence[tuple[float, float]], weights: int = 0) -> dict[str, Any]:
    """Print the machine and its limits, medians of what `Place.speeds` found; returns them.

    ``weights``: bytes, which every decoding step has to read.
    """
    named = place.machine()
    print(", ".join(f"{key} {value}" for key, value in named.items()))
    peak, bandwidth = (statistics.median(found) for found in zip(*limits, strict=True))
    print(f"a large matrix product: {peak / 1e9:,.0f} GFLOP/s; reading a large matrix: {bandwidth / 1e9:,.1f} GB/s")
    if weights:
        print(f"{weights / 1e6:,.0f} MB of weights: a decoding step takes {weights / bandwidth:.4f} s at least")
    return named | {"operations a second": peak, "bytes a second": bandwidth}


def save(out: Path | None, **found: Any) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write(out, json.dumps(found, indent=1, default=str).encode())


def judge(goals: Iterable[Goal], in_markdown: bool = False) -> None:
    """Print what was asked beside what was reached; exit with 1 where something was missed."""
    goals = list(goals)
    rows = [
        (g.what, f"{'at most ' * g.at_most}{g.asked:.3g}", f"{g.reached:.3g}", "missed" * (not g.met)) for g in goals
    ]
    if rows:
        show("Goals", ("goal", "asked", "reached", ""), rows, in_markdown)
    if not all(g.met for g in goals):
        raise typer.Exit(1)
