"""What is wrong with a checkpoint: which file of it is damaged, or of another one than the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten

from safetensors import safe_open
from tokenizers import Tokenizer

from . import files

# What transformers reads, or goes on without in silence.
CONFIGURATIONS = ("config.json", "generation_config.json")


class CheckpointError(OSError, ValueError):
    """A path or name from which nothing can be loaded."""


def first_line(error: BaseException) -> str:
    """What an error says, on one line of bounded length; where its first line announces the next, both."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(" ".join(lines[: 2 if lines[0].endswith(":") else 1]), 200)


def refuse_damaged(folder: Path, kind: str) -> None:
    """ValueError where weights are not those that were saved, or a configuration is no JSON object.

    A configuration may be edited; weights of a directory without a manifest are only read.
    """
    files.verify(folder, kind, ".safetensors")
    for name in CONFIGURATIONS:
        if (folder / name).is_file():
            try:
                _read(folder / name)
            except Exception as error:
                raise ValueError(f"{name}: {error}") from error


def culprit(folder: Path) -> str:
    """The first file that cannot be read by itself, for the beginning of a message; else nothing."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            _read(path)
        except Exception:  # of any kind, as readers are
            return f"{path.name}: "
    return ""


def layers_beyond(unexpected: Iterable[str], known: Iterable[str]) -> list[str]:
    """Weights of layers that the network would have if there were more of them."""
    kinds = {_numberless(key) for key in known}
    return sorted(key for key in unexpected if _numberless(key) in kinds)


def _numberless(key: str) -> str:
    return re.sub(r"\d+", "#", key)


def _read(path: Path) -> None:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt"):
            return
    if path.name == "tokenizer.json":
        Tokenizer.from_file(str(path))
    elif path.suffix == ".json" and not isinstance(json.loads(path.read_bytes()), dict):
        raise ValueError("it holds no JSON object")
