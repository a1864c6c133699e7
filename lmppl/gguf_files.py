"""Language models in GGUF files: loads weights, tokenizer and chat template of one file as an ordinary network."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import cached_file

from lmppl import hub
from lmppl.damage import CheckpointError, first_line

MAGIC = b"GGUF"
# Arguments that say where the file is; all others say how to load it.
WHERE = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")
SCALING = (".rope.scaling.type", ".rope.scale_linear")


def gguf() -> ModuleType:
    """Returns the library; raises ImportError that says how to install it."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the library gguf: pip install pyro-lmppl[gguf]") from error
    return gguf


def load(name: str, gguf_file: str | os.PathLike[str], **kwargs: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Returns the model, its tokenizer and transformers' loading report, all from one file.

    Weights are dequantised; the model can be saved and trained like any other. Other files beside it are not read.
    Raises ImportError without gguf, and CheckpointError naming the file.
    """
    library = gguf()
    path = _find(name, os.fspath(gguf_file), {k: kwargs.pop(k) for k in WHERE if k in kwargs})
    try:
        with _by_itself(path) as alone:
            place = {"pretrained_model_name_or_path": alone.parent, "gguf_file": str(alone)}
            tokenizer = AutoTokenizer.from_pretrained(**place)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **place, quantization_config=GgufConfig(dequantize=True), output_loading_info=True, **kwargs
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # readers of a damaged file raise anything
        raise CheckpointError(f"{path}: {_what_is_wrong(library, path, error)}") from error
    model, info = loaded
    if scaling := _unread_scaling(path, model.config):
        raise CheckpointError(
            f"{path}: its rotary positions are scaled ({scaling}), which transformers does not read from a GGUF file; "
            "pass rope_parameters=, or use the checkpoint in safetensors"
        )
    model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = name
    return model, tokenizer, info


def _find(name: str, gguf_file: str, where: dict[str, Any]) -> Path:
    """Returns the path of the file: below a directory, else from the hub or its cache."""
    below = Path(name) / (where.get("subfolder") or "") / gguf_file
    if Path(name).is_dir() and not below.is_file():
        raise CheckpointError(f"{below}: there is no such GGUF file")
    if "local_files_only" not in where and hub.out_of_reach(name):
        where = where | {"local_files_only": True}
    try:
        path = Path(str(cached_file(name, gguf_file, **where)))
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: {gguf_file} cannot be read ({first_line(error)})") from error
    if magic != MAGIC:
        raise CheckpointError(f"{path}: this is not a GGUF file (it begins with {magic!r})")
    return path


@contextmanager
def _by_itself(path: Path) -> Iterator[Path]:
    """Yields the file in a directory of its own: transformers would prefer a tokenizer that lies beside it."""
    with tempfile.TemporaryDirectory() as scratch:
        alone = Path(scratch) / path.name
        alone.symlink_to(path.resolve())
        yield alone


def _what_is_wrong(library: ModuleType, path: Path, error: Exception) -> str:
    try:
        library.GGUFReader(path)
    except Exception as damage:  # likewise
        return f"this GGUF file is cut off or damaged ({first_line(damage)})"
    return f"no language model can be loaded ({first_line(error)})"


def _unread_scaling(path: Path, config: Any) -> str | None:
    """Returns what scales rotary positions in the file but not in the configuration made from it.

    None if nothing does.
    """
    from transformers.integrations.gguf import read_gguf_metadata  # slow: it imports many tokenizers

    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type", "default") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if kinds - {"default"}:
        return None
    metadata, tensors = read_gguf_metadata(str(path))
    stated = [
        f"{key} = {value}" for key, value in metadata.items() if key.endswith(SCALING) and value not in (1, "none")
    ]
    return next(iter(stated + [name for name in tensors if name.startswith("rope_f")]), None)
