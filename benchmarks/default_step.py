"""The cost of a GFlowNet's training step with default settings: 8 observations x 16 particles, default objective.

    python -m benchmarks.default_step --out default_step.json
    python -m benchmarks.default_step --checkpoint PATH    # a pretrained network instead of a random one

The problem is that of `benchmarks.step`. No keys or values of a prompt are cached before, as in training, where every
batch is new.  Figures: seconds of one thread, tokens that the network reads, and peak memory above that of the loaded
network.
"""

from __future__ import annotations

import statistics
from typing import Annotated

import pyro
import torch
import typer

from benchmarks.measuring import (
    LORA,
    Checkpoint,
    Device,
    Dtype,
    Goal,
    InMarkdown,
    Out,
    Place,
    introduce,
    judge,
    save,
    show,
    spread,
)
from benchmarks.sampling import networks
from benchmarks.step import Task
from lmppl.engine.prompts import prompts
from lmppl.inference import GFlowNet

SECONDS, GIGABYTES = 40.0, 1.5  # at most, on a pretrained network


def main(
    out: Out = None,
    width: Annotated[int, typer.Option(help="Width of the random network.")] = 128,
    vocab: Annotated[int, typer.Option(help="Vocabulary of the random network.")] = 2048,
    prompt: Annotated[int, typer.Option(help="Length of the prompt.")] = 20,
    tokens: Annotated[int, typer.Option(help="Most latent tokens.")] = 16,
    observed: Annotated[int, typer.Option(help="Observed tokens.")] = 10,
    batch: Annotated[int, typer.Option(help="Observations a step.")] = 8,
    particles: Annotated[int, typer.Option(help="Samples of each.")] = 16,
    repetitions: Annotated[int, typer.Option(help="Timed steps.")] = 2,
    checkpoint: Checkpoint = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    in_markdown: InMarkdown = False,
) -> None:
    """Time steps and print what they need; exit with 1 where a pretrained network needs more than is asked."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pyro.enable_validation(False)
    place = Place(device, dtype)
    ((name, make, _),) = networks(place, checkpoint, [width], vocab)
    lm = make()
    guide = lm.with_adapter(LORA)

    def trainer(*sizes: int, num_particles: int) -> GFlowNet:
        task = Task(lm, guide, *sizes)
        optimizer = torch.optim.AdamW(guide.trainable_parameters(), lr=1e-5)
        return GFlowNet(task.model, task.guide, optimizer=optimizer, num_particles=num_particles)

    trainer(2, 2, 2, 1, num_particles=2).step()  # what a first one loads
    step = trainer(prompt, tokens, observed, batch, num_particles=particles).step
    seconds: list[float] = []

    def steps() -> None:
        for _ in range(repetitions):
            prompts(lm.network).forget()
            seconds.append(place.seconds(step))

    before = lm.tokens_scored
    gigabytes = place.peak_memory(steps) / 1e9
    read = (lm.tokens_scored - before) // repetitions
    # Afterwards: what this frees a step would take again, unseen.
    machine = introduce(place, [place.speeds(place.timed(place.limits(), 3))])
    sizes = f"{batch} x {particles}, prompt {prompt}, {tokens} latent and {observed} observed tokens"
    rows = [[sizes, spread(seconds, ".1f"), f"{read:,}", f"{gigabytes:.2f}"]]
    show(f"{name}: a default step, median (range) of {repetitions}", ["sizes", "s", "tokens", "GB"], rows, in_markdown)
    save(out, machine=machine, network=name, sizes=sizes, seconds=seconds, tokens=read, gigabytes=gigabytes)
    median = statistics.median(seconds)
    asked = [Goal("seconds", SECONDS, median, at_most=True), Goal("GB", GIGABYTES, gigabytes, at_most=True)]
    judge(asked if checkpoint else [], in_markdown)


if __name__ == "__main__":
    typer.run(main)
