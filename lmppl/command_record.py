"""``command.json``: which commands wrote a directory, with which settings and versions, when, and how they ended."""

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


SILENT = {"quiet", "json"}  # what is printed is no part of a run


def versions() -> dict[str, str]:
    """Of lmppl, Python and the libraries that compute."""
    return {"lmppl": __version__, "python": platform.python_version()} | {k: version(p) for k, p in PACKAGES.items()}


def settings_of(ctx: typer.Context) -> dict[str, Any]:
    """What a command was called with, by the names of its options: {"model": "infilling", "set": ["max_tokens=4"]}."""
    found = {}
    for param in ctx.command.params:
        name = max(param.opts, key=len).lstrip("-").replace("-", "_")
        if param.name in ctx.params and name not in SILENT:
            value = ctx.params[param.name]
            found[name] = str(value) if isinstance(value, Path) else value
    return found


def commands(directory: Path) -> list[dict[str, Any]]:
    """What `Record` has written there, the command that ran last at the end; nothing where no command has.

    :raises ValueError: where a file of this name is none of ours.
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
    """A context that keeps ``command.json`` of a directory: an entry for each command, that of its last run.

    Nothing is written before `begin`, or a good end: a command that is refused leaves the directory as it was.

    :param command: "train" or "compare".
    :param settings: every argument and option by its name, whether it was given or not, see `settings_of`.
    :param resumes: whether the run goes on that the entry there is of; it keeps when that began.
    :param processes: how many compute; the first one alone has a ``Record`` that is ``kept``.

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
        """Say that the command runs; calls after the first do nothing, so that it may be a callback of `fit`."""
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
