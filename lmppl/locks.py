"""Locks that processes share: a file that one of them holds, and that says who does."""

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
except ImportError:  # a system without them: whoever asks has the lock
    fcntl = None  # type: ignore[assignment]

PATIENCE = 60.0  # seconds that a short write may take
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # a file system that knows none
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # what a link points to is somebody else's
_held: set[int] = set()


class LockedError(OSError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, wait: float = PATIENCE, what: Path | None = None) -> Iterator[None]:
    """Hold the lock ``path``, a file that is there while somebody does; that of a process that ended holds nobody up.

    :param what: that is guarded; default: the directory of the lock.
    :raises LockedError: where somebody else still has it after ``wait`` seconds; it says who.

    >>> with locked(Path("out/.lock")):
    ...     write("out")
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
        if os.getpid() == process:  # and not a child that was forked inside
            _held.discard(descriptor)
            with suppress(OSError):
                path.unlink()  # before others can have it
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
        except FileNotFoundError:  # its last holder has removed it meanwhile
            deadline += 0.005
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise LockedError(f"{what} is in use by {_holder(path)}; wait for it, or name another")
        time.sleep(0.005)


def _has(descriptor: int) -> bool:
    """Whether this process now has the lock on an open file."""
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
    """A forked child holds nothing: its parent's locks end with the parent."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
