"""What `test_distributed.py` runs on one process and, as torchrun starts them, on two: figures go to OUT/rank.json.

torchrun --standalone --nproc_per_node 2 tests/distributed_script.py OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from tiny import adapter, flat_lm
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.inference import (
    SMC,
    Enumeration,
    GFlowNet,
    Importance,
    PolicyGradient,
    Replay,
    Sharded,
    SubTB,
    SupervisedFineTuning,
    TrajectoryBalance,
    VariationalEM,
)
from lmppl.inference.processes.distributed import world
from lmppl.text import PAD

SIZE = {"max_tokens": 2}
ADAM = torch.optim.Adam
X, Y = ["ab", "b", "ca", "", "ac"], ["cb", "", "a", "c", "ba"]  # five observations, which do not divide by two


class Task:
    """z ~ p(x), y ~ p(x z) for the observations, guided by q(y x); p and q are adapters of one base.

    What ``trains`` begins as another on each process, until training makes it that of the first.
    """

    def __init__(self, trains: str = "q") -> None:
        self.lm = flat_lm(vocab=5, seed=3, dtype=torch.float64)
        elsewhere = 100 * world().rank
        self.p = adapter(self.lm, 1 + elsewhere * ("p" in trains), r=2)
        self.q = adapter(self.lm, 2 + elsewhere * ("q" in trains), r=2)
        self.args = (self.lm.encode(X), self.lm.encode(Y, stop="eos"))
        self.z = self.lm.encode(["a", "cb", "", "bb", "c"], stop="eos")

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Completion(self.p, x, **SIZE))
            pyro.sample("y", Completion(self.p, self.p.join(x, z), **SIZE), obs=y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Completion(self.q, self.q.join(y, x), **SIZE))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return ADAM(self.q.trainable_parameters(), lr=1e-2)

    def gflownet(self, *objective: Any, **kwargs: Any) -> GFlowNet:
        kwargs = {"num_particles": 4, **kwargs}
        return GFlowNet(self.model, self.guide, *objective, optimizer=self.optimizer, **kwargs)


def found(history: list[dict[str, float]], *parameters: list[Tensor]) -> dict[str, Any]:
    """What all processes should agree on."""
    flat = torch.cat([full(p).flatten() for some in parameters for p in some])
    return {"history": history, "parameters": flat.tolist()}


def full(p: Tensor) -> Tensor:
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p


FIT = {"progress": False, "warmup": 1, "seed": 5}


def supervised(out: Path) -> dict[str, Any]:
    task = Task()
    tuning = SupervisedFineTuning(task.model, task.guide, optimizer=task.optimizer)
    history = tuning.fit([(*task.args, {"z": task.z})], 3, held_out=task.args, evaluate_every=2, **FIT)
    return found(history, task.q.trainable_parameters())


def gflownet(out: Path) -> dict[str, Any]:
    """Replay, exploration, prefixes chosen at random, a floor and a log."""
    task = Task()
    trainer = task.gflownet(SubTB(prefixes=2), replay=Replay(fraction=0.5, capacity=3, priority="both"))
    files = {"log": out / "run.jsonl", "checkpoint": out / "whole", "checkpoint_every": 3}
    history = trainer.fit([task.args], 4, held_out=task.args, evaluate_every=4, **files, **FIT)
    assert trainer.replay is not None
    return found(history, task.q.trainable_parameters()) | {"stored": len(trainer.replay)}


def learned_log_z(out: Path) -> dict[str, Any]:
    task = Task()  # log Z is float32: Adam would blow its rounding up where gradients are nearly zero
    optimizer = torch.optim.SGD(task.q.trainable_parameters(), lr=0.1)
    trainer = GFlowNet(task.model, task.guide, TrajectoryBalance(num_particles=4), optimizer=optimizer)
    return found(trainer.fit([task.args], 3, **FIT), trainer.parameters)


def searched(out: Path) -> dict[str, Any]:
    """A condition that two observations have, both with the first process: draws of the model are searched for it."""
    task = Task()
    hard = torch.tensor([True, True, False, False, False])

    def model(x: Tensor, y: Tensor, hard: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Completion(task.p, x, **SIZE))
            twice = (z == task.lm.token_id("a")).sum(-1) == 2
            pyro.factor("twice", torch.where(twice | ~hard, 0.0, -torch.inf).double())

    trainer = GFlowNet(model, lambda x, y, hard: task.guide(x, y), optimizer=task.optimizer, num_particles=4)
    history = trainer.fit([(*task.args, hard)], 4, **FIT)
    return found(history, trainer.parameters) | {"remembered": asdict(trainer.objective.memory)}


def policy_gradient(out: Path) -> dict[str, Any]:
    task = Task()
    trainer = PolicyGradient(task.model, task.guide, optimizer=task.optimizer, num_particles=4, whiten=True)
    return found(trainer.fit([task.args], 2, **FIT), trainer.parameters)


def em_exact(out: Path) -> dict[str, Any]:
    task = Task("pq")
    optimizer = torch.optim.SGD(task.p.trainable_parameters(), lr=0.3)
    em = VariationalEM(task.model, None, Enumeration(task.model), optimizer, backtrack=True, m_steps=2)
    history = em.fit([task.args], 2, held_out=task.args, evaluate_every=2, **FIT)
    return found(history, task.p.trainable_parameters())


def em_amortised(out: Path) -> dict[str, Any]:
    task = Task("pq")
    e_step = task.gflownet(replay=Replay(fraction=0.5))
    optimizer = ADAM(task.p.trainable_parameters(), lr=1e-2)
    em = VariationalEM(task.model, task.guide, e_step, optimizer, e_steps=2, num_particles=4)
    history = em.fit([task.args], 2, held_out=task.args, evaluate_every=2, **FIT)
    return found(history, task.p.trainable_parameters(), task.q.trainable_parameters())


def steps(out: Path) -> dict[str, Any]:
    """`step` outside of `fit`, on processes whose generators differ."""
    task = Task()
    trainer = task.gflownet()
    pyro.set_rng_seed(7 + world().rank)
    return found([trainer.step(*task.args) for _ in range(2)], trainer.parameters)


def resumed(out: Path) -> dict[str, Any]:
    """A run that is cut off in its fourth step and taken up again from its second."""
    where = {"log": out / "resumed.jsonl", "checkpoint": out / "resumed", "checkpoint_every": 2}

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    def run(**kwargs: Any) -> tuple[list[dict[str, float]], Task]:
        task = Task()
        return task.gflownet(replay=Replay(fraction=0.5)).fit([task.args], 5, **where, **FIT, **kwargs), task

    with suppress(KeyboardInterrupt):
        run(callback=stop)
    history, task = run()
    return found(history, task.q.trainable_parameters())


def sharded(out: Path) -> dict[str, Any]:
    """Posteriors of all observations: exact, and drawn."""
    task = Task(trains="")
    exact = Sharded(Enumeration(task.model)).run(*task.args)
    pyro.set_rng_seed(11)
    drawn = Sharded(Importance(task.model, task.guide, num_particles=6)).run(*task.args)
    alone = Sharded(Enumeration(task.model)).run(*(a[:1] for a in task.args))  # fewer than processes: whole on each
    return {
        "exact": exact.log_weights.tolist(),
        "bounds": [b.tolist() for b in exact.log_evidence_bounds],
        "texts": exact.strings("z"),
        "log_prob": exact.log_prob(task.z).tolist(),
        "drawn": drawn.strings("z"),
        "log_weights": drawn.log_weights.tolist(),
        "table": drawn.table("z", 4),
        "alone": alone.log_weights.tolist(),
        "kept": torch.equal(exact.predictive(task.model, *task.args).samples["z"], exact.samples["z"]),
    }


def grid(out: Path) -> dict[str, Any]:
    """Two plates, of which the left one is shared out; texts drawn, prefixes chosen, particles resampled along it."""
    task = Task()
    x = task.lm.encode([[a, "b"] for a in X])  # (5, 2, L)
    y = task.lm.encode([[b, "a"] for b in Y], stop="eos")

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", 2, dim=-1):
            z = pyro.sample("z", Completion(task.p, x, **SIZE))
            pyro.sample("y", Completion(task.p, task.p.join(x, z), **SIZE), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", 2, dim=-1):
            pyro.sample("z", Completion(task.q, task.q.join(y, x), **SIZE))

    trainer = GFlowNet(model, guide, SubTB(prefixes=3, num_particles=3), optimizer=task.optimizer)
    history = trainer.fit([(x, y)], 2, **FIT)
    pyro.set_rng_seed(3)
    exact = Sharded(Enumeration(model)).run(x, y)
    drawn = Sharded(trainer).run(x, y, num_particles=4)
    return found(history, task.q.trainable_parameters()) | {
        "exact": exact.log_evidence.tolist(),
        "drawn": drawn.samples["z"].tolist(),
        "log_weights": drawn.log_weights.tolist(),
    }


def otherwise(out: Path) -> dict[str, Any]:
    """Posteriors whose draws are not those of one process: a site that is no text, and SMC."""
    task = Task("")
    x, y = task.args

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)))
            z = pyro.sample("z", Completion(task.p, x, **SIZE))
            letter = task.lm.encode(["a", "b", "c"])[k]
            pyro.sample("y", Completion(task.p, task.p.join(x, z, letter), **SIZE), obs=y)

    n = 3000
    exact = Enumeration(model).run(x, y).log_evidence
    drawn = Sharded(Importance(model, num_particles=n)).run(x, y)
    ratio = (drawn.log_weights + torch.tensor(n).log() - exact).exp()  # (n, data), of mean 1
    same = Sharded(Importance(model, num_particles=n)).run(x[[0, 0]], y[[0, 0]]).samples["k"]
    grown = torch.stack([Sharded(SMC(model, num_particles=40)).run(x, y).log_evidence for _ in range(20)])
    of_smc = (grown - exact).exp()  # (20, data), of mean 1
    return {
        "mean": ratio.mean(0).tolist(),
        "error": (ratio.std(0) / n**0.5).tolist(),
        "agreement": (same[:, 0] == same[:, 1]).double().mean().item(),
        "smc": of_smc.mean(0).tolist(),
        "smc_error": (of_smc.std(0) / 20**0.5).tolist(),
    }


def fully_sharded(out: Path) -> dict[str, Any]:
    """FSDP2: parameters and the optimiser's state in pieces, of a guide's whole network or of an adapter's frozen base.

    Each run is cut off in its second step and taken up again.
    """
    results = {}
    for name in ("supervised", "gflownet", "in parts", "adapter"):
        history: list[dict[str, float]] = []
        for end in (2, 3):
            task = Task("")
            task.q = in_pieces(adapted=name == "adapter")
            if name == "in parts":  # of which the backward pass reads all but the last again
                task.q.token_budget = 8
            trainer: Any = task.gflownet()
            args = task.args
            if name == "supervised":
                trainer = SupervisedFineTuning(task.model, task.guide, optimizer=task.optimizer)
                args = (*task.args, {"z": task.z})

            def stop(step: int, metrics: dict[str, float], end: int = end, history: Any = history) -> None:
                history.append(metrics)
                if step + 1 == end == 2:
                    raise KeyboardInterrupt

            with suppress(KeyboardInterrupt):
                trainer.fit([args], 3, callback=stop, checkpoint=out / name, checkpoint_every=1, **FIT)
        results[name] = found(history, task.q.trainable_parameters())
    return results


def in_pieces(adapted: bool) -> LanguageModel:
    """A network of its own, sharded over processes before it is wrapped; perhaps frozen, with an adapter on it."""
    lm = flat_lm(vocab=5, seed=4, dtype=torch.float64)
    network, tokenizer = lm.model, lm.tokenizer
    if world().size > 1:
        network = type(network)(network.config).double().requires_grad_(not adapted)  # not wrapped yet
        network.load_state_dict(lm.model.state_dict())
        mesh = init_device_mesh("cpu", (world().size,))
        fully_shard(network, mesh=mesh, reshard_after_forward=False)
        lm = LanguageModel(network, tokenizer)
    return adapter(lm, 1, r=2) if adapted else lm


def refused(out: Path) -> dict[str, Any]:
    """What cannot be shared out, by what it says."""
    task = Task("")
    x, y = task.args
    loose = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    stranger = GFlowNet(task.model, task.guide, optimizer=ADAM([loose], lr=0.1))

    def subsampled(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as i:
            z = pyro.sample("z", Completion(task.p, x[i], **SIZE))
            pyro.sample("y", Completion(task.p, task.p.join(x[i], z), **SIZE), obs=y[i])

    def joint(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        task.model(x, y)

    def shared(x: Tensor, y: Tensor) -> None:  # reads x as one prompt for all
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", Completion(task.p, x, **SIZE))
            pyro.sample("y", Completion(task.p, task.p.join(x, z), **SIZE), obs=y)

    unended = y.clone()
    unended[4] = torch.tensor([3] + [PAD] * (y.shape[1] - 1))
    cases: dict[str, Callable[[], Any]] = {
        "few": lambda: task.gflownet().step(x[:1], y[:1]),
        "lengths": lambda: task.gflownet().step(x, y[:3]),
        "nothing": lambda: task.gflownet().step(),
        "subsampled": lambda: Sharded(Importance(subsampled)).run(x, y),
        "joint": lambda: Sharded(Importance(joint)).run(x, y),
        "shared": lambda: Sharded(Importance(shared)).run(torch.tensor([2, 3, 4, 2, 3]), y),
        "stranger": lambda: stranger.step(x, y),
        "algorithm": lambda: Sharded(loose),
        "zero": lambda: Sharded(Importance(task.model, num_particles=3)).run(x, unended).table("z", 4),
    }
    said = {}
    for name, case in cases.items():
        try:
            case()
        except ValueError as error:
            said[name] = str(error)
    return said


CHECKS = (
    supervised,
    gflownet,
    learned_log_z,
    searched,
    policy_gradient,
    em_exact,
    em_amortised,
    steps,
    resumed,
    sharded,
    grid,
    fully_sharded,
)


def main(out: Path) -> None:
    from accelerate import PartialState

    PartialState._reset_state()  # that of the process that this one is a fork of
    state = PartialState(cpu=True)
    assert state.num_processes == world().size == 2, "started as one process"
    results = {check.__name__: check(out) for check in (*CHECKS, otherwise, refused)}
    results["processes"] = state.num_processes
    (out / f"{world().rank}.json").write_text(json.dumps(results))
    state.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
