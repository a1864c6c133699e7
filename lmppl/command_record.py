"""``command.json``: the commands that wrote a directory, with settings, versions, times and how they ended."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import typer

from . import __version__
from .files import read, writing

FILE, FORMAT = "command.json", "lmppl command 1"
PACKAGES = {"torch": "torch", "transformers": "transformers", "pyro": "pyro-ppl", "peft": "peft"}
RUNNING, FINISHED, INTERRUPTED = "running", "finished", "interrupted"
SILENT = {"quiet", "json"}  # options that do not change a run


def versions() -> dict[str, str]:
    """Returns the versions of lmppl, Python and the main libraries."""
    return {"lmppl": __version__, "python": platform.python_version()} | {k: version(p) for k, p in PACKAGES.items()}


def settings_of(ctx: typer.Context) -> dict[str, Any]:
    """Returns the values of a command's options by name: {"model": "infilling", "set": ["max_tokens=4"]}."""
    found = {}
    for param in ctx.command.params:
        name = max(param.opts, key=len).lstrip("-").replace("-", "_")
        if param.name in ctx.params and name not in SILENT:
            value = ctx.params[param.name]
            found[name] = str(value) if isinstance(value, Path) else value
    return found


def commands(directory: Path) -> list[dict[str, Any]]:
    """Returns the entries that `Record` has written, the latest command last; empty if there are none.

    :raises ValueError: if a file of this name was not written by the package.
    """
    path = directory / FILE

    def load() -> list[dict[str, Any]]:
        try:
            found = json.loads(path.read_bytes())
            if found["format"] != FORMAT:
                raise ValueError(f"its format is {found['format']!r}")
            return list(found["commands"])
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no record of a command of lmppl ({error}); move it away") from None

    return read(directory, load)


class Record:
    """A context that writes ``command.json`` of a directory: one entry per command, for its last run.

    Nothing is written before `begin`, or a successful end: a command that is refused leaves the directory unchanged.

    :param command: "train" or "compare".
    :param settings: all arguments and options by name, with defaults, see `settings_of`.
    :param resumes: whether this run resumes the one of the existing entry; it then keeps that start time.
    :param processes: the number of processes.
    :param kept: whether this process writes; only the first one does.

    ``results``, figures and texts, are written at the end.
    """

    def __init__(
        self,
        directory: Path,
        command: str,
        settings: Mapping[str, Any],
        *,
        resumes: bool = False,
        processes: int = 1,
        kept: bool = True,
    ):
        self.directory, self.command, self.resumes, self.kept = directory, command, resumes, kept
        self.results: dict[str, Any] = {}
        self._began, self._written = time.monotonic(), False
        self.entry: dict[str, Any] = {
            "command": command,
            "argv": ["lmppl", *sys.argv[1:]],
            "settings": dict(settings),
            "seed": settings.get("seed"),
            "versions": versions(),
            "processes": processes,
            "started": _now(),
        }

    def __enter__(self) -> Self:
        return self

    def begin(self, *_: Any) -> None:
        """Writes that the command runs; later calls do nothing, so it can be a callback of `fit`."""
        if not self._written and self.kept:
            before = commands(self.directory)
            own = [entry for entry in before if entry["command"] == self.command]
            self._others = [entry for entry in before if entry not in own]
            self._earlier = own[0] if own and self.resumes else {}
            self._written = True
            self._write(RUNNING)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.begin()
            self._write(FINISHED)
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            self._write(INTERRUPTED)
        else:
            self._write(f"failed: {' '.join(str(error).split()) or type(error).__name__}")

    def _write(self, status: str) -> None:
        if not self._written:
            return
        started, resumed = self.entry["started"], []
        if self._earlier:
            started, resumed = self._earlier["started"], [*self._earlier["resumed"], started]
        seconds = self._earlier.get("seconds", 0.0) + time.monotonic() - self._began
        self.entry |= {"resumed": resumed, "status": status, "finished": _now() if status == FINISHED else None}
        results = {k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in self.results.items()}
        self.entry |= {"seconds": round(seconds, 1), "results": results}
        commands = [*self._others, self.entry | {"started": started}]
        with writing(self.directory, "command") as fresh:
            (fresh / FILE).write_text(json.dumps({"format": FORMAT, "commands": commands}, indent=1, allow_nan=False))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
