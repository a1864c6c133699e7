"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a matplotlib figure whole or not at all."""
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix, delete=False) as scratch:
        figure.savefig(scratch, dpi=120)
    os.chmod(scratch.name, 0o644)  # temporary files are private
    os.replace(scratch.name, path)


@contextmanager
def fresh_directory(path: Path) -> Iterator[Path]:
    """A new directory to write into, which takes the place of ``path`` at the end, or of nothing after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        yield fresh
        if path.exists():
            path.rename(Path(scratch) / "old")
        fresh.rename(path)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as scratch:
        scratch.write(content)
    os.chmod(scratch.name, 0o644)  # temporary files are private
    os.replace(scratch.name, path)
