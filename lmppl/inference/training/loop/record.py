"""What a training run leaves on the disk, a log and a checkpoint, and how it ends when it is told to."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, Self

from ....files import claim
from ....locks import locked
from ...processes.distributed import first_alone, greatest, world
from . import checkpoint as checkpoints
from .log import Log

LOCK = ".lmppl.training.lock"


class Record:
    """A context in which no other run writes this log and this checkpoint; SIGINT and SIGTERM wait for the next save.

    The first process alone writes; what goes wrong there is raised on all.

    :raises LockedError: where another run does; it says which.
    :raises ValueError: where something else is in their place; nothing is touched.
    """

    def __init__(self, log: str | Path | None, checkpoint: str | Path | None):
        self.where = None if checkpoint is None else Path(checkpoint).absolute()
        self._path = None if log is None else Path(log).absolute()
        self._log: Log | None = None
        self._signals = _Signals()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            first_alone(lambda: self._open(stack))
            if self.where is not None:
                stack.enter_context(self._signals)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _open(self, stack: ExitStack) -> None:
        if self.where is not None:
            claim(self.where, (checkpoints.TENSORS, checkpoints.STATE))
            stack.enter_context(locked(self.where / LOCK, wait=0))
        if self._path is not None:
            lock = self._path.with_name(f".{self._path.name}.lmppl-lock")
            stack.enter_context(locked(lock, wait=0, what=self._path))
            self._log = Log(self._path)

    def begin(self, saved: dict[str, Any] | None) -> None:
        """Cut off the log what was written after the checkpoint that is taken up."""

        def cut() -> None:
            if self._log is not None:
                before = (saved or {}).get("log") or {}
                self._log.cut(before.get("bytes") if before.get("path") == self.log.get("path") else None)

        first_alone(cut)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """The log's next line."""
        if self._log is not None:
            self._log.write(step, metrics)

    @property
    def log(self) -> dict[str, Any]:
        """For the checkpoint: where its log is, seen from there, and how long."""
        if self._log is None or self.where is None:
            return {}
        return {"path": os.path.relpath(self._log.path, self.where), "bytes": self._log.size()}

    def told(self) -> int:
        """The signal that told this process, or another of the run, to end; 0 where there was none."""
        if self.where is None:
            return 0
        return greatest(self._signals.caught) if world().size > 1 else self._signals.caught

    def end(self, number: int) -> None:
        """Do what the signal does otherwise."""
        self._signals.deliver(number)


class _Signals:
    """SIGINT and SIGTERM are remembered; a second one does not wait."""

    def __init__(self) -> None:
        self.caught = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._catch)

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self.caught:  # since it was asked for last: while the last checkpoint was written, say
            self.deliver(self.caught)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            self.deliver(number)
        self.caught = number

    def deliver(self, number: int) -> None:
        """KeyboardInterrupt, the exit of a process that was terminated, or a handler of the program's own."""
        self.caught = 0
        before = self._before.get(number, signal.default_int_handler if number == signal.SIGINT else None)
        if not callable(before):
            raise SystemExit(128 + number)
        before(number, None)
