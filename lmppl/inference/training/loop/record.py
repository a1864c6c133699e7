"""The files that a training run writes, a log and a checkpoint, and how it ends on a signal."""

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

    Only the first process writes; its errors are raised on all.

    :raises LockedError: where another run writes them; the message names it.
    :raises ValueError: where something else is in their place; it is then unchanged.
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
        """Cuts off the lines of the log that were written after the checkpoint that is resumed."""

        def cut() -> None:
            if self._log is not None:
                before = (saved or {}).get("log") or {}
                self._log.cut(before.get("bytes") if before.get("path") == self.log.get("path") else None)

        first_alone(cut)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the next line of the log."""
        if self._log is not None:
            self._log.write(step, metrics)

    @property
    def log(self) -> dict[str, Any]:
        """For the checkpoint: the relative path of its log, and its length."""
        if self._log is None or self.where is None:
            return {}
        return {"path": os.path.relpath(self._log.path, self.where), "bytes": self._log.size()}

    def told(self) -> int:
        """The signal that asked this process, or another of the run, to end; 0 where there was none."""
        if self.where is None:
            return 0
        return greatest(self._signals.caught) if world().size > 1 else self._signals.caught

    def end(self, number: int) -> None:
        """Does what the signal would have done."""
        self._signals.deliver(number)


class _Signals:
    """Remembers SIGINT and SIGTERM; a second one acts at once."""

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
        if self.caught:  # it came after the last look at it, e.g. during the last save
            self.deliver(self.caught)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            self.deliver(number)
        self.caught = number

    def deliver(self, number: int) -> None:
        """Raises KeyboardInterrupt, exits like a terminated process, or calls the program's own handler."""
        self.caught = 0
        before = self._before.get(number, signal.default_int_handler if number == signal.SIGINT else None)
        if not callable(before):
            raise SystemExit(128 + number)
        before(number, None)
