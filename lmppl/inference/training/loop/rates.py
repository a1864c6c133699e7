"""The learning rates of one `fit`: the built-in warm-up and decay, or those of a scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .schedules import warmed


class Rates(Protocol):
    """A context in which learning rates change from step to step."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: object) -> None: ...

    def begin(self, step: int) -> None:
        """Called before a step."""

    def end(self, updated: bool) -> None:
        """Called after a step."""

    def rest(self) -> None:
        """Called before a checkpoint is written."""

    def state(self) -> Any:
        """What the checkpoint keeps; None where there is nothing to keep."""

    def restore(self, state: Any) -> None:
        """Restores what `state` returned."""


class Warmed:
    """Warm-up to the optimiser's rate, then decay to zero; afterwards, and in checkpoints, the optimiser's rate."""

    def __init__(self, optimizers: Sequence[Optimizer], steps: int, warmup: int):
        self.steps, self.warmup, self.optimizers = steps, warmup, optimizers

    def __enter__(self) -> Self:
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.rates = [group.get("initial_lr", group["lr"]) for group in self.groups]
        return self

    def __exit__(self, *error: object) -> None:
        self.rest()

    def begin(self, step: int) -> None:
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate * warmed(step, self.steps, self.warmup)

    def end(self, updated: bool) -> None:
        pass

    def rest(self) -> None:
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate

    def state(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        pass


class Scheduled:
    """The rates of torch's schedulers, at most one for each optimiser, stepped after every update.

    :raises ValueError: for what is not a scheduler, one of another optimiser, and one that is older than a parameter
        group.
    """

    def __init__(self, scheduler: LRScheduler | Sequence[LRScheduler], optimizers: Sequence[Optimizer]):
        self.schedulers: list[Any] = list(scheduler) if isinstance(scheduler, list | tuple) else [scheduler]
        for one in self.schedulers:
            _check(one, optimizers)
        if len({id(one.optimizer) for one in self.schedulers}) < len(self.schedulers):
            raise ValueError("scheduler: several are of one optimizer; combine them with ChainedScheduler")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def begin(self, step: int) -> None:
        pass

    def end(self, updated: bool) -> None:
        if updated:
            for one in self.schedulers:
                one.step()

    def rest(self) -> None:
        pass

    def state(self) -> Any:
        return [one.state_dict() for one in self.schedulers]

    def restore(self, state: Any) -> None:
        for one, own in zip(self.schedulers, state, strict=True):
            one.load_state_dict(own)

    @property
    def names(self) -> str:
        """The names of their classes."""
        return ", ".join(type(one).__name__ for one in self.schedulers)


def _check(scheduler: Any, optimizers: Sequence[Optimizer]) -> None:
    expected = "expected a torch.optim.lr_scheduler.LRScheduler over the trainer's optimizer"
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(f"scheduler: {expected} that needs no metric; got ReduceLROnPlateau, see EarlyStopping")
    if not isinstance(scheduler, LRScheduler):
        found = f"the class {scheduler.__name__}" if isinstance(scheduler, type) else repr(scheduler)
        raise ValueError(f"scheduler: {expected}, got {found}")
    if not any(scheduler.optimizer is optimizer for optimizer in optimizers):
        raise ValueError(f"scheduler: {expected}; this {type(scheduler).__name__} is over another optimizer")
    known, groups = len(getattr(scheduler, "base_lrs", [])), len(scheduler.optimizer.param_groups)
    if known and known != groups:
        raise ValueError(
            f"scheduler: it knows {known} of the optimizer's {groups} parameter groups; make it after the trainer, "
            "whose objective may add one"
        )
