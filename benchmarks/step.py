"""Speed of a GFlowNet step beside the published shape of its computation, on the same network and samples.

    python -m benchmarks.step --out step.json

A step is: sample, rewards of all prefixes with the observation after each, loss, backward, optimiser.  The published
shape samples with a graph and a KV cache, and scores prompt, prefix, stop and observation in a forward pass of the
frozen network at every decoding step; the loss is SubTB(1) over all prefixes.  It uses nothing of lmppl but the loss:
the same weights in networks as transformers and peft make them.  Both are plain causal attention in float32, one
thread, in one process, repetitions interleaved; a ratio above 1 is faster than the published shape.  Before anything is
timed, both must give the same loss and gradient on the same texts.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import peft
import pyro
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sampling import language_model, network, timed
from lmppl import LanguageModel, text
from lmppl.distributions import Completion
from lmppl.inference import GFlowNet, SubTB, VarGrad
from lmppl.inference.training.gflownet.sub_tb import pairwise

STOP = 1
TOLERANCE = 1e-4
REQUIRED = {"all prefixes": {20: 2.5, 200: 5.0}, "3 prefixes": {20: 4.0, 200: 10.0}, "VarGrad": {20: 4.0, 200: 10.0}}


class Task:
    """z ~ LM(x), the observation y ~ LM(x z): observations (B, Lx) and (B, Ly), a guide that reads x and y."""

    def __init__(self, lm: LanguageModel, guide: LanguageModel, prompt: int, tokens: int, observed: int, batch: int):
        self.lm, self.q, self.tokens = lm, guide, tokens
        self.x = torch.randint(2, lm.vocab_size, (batch, prompt))
        self.y = torch.randint(2, lm.vocab_size, (batch, observed))

    def model(self) -> None:
        with pyro.plate("data", len(self.x)):
            z = pyro.sample("z", Completion(self.lm, self.x, max_tokens=self.tokens, stop=STOP))
            y = Completion(self.lm, text.cat(self.x, z), max_tokens=self.y.shape[1], stop=None)
            pyro.sample("y", y, obs=self.y)

    def guide(self) -> Tensor:
        with pyro.plate("data", len(self.x)):
            return pyro.sample("z", Completion(self.q, self.x, max_tokens=self.tokens, stop=STOP))


class Published:
    """The networks of the published shape: a frozen one, and one with an adapter that starts as ``guide``'s."""

    def __init__(self, guide: LanguageModel, config: peft.LoraConfig, make: Callable[[], Any]):
        self.frozen = make().requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
            self.policy = peft.get_peft_model(make(), config).eval()
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        with torch.no_grad():
            for own, theirs in zip(self.parameters, guide.trainable_parameters(), strict=True):
                own.copy_(theirs)


def published_loss(networks: Published, task: Task, particles: int, given: Tensor | None = None) -> Tensor:
    """The loss of the published shape; ``given`` texts (N, B, T + 1) instead of drawn ones."""
    N, B, T = particles, len(task.x), task.tokens
    x = task.x.expand(N, B, -1).flatten(0, 1)  # (R, Lx)
    y = task.y.expand(N, B, -1).flatten(0, 1)
    rows = torch.arange(len(x))
    z = x.new_empty(len(x), 0)
    over = torch.zeros(len(x), dtype=torch.bool)
    log_q, log_p = torch.zeros(len(x)), torch.zeros(len(x))  # of z_1..z_t
    u, valid = [], []
    cache, ids = None, x
    for t in range(T + 1):
        out = networks.policy(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        q = out.logits[:, -1].log_softmax(-1)  # (R, V)
        with torch.no_grad():  # prompt, prefix, stop and observation, once more from the start
            stop = torch.full_like(x[:, :1], STOP)
            whole = torch.cat([x, z, stop, y], 1)
            scores = networks.frozen(whole, use_cache=False).logits.log_softmax(-1)
            at = x.shape[1] + t - 1  # what follows z_1..z_t
            tail = scores[:, at + 1 : -1].gather(-1, y[..., None]).sum((1, 2))
            end = scores[:, at, STOP] if t < T else torch.zeros(len(x))
        u.append(log_p + end + tail - log_q - (q[:, STOP] if t < T else 0.0))
        valid.append(~over)
        if t == T:
            break
        if given is None:
            token = torch.multinomial(q.detach().exp(), 1)[:, 0]
        else:
            token = given.flatten(0, 1)[:, t].clamp(min=0)
        log_q = log_q + q[rows, token]
        log_p = log_p + scores[rows, at, token]
        over = over | (token == STOP)
        z, ids = torch.cat([z, token[:, None]], 1), token[:, None]
    at_end = torch.stack(valid).view(T + 1, N, B)
    at = torch.arange(T + 1).view(-1, 1, 1).expand(T + 1, N, B)
    residual = torch.stack(u).view(T + 1, N, B).masked_fill(~at_end, 0.0)
    return pairwise(residual, at_end, at, 1.0).mean()


def agreement(networks: Published, task: Task, particles: int) -> tuple[float, float]:
    """The largest differences of loss and gradient, relative, between both on the same texts."""
    objective = SubTB(num_particles=particles, max_plate_nesting=1)
    values = objective.draw(task.model, task.guide, (), {})
    ours, _ = objective.loss_at(task.model, task.guide, (), {}, values)
    given = text.pad(values["z"].reshape(particles, len(task.x), -1), task.tokens + 1)
    theirs = published_loss(networks, task, particles, given)
    both = (ours, task.q.trainable_parameters()), (theirs, networks.parameters)
    a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(loss, of)]) for loss, of in both)
    return abs(ours.item() / theirs.item() - 1), ((a - b).norm() / b.norm()).item()


def contestants(networks: Published, task: Task, particles: int) -> dict[str, Callable[[], Any]]:
    """A step of each, by name."""
    optimizer = torch.optim.AdamW(task.q.trainable_parameters(), lr=1e-5)
    theirs = torch.optim.AdamW(networks.parameters, lr=1e-5)

    def published() -> None:
        theirs.zero_grad()
        published_loss(networks, task, particles).backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters, 1.0)
        theirs.step()

    def step(objective: Any) -> Callable[[], Any]:
        return GFlowNet(task.model, task.guide, objective, optimizer=optimizer, num_particles=particles).step

    nested: dict[str, Any] = {"num_particles": particles, "max_plate_nesting": 1}
    return {
        "published": published,
        "all prefixes": step(SubTB(**nested)),
        "3 prefixes": step(SubTB(prefixes=3, **nested)),
        "VarGrad": step(VarGrad(**nested)),
    }


def operations(run: Callable[[], Any]) -> int:
    """Of a run's matrix products, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def product(width: int = 2048) -> tuple[int, Callable[[], Any]]:
    """The operations of one large matrix product, and that product: what the machine reaches at most."""
    a = torch.randn(width, width)
    return 2 * width**3, lambda: a @ a


def main(
    out: Annotated[Path | None, typer.Option(help="Write the measurements to this JSON file.")] = None,
    width: Annotated[int, typer.Option(help="Width of the network.")] = 128,
    vocab: Annotated[int, typer.Option(help="Vocabulary of the network.")] = 2048,
    tokens: Annotated[int, typer.Option(help="Most latent tokens.")] = 16,
    observed: Annotated[int, typer.Option(help="Observed tokens.")] = 10,
    batch: Annotated[int, typer.Option(help="Observations a step.")] = 2,
    particles: Annotated[int, typer.Option(help="Samples of each.")] = 16,
    repetitions: Annotated[int, typer.Option(help="Timed repetitions of each cell.")] = 7,
    activation: Annotated[str, typer.Option(help="gelu_new or, fused, gelu_pytorch_tanh.")] = "gelu_new",
    prompt: Annotated[list[int] | None, typer.Option(help="Lengths of the prompt.")] = None,
) -> None:
    """Time all cells and print the ratios; exit with 1 where they disagree or a requirement is missed."""
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    console, missed = Console(width=110), []
    rows: list[dict[str, Any]] = []
    table = Table(title=f"a step relative to the published shape: median (range) of {repetitions}")
    for column in ("prompt", "published [s]", *REQUIRED, "loss differs by", "gradient by"):
        table.add_column(column, justify="right")
    lm = language_model(width, vocab, activation)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    guide = lm.with_adapter(config)
    for length in prompt or [20, 200]:
        networks = Published(guide, config, lambda: network(width, vocab, activation))
        torch.manual_seed(0)
        task = Task(lm, guide, length, tokens, observed, batch)
        loss, gradient = agreement(networks, task, particles)
        runs = contestants(networks, task, particles)
        work = {name: operations(run) for name, run in runs.items()}
        large, multiply = product()
        seconds = timed({**runs, "product": multiply}, repetitions)
        most = large / statistics.median(seconds.pop("product"))
        base = seconds["published"]
        ratios = {k: [b / s for b, s in zip(base, seconds[k], strict=True)] for k in REQUIRED}
        share = {name: work[name] / statistics.median(seconds[name]) / most for name in runs}
        found = {"seconds": seconds, "ratios": ratios, "loss": loss, "gradient": gradient, "operations": work}
        rows.append({"prompt": length, **found, "peak": most, "share of peak": share})
        shown = [f"{statistics.median(r):.1f} ({min(r):.1f}-{max(r):.1f})" for r in ratios.values()]
        table.add_row(str(length), f"{statistics.median(base):.2f}", *shown, f"{loss:.0e}", f"{gradient:.0e}")
        missed += [f"{k}, prompt {length}" for k, r in ratios.items()
                   if statistics.median(r) < REQUIRED[k].get(length, 0.0)]  # fmt: skip
        missed += [f"agreement, prompt {length}"] * (max(loss, gradient) > TOLERANCE)
    console.print(table)
    for row in rows:
        shown = [f"{k} {n / 1e9:.1f} at {row['share of peak'][k]:.0%}" for k, n in row["operations"].items()]
        console.print(f"prompt {row['prompt']}, GFLOP and share of {row['peak'] / 1e9:.0f} GFLOP/s: {', '.join(shown)}")
    if out is not None:
        out.write_text(json.dumps({"torch": torch.__version__, "cells": rows}, indent=1))
    if missed:
        console.print(f"missed: {', '.join(missed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
