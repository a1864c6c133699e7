"""Speed of a GFlowNet step compared with the published shape of its computation, on the same network and samples.

    python -m benchmarks.step --out step.json
    python -m benchmarks.step --checkpoint PATH    # a pretrained network instead of a random one

A step is: sample, rewards of all prefixes with the observation after each, loss, backward, optimiser.  The published
shape samples with a graph and a KV cache, and scores prompt, prefix, stop and observation in a forward pass of the
frozen network at every decoding step; the loss is SubTB(1) over all prefixes.  It uses only the loss of lmppl, and
the same weights in networks of transformers and peft.  Both use plain causal attention in float32 and one thread, in
one process, in alternating repetitions; a ratio above 1 is faster than the published shape.  Before the measurement,
both must give the same loss and gradient on the same texts.  Shares of peak use the operations that torch counts.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import peft
import pyro
import torch
import typer
from torch import Tensor

from benchmarks.measuring import (
    LORA,
    Checkpoint,
    Device,
    Dtype,
    Goal,
    InMarkdown,
    Out,
    Place,
    faster,
    introduce,
    judge,
    operations,
    save,
    show,
    spread,
)
from benchmarks.sampling import language_model, network
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
        self.x = torch.randint(2, lm.vocab_size, (batch, prompt)).to(lm.device)
        self.y = torch.randint(2, lm.vocab_size, (batch, observed)).to(lm.device)

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
    rows, zeros = torch.arange(len(x), device=x.device), torch.zeros(len(x), device=x.device)
    z = x.new_empty(len(x), 0)
    over = torch.zeros_like(rows, dtype=torch.bool)
    log_q, log_p = zeros, zeros  # of z_1..z_t
    u, valid = [], []
    cache, ids = None, x
    for t in range(T + 1):
        out = networks.policy(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        q = out.logits[:, -1].float().log_softmax(-1)  # (R, V)
        with torch.no_grad():  # prompt, prefix, stop and observation, once more from the start
            stop = torch.full_like(x[:, :1], STOP)
            whole = torch.cat([x, z, stop, y], 1)
            scores = networks.frozen(whole, use_cache=False).logits.float().log_softmax(-1)
            at = x.shape[1] + t - 1  # what follows z_1..z_t
            tail = scores[:, at + 1 : -1].gather(-1, y[..., None]).sum((1, 2))
            end = scores[:, at, STOP] if t < T else zeros
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
    at = torch.arange(T + 1, device=x.device).view(-1, 1, 1).expand(T + 1, N, B)
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


def goals(rows: list[dict[str, Any]], random: bool, exact: bool) -> Iterator[Goal]:
    """What should be reached, by a random network or not; ``exact``: in the precision in which both sides agree."""
    for row in rows:
        for name in REQUIRED:
            if random and row["prompt"] in REQUIRED[name]:
                ratio = statistics.median(row["ratios"][name])
                yield Goal(f"{name} / published, prompt {row['prompt']}", REQUIRED[name][row["prompt"]], ratio)
        if exact:
            differs = max(row["loss"], row["gradient"])
            yield Goal(f"difference of loss and gradient, prompt {row['prompt']}", TOLERANCE, differs, at_most=True)


def main(
    out: Out = None,
    width: Annotated[int, typer.Option(help="Width of the random network.")] = 128,
    vocab: Annotated[int, typer.Option(help="Vocabulary of the random network.")] = 2048,
    tokens: Annotated[int, typer.Option(help="Most latent tokens.")] = 16,
    observed: Annotated[int, typer.Option(help="Observed tokens.")] = 10,
    batch: Annotated[int, typer.Option(help="Observations a step.")] = 2,
    particles: Annotated[int | None, typer.Option(help="Samples of each; default 16, of a checkpoint 4.")] = None,
    repetitions: Annotated[int | None, typer.Option(help="Of each cell; default 7, of a checkpoint 3.")] = None,
    activation: Annotated[str, typer.Option(help="gelu_new or, fused, gelu_pytorch_tanh.")] = "gelu_new",
    prompt: Annotated[list[int] | None, typer.Option(help="Lengths of the prompt.")] = None,
    checkpoint: Checkpoint = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    in_markdown: InMarkdown = False,
) -> None:
    """Time all cells and print the ratios; exit with 1 where they disagree or a requirement is missed."""
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    place, pretrained = Place(device, dtype), checkpoint is not None
    particles, repetitions = particles or (4 if pretrained else 16), repetitions or (3 if pretrained else 7)
    rows: list[dict[str, Any]] = []
    if checkpoint is None:
        lm, make = language_model(width, vocab, activation), lambda: place.put(network(width, vocab, activation))
        place.put(lm.model)
    else:
        lm, make = place.language_model(checkpoint), lambda: place.plain(checkpoint)
    guide = lm.with_adapter(LORA)
    for length in prompt or ([20] if pretrained else [20, 200]):
        print(f"prompt {length}: both on the same texts", file=sys.stderr)
        networks = Published(guide, LORA, make)
        torch.manual_seed(0)
        task = Task(lm, guide, length, tokens, observed, batch)
        loss, gradient = agreement(networks, task, 2 if pretrained else particles)
        runs = contestants(networks, task, particles)
        print(f"prompt {length}: operations", file=sys.stderr)
        work = {name: operations(run) for name, run in runs.items()}
        print(f"prompt {length}: {repetitions} repetitions", file=sys.stderr)
        seconds = place.timed({**runs, **place.limits()}, repetitions, warm=not pretrained)  # they ran to be counted
        limits = place.speeds(seconds)
        ratios = {k: faster(seconds, "published", k) for k in REQUIRED}
        share = {k: work[k] / statistics.median(seconds[k]) / limits[0] for k in runs}
        found = {"seconds": seconds, "ratios": ratios, "loss": loss, "gradient": gradient, "operations": work}
        rows.append({"prompt": length, **found, "limits": limits, "share of peak": share})
    machine = introduce(place, [row["limits"] for row in rows])
    report(rows, f"{batch} observations x {particles} particles, {repetitions} repetitions", in_markdown)
    save(out, machine=machine, checkpoint=checkpoint, cells=rows)
    judge(goals(rows, not pretrained, dtype == "float32"), in_markdown)


def report(rows: list[dict[str, Any]], sizes: str, in_markdown: bool) -> None:
    """Print how fast the steps are, and what they compute at which share of the machine's peak."""
    speeds, shares = [], []
    for row in rows:
        cells = [spread(r, ".1f") for r in row["ratios"].values()]
        base = f"{statistics.median(row['seconds']['published']):.2f}"
        speeds.append([str(row["prompt"]), base, *cells, f"{row['loss']:.0e}", f"{row['gradient']:.0e}"])
        for name, work in row["operations"].items():
            seconds = f"{statistics.median(row['seconds'][name]):.2f}"
            shares.append([str(row["prompt"]), name, seconds, f"{work / 1e9:.1f}", f"{row['share of peak'][name]:.0%}"])
    header = ["prompt", "published, s", *REQUIRED, "loss differs by", "gradient by"]
    show(f"A step, times as fast as the published shape: {sizes}, median (range)", header, speeds, in_markdown)
    show("Distance to the limit", ["prompt", "", "s", "GFLOP", "share of peak"], shares, in_markdown)


if __name__ == "__main__":
    typer.run(main)
