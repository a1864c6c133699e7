"""Trackers: the metrics in TensorBoard, Weights & Biases and others, through accelerate's interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from ...processes.distributed import first_alone, world

DIRECTORY = "trackers"  # in the directory of the log


class Trackers:
    """A context in which the metrics of every step go to some trackers; only the first process has them.

    :param trackers: names that accelerate knows, "tensorboard", "wandb", ..., or instances of its ``GeneralTracker``.
        A tracker that is not started yet is started here with the settings, and finished at the end.
    :param where: a directory for trackers that need one.
    :param name: the name of the run.

    :raises ValueError: for anything else.
    :raises ImportError: where the package of a name is not installed.
    """

    def __init__(self, trackers: Sequence[Any] | None, where: Path, name: str, settings: Mapping[str, Any]):
        if trackers is not None and not isinstance(trackers, list | tuple):
            raise ValueError(f"trackers: expected a list of names or trackers, ['tensorboard'], got {trackers!r}")
        self.settings = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        self.trackers = [_made(given, where, name) for given in trackers or []] if world().rank == 0 else []
        self.own: list[Any] = []

    def __enter__(self) -> Self:
        first_alone(self._start)
        return self

    def __exit__(self, *error: object) -> None:
        for tracker in self.own:
            tracker.finish()

    def _start(self) -> None:
        for tracker in self.trackers:
            if getattr(tracker, "tracker", None) is None:
                accelerate_knows_this_process()
                tracker.start()
                self.own.append(tracker)
                tracker.store_init_configuration(dict(self.settings))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Sends a step's metrics: numbers and strings, which is what trackers hold."""
        for tracker in self.trackers:
            tracker.log({name: x for name, x in _plain(metrics).items() if isinstance(x, Real | str)}, step=step)


def accelerate_knows_this_process() -> None:
    """Creates accelerate's state: some trackers (W&B's) write to accelerate's log, which fails without it."""
    from accelerate import PartialState

    PartialState()


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {n: x.item() if isinstance(x, Tensor) and x.numel() == 1 else x for n, x in metrics.items()}


def _made(given: Any, where: Path, name: str) -> Any:
    """The tracker of a name, or the tracker itself."""
    try:
        from accelerate import tracking
    except ImportError as error:
        raise ImportError("trackers: accelerate is not installed; pip install 'pyro-lmppl[trackers]'") from error
    if isinstance(given, tracking.GeneralTracker):
        return given
    known = tracking.LOGGER_TYPE_TO_CLASS
    if not isinstance(given, str) or given not in known:
        found = f"the class {given.__name__}" if isinstance(given, type) else repr(given)
        raise ValueError(
            f"trackers: expected one of {', '.join(map(str, known))}, or an instance of accelerate's GeneralTracker, "
            f"got {found}"
        )
    kinds, there = (set(map(str, x)) for x in (tracking.LoggerType.list(), tracking.get_available_trackers()))
    if given in kinds and given not in there:
        what = "'pyro-lmppl[trackers]'" if given == "tensorboard" else given
        raise ImportError(f"trackers: {given!r} is not installed; pip install {what}")
    kind = known[given]
    return kind(name, str(where)) if kind.requires_logging_directory else kind(name)
