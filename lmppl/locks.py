"""Locks between processes: a file that one process holds, with a note of which one."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # a system without such locks: every process gets the lock
    fcntl = None  # type: ignore[assignment]

PATIENCE = 60.0  # seconds; longer than a short write takes
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # a file system without locks
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # do not write to what a link points to
_held: set[int] = set()


class LockedError(OSError):
    """The error that another process holds the lock."""


@contextmanager
def locked(path: Path, wait: float = PATIENCE, what: Path | None = None) -> Iterator[None]:
    """Holds the lock ``path``, a file that exists while it is held; a process that has ended does not block others.

    :param path: the file.
    :param wait: the largest number of seconds to wait.
    :param what: what the lock protects, for the message; None: the directory of the lock.
    :raises LockedError: if another process still holds it after ``wait`` seconds; the message says which.

    >>> with locked(Path("out/.lock")):
    ...     size = Path("out/note.txt").write_text("one process at a time")
    """
    path, process = path.absolute(), os.getpid()
    descriptor = _acquire(path, wait, what or path.parent)
    _held.add(descriptor)
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": process, "host": socket.gethostname(), "since": since}).encode())
        yield
    finally:
        if os.getpid() == process:  # not in a child that was forked while the lock was held
            _held.discard(descriptor)
            with suppress(OSError):
                path.unlink()  # before the lock is released
            os.close(descriptor)


def _acquire(path: Path, wait: float, what: Path) -> int:
    deadline = time.monotonic() + wait
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o644)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            if _has(descriptor) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:  # its last holder removed it in the meantime
            deadline += 0.005
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise LockedError(f"{what} is in use by {_holder(path)}; wait for it, or name another")
        time.sleep(0.005)


def _has(descriptor: int) -> bool:
    """Returns whether this process now holds the lock on an open file."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
    return True


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _let_go() -> None:
    """Releases all locks in a forked child: its parent's locks end with the parent."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
