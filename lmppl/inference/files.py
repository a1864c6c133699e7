"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a matplotlib figure whole or not at all."""
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix, delete=False) as scratch:
        figure.savefig(scratch, dpi=120)
    os.replace(scratch.name, path)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as scratch:
        scratch.write(content)
    os.replace(scratch.name, path)
