"""Finds what is wrong with a checkpoint: which of its files is damaged, or belongs to another checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten

from safetensors import safe_open
from tokenizers import Tokenizer

from . import files

# transformers reads these, and ignores one that is damaged without saying so.
CONFIGURATIONS = ("config.json", "generation_config.json")


class CheckpointError(OSError, ValueError):
    """The error that nothing can be loaded from a path or name."""


def first_line(error: BaseException) -> str:
    """Returns an error's message on one line of limited length; two lines if the first ends with a colon."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(" ".join(lines[: 2 if lines[0].endswith(":") else 1]), 200)


def refuse_damaged(folder: Path, kind: str) -> None:
    """Raises ValueError if weights are not those that were saved, or a configuration is no JSON object.

    A configuration may be edited. In a directory without a manifest, weights are not compared.
    """
    files.verify(folder, kind, ".safetensors")
    for name in CONFIGURATIONS:
        if (folder / name).is_file():
            try:
                _read(folder / name)
            except Exception as error:
                raise ValueError(f"{name}: {error}") from error


def culprit(folder: Path) -> str:
    """Returns the name of the first file that cannot be read, as the beginning of a message; "" if there is none."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            _read(path)
        except Exception:  # readers of damaged files raise anything
            return f"{path.name}: "
    return ""


def layers_beyond(unexpected: Iterable[str], known: Iterable[str]) -> list[str]:
    """Returns the weights of layers that the network would have if it had more of them."""
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
