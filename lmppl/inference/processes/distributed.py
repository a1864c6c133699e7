r"""Several processes: each has a part of every batch's observations, and all have the same parameters.

A loss is a mean over observations, :math:`\mathcal L = \frac1N \sum_i \ell_i`.  Process r, which has :math:`n_r` of the
N observations, takes the mean over its own and weighs it by :math:`n_r / N`.  Gradients are *summed* over processes.
So the normaliser is that of the whole batch, also if N is no multiple of the number of processes.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ...randomness import Part, part, partly

T = TypeVar("T")
Arguments = tuple[Any, ...]


class World(NamedTuple):
    """The number of this process, and the number of processes."""

    rank: int
    size: int


def world() -> World:
    """The number of this process among all.  Joins the processes started by `torchrun` or ``accelerate launch``."""
    if not dist.is_available():
        return World(0, 1)
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched() or os.environ.get("WORLD_SIZE", "1") == "1":
            return World(0, 1)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
    return World(dist.get_rank(), dist.get_world_size())


# -- a batch's parts ---------------------------------------------------------------------------------------------------


@contextmanager
def shard(args: Arguments, dim: Callable[[Arguments, Part], int], *, few: bool = False) -> Iterator[Arguments]:
    """Gives this process its part of a batch; inside, random numbers, sums and averages are those of all processes.

    Observation i of N belongs to the process r with ``r N // size <= i < (r + 1) N // size``.  All processes take the
    random state of the first.

    :param args: the whole batch, the same on every process.  The first axis of every tensor, list and tuple, also in a
        dict, is that of the observations; other arguments are passed on unchanged.
    :param dim: a function of the part of the arguments that returns the axis of the observations' plate.
    :param few: whether a batch with fewer observations than processes is given whole to each, instead of an error.
    :raises ValueError: if the lengths of the arguments differ, if there are too few observations, or if processes have
        different numbers of them.
    """
    rank, size = world()
    if size == 1 or part() is not None:
        yield args
        return
    total = _count(args)
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    first: list[Any] = [(total, states)]
    dist.broadcast_object_list(first, src=0)
    if first[0][0] != total:
        raise ValueError(f"batches: process {rank} has {total} observations, the first {first[0][0]}; give all to each")
    torch.set_rng_state(first[0][1][0])
    if len(states) > 1:
        torch.cuda.set_rng_state(first[0][1][1])
    if total < size:
        if not few:
            raise ValueError(f"batches: {total} observations are fewer than {size} processes; use larger batches")
        yield args
        return
    start, stop = rank * total // size, (rank + 1) * total // size
    own = tuple(_cut(arg, start, stop) for arg in args)
    found = Part(start, stop, total, 0, rank)
    with partly(found._replace(dim=dim(own, found))):
        yield own


def _cut(x: Any, start: int, stop: int) -> Any:
    if isinstance(x, Mapping):
        return {key: _cut(value, start, stop) for key, value in x.items()}
    return x[start:stop] if _is_many(x) else x


def _is_many(x: Any) -> bool:
    return isinstance(x, list | tuple) or (isinstance(x, Tensor) and x.dim() > 0)


def _count(args: Arguments) -> int:
    """The number of observations of the arguments."""

    def lengths(x: Any) -> set[int]:
        if isinstance(x, Mapping):
            return set().union(*map(lengths, x.values()))
        return {len(x)} if _is_many(x) else set()

    found = set().union(*map(lengths, args))
    if len(found) != 1:
        raise ValueError(
            f"batches: on several processes the first axis of every argument is that of the observations; these have "
            f"lengths {sorted(found)}; a value that all observations share can come from a closure"
        )
    return found.pop()


# -- sums over processes; they change nothing if this process has everything -------------------------------------------


def share() -> float:
    """The share of the observations that this process has."""
    own = part()
    return 1.0 if own is None else own.share


def total(x: T) -> T:
    """The sum over processes of a number or a tensor, without gradient."""
    if part() is None:
        return x
    given: Any = x
    summed = given.detach().clone() if isinstance(x, Tensor) else torch.tensor(float(given), dtype=torch.float64)
    where = summed.device
    summed = _reachable(summed)
    dist.all_reduce(summed)
    result: Any = summed.to(where) if isinstance(x, Tensor) else type(given)(summed.item())
    return result


def average(metrics: dict[str, float]) -> dict[str, float]:
    """Means over the observations of all processes, from the means of each process."""
    if part() is None or not metrics:
        return metrics
    values = total(share() * torch.tensor(list(metrics.values()), dtype=torch.float64))
    return dict(zip(metrics, values.tolist(), strict=True))


def everywhere(condition: bool) -> bool:
    """Whether a condition holds on all processes."""
    return total(float(not condition)) == 0


def gather(x: T) -> list[T]:
    """The values of all processes, in the order of the observations; tensors must be on the CPU.

    torch pickles what is sent between the processes of one run; nothing else is ever unpickled.
    """
    if part() is None:
        return [x]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found


def agree(x: Any) -> bool:
    """Whether x is the same on every process, inside and outside of `shard`; all processes wait here for each other."""
    if world().size == 1:
        return True
    found: list[Any] = [None] * world().size
    dist.all_gather_object(found, x)
    return all(y == x for y in found)


def first_alone(action: Callable[[], T]) -> T:
    """Runs ``action()`` on the first process only; all processes return its result, or raise its exception."""
    if world().size == 1:
        return action()
    told: list[Any] = [None, None]
    if world().rank == 0:
        try:
            told[0] = action()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    result: T = told[0]
    return result


def greatest(x: int) -> int:
    """The greatest of all processes' numbers, inside and outside of `shard`."""
    found = _reachable(torch.tensor(x))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found.item())


# -- parameters --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def broadcast(parameters: list[Tensor]) -> None:
    """Gives all processes the parameters of the first; sharded parameters are skipped."""
    if part() is not None:
        for p in parameters:
            if not isinstance(p, DTensor):
                values = _reachable(p.detach())
                dist.broadcast(values, src=0)
                p.copy_(values)


@torch.no_grad()
def sum_gradients(parameters: list[Tensor]) -> None:
    """Sums the gradients of all processes; a parameter without a gradient on every process stays without.

    :raises ValueError: if no parameter has a gradient.
    """
    if part() is None:
        return
    if everywhere(all(p.grad is None for p in parameters)):
        raise ValueError(
            "optimizer: the loss depends on none of its parameters; give it those of the guide; if these are sharded, "
            "shard the network before LanguageModel(network, tokenizer) wraps it"
        )
    for p in parameters:
        if isinstance(p, DTensor) and p.grad is not None:
            p.grad.mul_(dist.get_world_size())  # FSDP has taken the mean over processes
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    for dtype in dict.fromkeys(p.dtype for p in plain):  # unlike a set, in the same order on every process
        own = [p for p in plain if p.dtype == dtype]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
        there = torch.tensor([float(p.grad is not None) for p in own], dtype=dtype, device=own[0].device)
        summed = total(torch.cat([*(g.flatten().to(there.device) for g in grads), there]))
        found, there = summed[: -len(own)], summed[-len(own) :]
        for p, g, some in zip(own, found.split([p.numel() for p in own]), there.tolist(), strict=True):
            p.grad = g.view_as(p).to(p.device) if some else None


def whole(x: Tensor) -> Tensor:
    """The full tensor of one that may be sharded over processes."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def is_sharded(p: Tensor) -> bool:
    """Whether a parameter is sharded over processes."""
    return isinstance(p, DTensor)


def like(p: Tensor, x: Tensor) -> Tensor:
    """The full tensor ``x``, sharded like ``p`` if it has the same shape."""
    if isinstance(p, DTensor) and x.shape == p.shape:
        return distribute_tensor(x.to(p.device), p.device_mesh, p.placements)
    return x


def _reachable(x: Tensor) -> Tensor:
    """The tensor on a device that collectives reach: its own if the backend supports it, else the accelerator."""
    return x if f"{x.device.type}:" in str(dist.get_backend_config()) else x.cuda()
