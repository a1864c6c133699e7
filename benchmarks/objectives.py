"""The effect of each divergence on modes and tails if q cannot equal p: one bell for two modes, exact by enumeration.

    python -m benchmarks.objectives

The posterior is on a grid of 81 points: a narrow mode with 0.65 of the mass on the left, a broad one with 0.35 on the
right, and little between them. The guide is a bell with a mean and a scale. Each divergence trains it on-policy from
the same wide start, with 32 particles, by `VarGrad`; if the best c is not log Z, also by `TrajectoryBalance` with the
true log Z. In brackets is the *best* q of the divergence, found by gradient descent on D_f itself, a sum over the grid.
All figures of a q are sums over the grid. The noise of the gradient is the standard deviation, divided by the norm of
the mean, of 4,000 gradients with 32 particles at the start.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.paper.study import markdown
from lmppl.inference import DIVERGENCES, TrajectoryBalance, VarGrad

X = torch.linspace(-8, 8, 81, dtype=torch.float64)
SPLIT, MODES = 0.4, ((0.65, -2.5, 0.5), (0.35, 2.8, 1.0))  # where the modes meet; weight, mean, scale
LOG_P = torch.stack(
    [math.log(w / s) - (X - m) ** 2 / (2 * s**2) for w, m, s in MODES]
).logsumexp(0).log_softmax(0)  # fmt: skip
START = (0.0, 3.0)
PARTICLES, STEPS, SEEDS = 32, 1000, 3
NAMES = "squared", "log_cosh", "total_variation", "jensen_shannon", "hellinger", "forward_kl", "chi_square"
LOG_Z_GIVEN = "log_cosh", "total_variation", "jensen_shannon"


def start() -> list[Tensor]:
    mean, scale = torch.tensor(START, dtype=torch.float64)
    return [mean.requires_grad_(), scale.log().requires_grad_()]


def log_q(mean: Tensor, log_scale: Tensor) -> Tensor:
    return (-((X - mean) ** 2) / 2 * (-2 * log_scale).exp()).log_softmax(-1)


def model() -> None:
    pyro.sample("z", dist.Categorical(logits=LOG_P))


def trained(name: str, given: bool, seed: int) -> Tensor:
    """log q after training by samples, its parameters averaged over the last half of the steps."""
    pyro.set_rng_seed(seed)
    params = start()
    options = {"num_particles": PARTICLES, "divergence": name, "max_plate_nesting": 0}
    objective = TrajectoryBalance(0.0, **options) if given else VarGrad(**options)
    loss = objective(model, lambda: pyro.sample("z", dist.Categorical(logits=log_q(*params))))
    optimizer = torch.optim.Adam(params, lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
    averages = [torch.zeros_like(p) for p in params]
    for step in range(STEPS):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        if step >= STEPS // 2:
            averages = [a + p.detach() / (STEPS - STEPS // 2) for a, p in zip(averages, params, strict=True)]
    return log_q(*averages)


def best(name: str) -> Tensor:
    """log q at the end of a descent of D_f itself, from the same start."""
    params, f = start(), DIVERGENCES[name].f
    optimizer = torch.optim.Adam(params, lr=0.02)
    for _ in range(2000):
        optimizer.zero_grad()
        found = log_q(*params)
        (found.exp() * f((LOG_P - found).exp())).sum().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    return log_q(*(p.detach() for p in params))


def noise(name: str, given: bool, batches: int = 4000) -> float:
    """The gradient's standard deviation over the norm of its mean, at the start."""
    params = start()
    found = log_q(*params)
    scores = torch.stack([torch.stack(torch.autograd.grad(x, params, retain_graph=True)) for x in found])  # (X, 2)
    generator = torch.Generator().manual_seed(0)
    z = torch.multinomial(found.detach().exp(), PARTICLES * batches, True, generator=generator).view(PARTICLES, batches)
    u = (LOG_P - found.detach())[z].requires_grad_()  # (particle, batch)
    divergence = DIVERGENCES[name]
    losses = divergence.g(u).mean(0) if given else divergence.spread(u, torch.ones_like(u))
    (slope,) = torch.autograd.grad(losses.sum(), u)
    gradients = -(slope[..., None] * scores[z]).sum(0)  # (batch, 2)
    return (gradients.var(0).sum().sqrt() / gradients.mean(0).norm()).item()


def figures(log_q: Tensor) -> dict[str, float]:
    p, q, log_ratio = LOG_P.exp(), log_q.exp(), LOG_P - log_q
    left, between = X < SPLIT, (X - SPLIT).abs() < 1.0
    masses = [(x[left].sum().item(), x[~left].sum().item()) for x in (q, p)]
    return {
        "KL(p, q)": (p * log_ratio).sum().item(),
        "KL(q, p)": -(q * log_ratio).sum().item(),
        "TV": (p - q).abs().sum().item() / 2,
        "modes": sum(a > 0.1 * b for a, b in zip(*masses, strict=True)),
        "left": masses[0][0],
        "between": q[between].sum().item(),
        "scale": (q @ X**2 - (q @ X) ** 2).sqrt().item(),
    }


def row(name: str, given: bool) -> list[str]:
    found = [figures(trained(name, given, seed)) for seed in range(SEEDS)]
    exact = figures(best(name))

    def shown(key: str) -> str:
        values = [f[key] for f in found]
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({exact[key]:.2f})"

    kept = " ".join(str(int(f["modes"])) for f in found) + f" ({int(exact['modes'])})"
    label = f"`{name}`, log Z given" if given else f"`{name}`"
    distances, masses = map(shown, ("KL(p, q)", "KL(q, p)", "TV")), map(shown, ("left", "between", "scale"))
    return [label, *distances, kept, *masses, f"{noise(name, given):.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    rows = [row(name, given) for name in NAMES for given in ([False, True] if name in LOG_Z_GIVEN else [False])]
    head = ["divergence", "KL(p, q)", "KL(q, p)", "TV", "modes of 2", "mass left", "mass between", "sd of q", "noise"]
    print(markdown(head, rows))
    p = figures(LOG_P)
    print(f"p: left {p['left']:.2f}, between {p['between']:.3f}, sd {p['scale']:.2f}")
    print(f"{time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    main()
