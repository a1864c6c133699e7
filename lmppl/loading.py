"""Loads language models and adapters from a path or from the Hugging Face hub; errors say what is wrong there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from lmppl import damage, files, gguf_files, hub
from lmppl.damage import CheckpointError, first_line

BASE, KIND = "language model", "adapter"  # the kinds of files that are saved
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def checkpoint(name: str, loader: Any = AutoModelForCausalLM, **hf_kwargs: Any) -> tuple[Any, Any]:
    """Returns the model and the tokenizer saved under a path or a hub name; see `LanguageModel.from_pretrained`.

    :param name: a directory, or a name on the hub.
    :param loader: the class of transformers that loads such a model.
    :raises CheckpointError: if there is no complete language model there.
    """
    trust = hf_kwargs.pop("trust_remote_code", False)
    if away := "local_files_only" not in hf_kwargs and hub.out_of_reach(name):
        hf_kwargs["local_files_only"] = True
    shared = ("revision", "token", "cache_dir", "local_files_only")
    tokenizer_kwargs = {k: hf_kwargs[k] for k in shared if k in hf_kwargs}
    if (gguf_file := hf_kwargs.pop("gguf_file", None)) is not None:
        model, tokenizer, info = gguf_files.load(name, gguf_file, **hf_kwargs)
        _refuse_partial(f"{name}: {gguf_file}", model, info)
        return model, tokenizer
    _settle(name)
    if _is_path(name) and not (Path(name) / "config.json").is_file():
        raise CheckpointError(f"{name}: no language model here (no config.json){_hint(Path(name))}")

    def load() -> tuple[Any, Any]:
        if Path(name).is_dir():
            damage.refuse_damaged(Path(name).absolute(), BASE)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust, **tokenizer_kwargs)
        return tokenizer, loader.from_pretrained(name, trust_remote_code=trust, output_loading_info=True, **hf_kwargs)

    try:
        tokenizer, (model, info) = files.read(name, load)
    except (ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file can make transformers raise anything
        reason = f"{hub.unreachable()}: " if away else damage.culprit(Path(name))
        raise CheckpointError(f"{name}: no language model can be loaded ({reason}{first_line(error)})") from error
    if loader is AutoModelForCausalLM and (whole := _encoder_decoders(model)):
        raise CheckpointError(
            f"{name}: it is an encoder-decoder model ({whole[0]}); as a causal language model it would lack its encoder"
        )
    _refuse_partial(name, model, info)
    if loader is AutoModelForCausalLM and (masked := [a for a in _made_as(model) if a.endswith("ForMaskedLM")]):
        # As a causal model, transformers would let it read the tokens that it predicts.
        raise CheckpointError(
            f"{name}: it is a masked language model ({masked[0]}); MaskedLanguageModel.from_pretrained loads it"
        )
    return model, tokenizer


def _encoder_decoders(model: Any) -> list[str]:
    """Returns the names of the classes with an encoder and a decoder from which a checkpoint was saved."""
    if not getattr(type(model.config)(), "is_encoder_decoder", False):
        return []
    return [a for a in _made_as(model) if a in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()]


def _made_as(model: Any) -> list[str]:
    """Returns the names of the classes from which a checkpoint was saved."""
    return [str(name) for name in getattr(model.config, "architectures", None) or []]


def _refuse_partial(name: str, model: Any, info: dict[str, Any]) -> None:
    """Raises CheckpointError if a weight is missing from the checkpoint, or a layer was left out."""
    if info["missing_keys"]:
        raise CheckpointError(f"{name}: weights are missing: {min(info['missing_keys'])}")
    if beyond := damage.layers_beyond(info["unexpected_keys"], model.state_dict()):
        raise CheckpointError(
            f"{name}: config.json describes a smaller network than the weights, which have {beyond[0]}"
        )


def adapter(path: str, device: str) -> tuple[peft.PeftConfig, dict[str, Tensor]]:
    """Returns an adapter's configuration and weights, from a directory or the hub; CheckpointError if there is none."""
    _settle(path)
    if _is_path(path) and not _is_adapter(Path(path)):
        raise CheckpointError(f"{path}: no saved adapter here (no {CONFIG})")
    try:
        return files.read(path, lambda: _adapter(path, device))
    except (ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file can make PEFT and safetensors raise anything
        raise CheckpointError(f"{path}: no adapter can be loaded ({first_line(error)})") from error


def _adapter(path: str, device: str) -> tuple[peft.PeftConfig, dict[str, Tensor]]:
    folder = Path(path)
    if not folder.is_dir():
        away = hub.out_of_reach(path)
        try:
            folder = Path(snapshot_download(path, allow_patterns=[CONFIG, WEIGHTS], local_files_only=away))
        except Exception as error:
            raise FileNotFoundError(hub.unreachable() if away else first_line(error)) from error
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"there is no {file}")
    files.verify(folder.absolute(), KIND)
    try:
        weights = load_file(folder / WEIGHTS, device=device)
    except Exception as error:
        raise ValueError(f"{WEIGHTS}: {first_line(error)}") from error
    try:
        return peft.PeftConfig.from_pretrained(str(folder)), weights
    except Exception as error:
        raise ValueError(f"{CONFIG}: {first_line(error)}") from error


def _is_path(name: str) -> bool:
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def _is_adapter(path: Path) -> bool:
    return (path / CONFIG).is_file()


def _settle(path: str) -> None:
    """Finishes a save that was interrupted."""
    try:
        files.settle(Path(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from error


def _hint(path: Path) -> str:
    """Returns what to do if a path holds something other than a checkpoint."""
    if _is_adapter(path):
        return "; it is an adapter: load its base, then .with_adapter(path)"
    if path.suffix == ".gguf":
        return f"; for a GGUF file: from_pretrained({str(path.parent)!r}, gguf_file={path.name!r})"
    if files := sorted(path.glob("*.gguf")):
        return f"; it holds a GGUF file: pass gguf_file={files[0].name!r}"
    return ""
