"""The adapters of one network: adds, removes, saves and loads any number of them."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from lmppl import loading
from lmppl.damage import CheckpointError, first_line
from lmppl.layers import fuse_adapters
from lmppl.loading import CONFIG, KIND, WEIGHTS
from lmppl.parts import WRAPPERS, plain_key
from lmppl.passes import Adapter, Lock, Passes

__all__ = ["CONFIG", "KIND", "WEIGHTS", "Adapter", "CheckpointError", "Lock", "Network", "first_line"]

P = ParamSpec("P")
T = TypeVar("T")
# These do not change the base weights; "pissa", "olora" and others do.
INITIALISATIONS = (True, False, "gaussian", "orthogonal")
# What an adapter of these types computes of a token depends on more than the tokens before it.
OTHER_INPUTS = {
    "LILY": "mixes all tokens of a pass, those of other texts included",
    "POLY": "needs the number of a task for each text",
    "XLORA": "mixes several saved adapters",
}
# The same for these settings of a LoRA; the second changes the base network's layers.
OTHER_LORA = {
    "alora_invocation_tokens": "starts at a token of the text",
    "layer_replication": "repeats layers of the base model",
    "arrow_config": "mixes several saved adapters",
}
# Model types with layers whose weights are used without the adapter around them (PEFT refuses most of these layers).
# There "all-linear" means all other layers.
STATE_SPACE = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
UNADAPTABLE = ["conv1d", "out_proj", "dt_proj"]


def _locked(method: Callable[Concatenate[Network, P], T]) -> Callable[Concatenate[Network, P], T]:
    """The method, with the network's lock held."""

    @wraps(method)
    def held(self: Network, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.lock:
            return method(self, *args, **kwargs)

    return held


class Network(Passes):
    """The Hugging Face model that all views share, with its adapters."""

    def __init__(self, model: Any) -> None:
        if any(isinstance(m, WRAPPERS) for m in model.modules()):
            raise ValueError(
                "model already holds PEFT layers; pass the base model and load adapters with .with_adapter(path)"
            )
        super().__init__(model)

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: each for key, each in self.kept.items() if key != "merged"}
        return self.__dict__ | {"adapters": dict(self.adapters), "kept": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, adapters=weakref.WeakValueDictionary())
        for adapter in state["adapters"].values():
            self._keep(adapter)

    def _keep(self, adapter: Adapter) -> None:
        """Registers the adapter, for as long as something else refers to it."""
        self.adapters[adapter.name] = adapter
        lock, network = self.lock, weakref.ref(self)

        def take_out(name: str = adapter.name) -> None:
            found = network()
            if found is not None and name not in found.adapters:
                found._take_out(name)

        def dropped() -> None:
            lock.between(take_out)

        weakref.finalize(adapter, dropped).atexit = False

    @_locked
    def add(self, config: peft.PeftConfig, name: str | None) -> Adapter:
        """Adds a new adapter; weights, gradients and ``requires_grad`` of everything else do not change."""
        name = self._name(name)
        config = copy.deepcopy(config)  # PEFT changes it
        config.inference_mode = False
        if hasattr(self.model, "prepare_inputs_for_generation"):  # PEFT has no task type for masked language models
            config.task_type = config.task_type or peft.TaskType.CAUSAL_LM
        config.base_model_name_or_path = config.base_model_name_or_path or self.model.name_or_path
        _refuse(config)
        if getattr(config, "target_modules", None) == "all-linear":
            own = getattr(config, "exclude_modules", None) or []
            if not isinstance(own, str) and (others := self._unadaptable()):
                config.exclude_modules = [*own, *others]
        before = {p: p.requires_grad for p in self.model.parameters()}
        done = False
        try:
            with warnings.catch_warnings():
                # GPT-2's linear layers are transposed: PEFT corrects the setting and warns each time.
                warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                # About an output layer that shares the embeddings' weight; it matters only for merging.
                warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
                peft.inject_adapter_in_model(config, self.model, adapter_name=name)
            fuse_adapters(self.model)
            cast_adapter_dtype(self.model, name)  # half precision is too coarse for an optimiser's steps
            done = True
        except (ValueError, TypeError) as error:
            reason = first_line(error)
            raise ValueError(f"peft_config does not fit {type(self.model).__name__}: {reason}") from error
        finally:
            # If this attribute stayed, PEFT would add the next adapter to this tuner.
            self.model.__dict__.pop("peft_config", None)
            for p, requires_grad in before.items():
                p.requires_grad = requires_grad
            if not done:
                self._take_out(name)  # what PEFT added before it failed
            own = [p for p in self.model.parameters() if p not in before]
            self.of_adapters.update(own)
            self.look()
            self.model.eval()
            self._switch(None)  # PEFT leaves new adapters switched on
        layers = {m for m in self.layers if name in _names(m)}
        adapter = Adapter(name, config, [p for p in own if p.requires_grad], layers)
        self._keep(adapter)
        return adapter

    @_locked
    def remove(self, adapter: Adapter) -> None:
        """Removes an adapter from the model; its views can no longer be used."""
        self.refuse_removed(adapter)
        del self.adapters[adapter.name]
        self._take_out(adapter.name)

    def _take_out(self, name: str) -> None:
        """Removes every module, weight and fact of the adapter with this name."""
        self.kept.pop("activations", None)
        self.kept.pop("merged", None)
        holding = [m for m in self.model.modules() if isinstance(m, WRAPPERS)]
        for layer in holding:
            layer._active_adapter = []  # else PEFT would activate another and change requires_grad of the rest
            if isinstance(layer, AuxiliaryTrainingWrapper):
                layer.delete_adapter(name, None)
            elif name in _names(layer):
                layer.delete_adapter(name)
        for module in list(self.model.modules()):
            for key, child in module._modules.items():
                while isinstance(child, WRAPPERS) and not isinstance(module, WRAPPERS) and not _names(child):
                    child = module._modules[key] = _wrapped(child)
        self.of_adapters.intersection_update(self.model.parameters())
        self.look()
        self._switch(None)

    def _unadaptable(self) -> list[str]:
        """Returns the layers that "all-linear" leaves out.

        They are not linear functions, or their weights are used without the adapter around them.
        """
        if self.model.config.model_type in STATE_SPACE:
            return UNADAPTABLE
        own = [
            (name, m)
            for name, m in self.model.named_modules()
            if isinstance(m, nn.Linear) and type(m).__module__.startswith("transformers.models.")
        ]
        with torch.no_grad():
            answers = {type(m): m(m.weight.new_zeros(1, m.in_features)) for _, m in own}
        several = {kind for kind, answer in answers.items() if not isinstance(answer, torch.Tensor)}
        return sorted({name.rpartition(".")[2] for name, m in own if type(m) in several})  # Llama 4's routers

    @_locked
    def load(self, path: str, name: str | None) -> Adapter:
        """Adds the adapter saved under ``path``; raises CheckpointError if there is none or it does not fit.

        After an error the model is unchanged.
        """
        config, weights = loading.adapter(path, str(self.base_parameters[0].device))
        name = self._name(name)
        try:
            adapter = self.add(config, name)
        except ValueError as error:
            raise CheckpointError(f"{path}: the adapter does not fit this model ({first_line(error)})") from error
        own = set(adapter.parameters)
        keys = {k for k, p in self.model.named_parameters() if p in own}
        try:
            with self._peft_config(), torch.no_grad():
                plain = {k.removeprefix("base_model.model."): w for k, w in weights.items()}
                result: Any = peft.set_peft_model_state_dict(self.model, plain, adapter.name)
            wrong = [k for k in result.missing_keys if k in keys] + result.unexpected_keys
            if wrong:
                raise KeyError(wrong[0])
        except Exception as error:
            self.remove(adapter)
            reason = f"{WEIGHTS}: {first_line(error)}"
            raise CheckpointError(f"{path}: the adapter does not fit this model ({reason})") from error
        return adapter

    @_locked
    def save_base(self, directory: Path) -> None:
        """Saves the base weights as a Hugging Face checkpoint without any adapter."""
        state = {plain_key(k): w for k, w in self.model.state_dict().items() if plain_key(k) in self.base_keys}
        if lost := self.base_keys.difference(state):
            raise RuntimeError(f"{min(lost)} cannot be saved while an adapter wraps its layer; remove that adapter")
        self.model.save_pretrained(directory, state_dict=state, safe_serialization=True)

    @_locked
    def save_adapter(self, adapter: Adapter, directory: Path) -> None:
        """Saves one adapter in PEFT's layout."""
        self.refuse_removed(adapter)
        with self._peft_config():
            state = peft.get_peft_model_state_dict(self.model, adapter_name=adapter.name, save_embedding_layers=False)
        plain = {plain_key(k): w for k, w in state.items()}
        if len(plain) == len(state):  # else PEFT wrapped one layer several times, as it does for experts
            state = plain
        save_file(
            {f"base_model.model.{k}": _alone(w) for k, w in state.items()},
            directory / WEIGHTS,
            metadata={"format": "pt"},
        )
        config = copy.deepcopy(adapter.config)
        config.inference_mode = True
        config.save_pretrained(str(directory))

    @contextmanager
    def _peft_config(self) -> Iterator[None]:
        self.model.peft_config = {name: adapter.config for name, adapter in self.adapters.items()}
        try:
            yield
        finally:
            del self.model.peft_config

    def _name(self, name: str | None) -> str:
        taken = {part for key, _ in self.model.named_parameters() for part in key.split(".")}
        if name is None:
            number = next(n for n in range(len(taken)) if f"adapter_{n}" not in taken.union(self.adapters))
            return f"adapter_{number}"
        if name in self.adapters:
            raise ValueError(f"name={name!r} is taken; the adapters are {sorted(self.adapters)}")
        if not name or "." in name or name in taken:
            raise ValueError(f"name={name!r} must be a word without dots that is no module's name")
        return name


def _wrapped(layer: Any) -> Any:
    """Returns the layer that a wrapper without adapters was put around."""
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return layer.original_module
    if hasattr(layer, "unload_and_optionally_merge_module") and not isinstance(layer, ParamWrapper):
        return layer.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
    return layer.base_layer


def _names(layer: Any) -> set[str]:
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return set(layer._adapters)
    return set(layer._all_available_adapter_names())


def _alone(weight: Tensor) -> Tensor:
    return weight.detach().cpu().contiguous().clone()  # safetensors does not save tensors that share memory


def _refuse(config: peft.PeftConfig) -> None:
    kind = config.peft_type
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(f"peft_config of type {kind} has no layers of its own to switch; use LoRA or a similar method")
    if reason := OTHER_INPUTS.get(getattr(kind, "value", str(kind))):
        raise ValueError(f"peft_config of type {kind} {reason}; use LoRA or a similar method")
    for setting, reason in OTHER_LORA.items():
        if getattr(config, setting, None):
            raise ValueError(f"peft_config.{setting} {reason}, which a view of shared weights cannot; leave it out")
    if getattr(config, "bias", "none") != "none":
        raise ValueError(f"peft_config.bias={config.bias!r} trains the base model's biases; use bias='none'")
    start = getattr(config, "init_lora_weights", True)
    if start not in INITIALISATIONS:
        raise ValueError(f"peft_config.init_lora_weights={start!r} changes the base weights; use True or 'gaussian'")
