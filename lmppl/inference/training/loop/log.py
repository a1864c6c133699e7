"""The log of a training run: a file with a JSON line for every step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ....files import sync

BEGINNING = b'{"step": '


class Log:
    """Appends lines and never rewrites them; lines after the last checkpoint are cut off when a run resumes.

    :raises ValueError: where the file exists and is not such a log; it is then unchanged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        content = self.path.read_bytes() if self.path.exists() else b""
        *lines, rest = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            if line.strip() and not _is_line(line):
                raise ValueError(f"log: line {number} of {self.path} is not one of a training log; name another file")
        if rest and not _is_line(rest) and not rest.startswith(BEGINNING) and not BEGINNING.startswith(rest):
            raise ValueError(f"log: {self.path} does not end in a line of a training log; name another file")
        self._content, self._whole = content, len(content) - (0 if _is_line(rest) else len(rest))

    def cut(self, size: int | None = None) -> None:
        """Prepares to write after the first ``size`` bytes if a line ends there, else after the last whole line.

        A killed run may leave half a line.
        """
        content = self._content
        keep = self._whole
        if size is not None and size <= len(content) and (not size or content[size - 1 : size] == b"\n"):
            keep = size
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if keep < len(content):
            os.truncate(self.path, keep)  # atomic: if killed, the log is either unchanged or cut
        if keep and content[keep - 1 : keep] != b"\n":
            self._append(b"\n")
        self._content = b""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line; numbers that are not finite become null, because JSON has none of them.

        :raises ValueError: naming a metric that JSON cannot hold; the rest of the line is written.
        """
        found: dict[str, Any] = {}
        wrong = []
        for name, value in metrics.items():
            number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            try:
                found[name] = None if isinstance(number, float) and not math.isfinite(number) else number
                json.dumps(found[name], allow_nan=False)
            except (TypeError, ValueError):
                del found[name]
                wrong.append(name)
        self._append(json.dumps({"step": step} | found | {"step": step}).encode() + b"\n")
        if wrong:
            kind = type(metrics[wrong[0]]).__name__
            raise ValueError(f"callback: the metric {wrong[0]!r} is a {kind}, which the log cannot hold; add numbers")

    def size(self) -> int:
        """How many bytes the file has, once they are on the disk."""
        if not self.path.exists():
            return 0
        sync(self.path)
        return self.path.stat().st_size

    def _append(self, line: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            file.write(line)


def _is_line(line: bytes) -> bool:
    try:
        found: Any = json.loads(line)
    except ValueError:
        return False
    return isinstance(found, dict) and isinstance(found.get("step"), int)
