"""A function in a process of its own, which has imported already what this one has: that takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from paths import ROOT

ALONE: dict[str, str] = {}


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def forked(
    call: Callable[[], object], environments: Sequence[dict[str, str]] = (ALONE,), timeout: float = 600
) -> list[Ended]:
    """Calls a function at the root of the repository, in as many processes as there are environments, all at once."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        said = [(Path(directory, f"{i}.out"), Path(directory, f"{i}.err")) for i in range(len(environments))]
        processes = [fork.Process(target=_called, args=(call, *each)) for each in zip(environments, said, strict=True)]
        with warnings.catch_warnings():  # this process may have threads, of which the new ones need none
            warnings.simplefilter("ignore", DeprecationWarning)
            for process in processes:
                process.start()
        left = processes
        while left and not any(p.exitcode for p in processes) and wait([p.sentinel for p in left], timeout):
            left = [p for p in left if p.is_alive()]
        for process in processes:  # where one has failed, the others may wait for it
            process.kill()
            process.join()
        return [Ended(p.exitcode, *(f.read_text() for f in each)) for p, each in zip(processes, said, strict=True)]


def _called(call: Callable[[], object], environment: dict[str, str], said: tuple[Path, Path]) -> None:
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, (name, path) in enumerate(zip(("stdout", "stderr"), said, strict=True), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115
    call()
