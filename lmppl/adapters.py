"""One network shared by many views: the base weights, and any number of adapters that never disturb one another.

PEFT's own switches (`set_adapter`, `disable_adapters`) change `requires_grad` of weights that belong to others. Here a
view is switched on by setting the state of the tuner layers alone.
"""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from textwrap import shorten
from typing import Any, Concatenate, ParamSpec, TypeVar

import peft
import torch
from huggingface_hub import snapshot_download
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lmppl import files, hub
from lmppl.activations import fuse_activations
from lmppl.parts import WRAPPERS, Parts, plain_key

P = ParamSpec("P")
T = TypeVar("T")
Within = Callable[[], AbstractContextManager[None]]
# These start from an adapter of their own and leave the base weights as they are; "pissa", "olora" and others do not.
INITIALISATIONS = (True, False, "gaussian", "orthogonal")
# In these, layers whose weights are read past an adapter (most of which PEFT refuses): "all-linear" is all the others.
STATE_SPACE = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
UNADAPTABLE = ["conv1d", "out_proj", "dt_proj"]
KIND, CONFIG, WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"


class CheckpointError(OSError, ValueError):
    """A path or name from which nothing can be loaded."""


@dataclass(eq=False)
class Adapter:
    """One adapter: its PEFT configuration, its own parameters and the layers that hold them.

    Its views hold it, and what is computed again for them; when nobody does, the network is rid of it.
    """

    name: str
    config: peft.PeftConfig
    parameters: list[nn.Parameter]
    layers: set[nn.Module]


class Lock:
    """A lock that one thread may take several times; a copy of it, as of the model that it guards, is a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._waiting: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1
        try:
            self._work()
        except BaseException:
            self._depth -= 1
            self._lock.release()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            self._work()
        finally:
            self._depth -= 1
            self._lock.release()

    def between(self, task: Callable[[], None]) -> None:
        """Do this holding the lock, but not inside of what anybody does with it: now, or when they are done."""
        self._waiting.append(task)
        if self._lock.acquire(blocking=False):
            try:
                if not self._depth:
                    with self:
                        pass
            finally:
                self._lock.release()

    def _work(self) -> None:
        while self._depth == 1 and self._waiting:
            self._waiting.popleft()()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


def _locked(method: Callable[Concatenate[Network, P], T]) -> Callable[Concatenate[Network, P], T]:
    """The method, which holds the network's lock."""

    @wraps(method)
    def held(self: Network, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.lock:
            return method(self, *args, **kwargs)

    return held


class Network(Parts):
    """The Hugging Face model that all views share, with the tokens it has scored and what is known about it.

    ``lock`` is held by whoever runs the model or changes what a run depends on.
    """

    def __init__(self, model: Any) -> None:
        if any(isinstance(m, WRAPPERS) for m in model.modules()):
            raise ValueError(
                "model already holds PEFT layers; pass the base model and load adapters with .with_adapter(path)"
            )
        model.eval()
        fuse_activations(model)
        for module in model.modules():
            # Padding here is on the right of causal attention, where no mask is needed: nothing to warn of, nothing to
            # look for in the tokens of every pass.
            if hasattr(module, "warn_if_padding_and_no_attention_mask"):
                module.__dict__["warn_if_padding_and_no_attention_mask"] = _no_warning
        super().__init__(model)
        self.lock = Lock()
        self.tokens_scored = 0
        self.adapters: weakref.WeakValueDictionary[str, Adapter] = weakref.WeakValueDictionary()
        self.active: str | None = None  # the name of the adapter that is switched on
        self.kept: dict[str, object] = {}

    # Views -----------------------------------------------------------------------------------------------------------

    def activate(self, adapter: Adapter | None) -> None:
        """Let the next forward pass use this adapter alone (None: the base weights), `requires_grad` untouched."""
        if self.active != (None if adapter is None else adapter.name):
            self._switch(adapter)

    def _switch(self, adapter: Adapter | None) -> None:
        for layer in self.layers:
            layer._disable_adapters = adapter is None or layer not in adapter.layers
            if adapter is not None and layer in adapter.layers:
                layer._active_adapter = [adapter.name]
        self.active = None if adapter is None else adapter.name

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"adapters": dict(self.adapters)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, adapters=weakref.WeakValueDictionary())
        for adapter in state["adapters"].values():
            self._keep(adapter)

    def _keep(self, adapter: Adapter) -> None:
        """Know the adapter, as long as somebody else does."""
        self.adapters[adapter.name] = adapter
        lock, network = self.lock, weakref.ref(self)

        def take_out(name: str = adapter.name) -> None:
            found = network()
            if found is not None and name not in found.adapters:
                found._take_out(name)

        def dropped() -> None:
            lock.between(take_out)

        weakref.finalize(adapter, dropped).atexit = False

    @contextmanager
    def base_frozen(self) -> Iterator[None]:
        """No graph is built for the base weights inside.

        Passes see others in their place, that share their memory: with `requires_grad` off, a backward pass that is
        under way in another thread would lose their gradients. (Sharded weights are switched nevertheless.)
        """
        places = [] if self.sharded else [(owner, key, owner.get(key)) for owner, key in self.places]
        trained = [(owner, key, p) for owner, key, p in places if type(p) is nn.Parameter and p.requires_grad]
        frozen = {p: nn.Parameter(p.detach(), requires_grad=False) for *_, p in trained}
        switched = [
            p for p in self.base_parameters if p.requires_grad and (self.sharded or type(p) is not nn.Parameter)
        ]
        for owner, key, p in trained:
            owner[key] = frozen[p]
        for p in switched:
            p.requires_grad = False
        try:
            yield
        finally:
            for owner, key, p in trained:
                owner[key] = p
            for p in switched:
                p.requires_grad = True

    def run(
        self,
        adapter: Adapter | None,
        input_ids: Tensor,
        within: Within = nullcontext,
        long: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """One forward pass of the base weights with this adapter, gradients reaching its parameters alone.

        ``long``: see `Rotary.read`. Raises ValueError where modules of the adapter were replaced.

        Where the model's gradient checkpointing is on, layers are computed again in the backward pass: with the adapter
        of this pass, whichever has been active since, and inside ``within()``.
        """

        @contextmanager
        def setting() -> Iterator[None]:
            with self.lock:
                self.activate(adapter)
                freeze = adapter is not None and torch.is_grad_enabled()
                with self.base_frozen() if freeze else nullcontext(), self.rotary.read(long), within():
                    yield

        with self.lock:
            self.follow()
            if adapter is not None:
                self.refuse_removed(adapter)
            if adapter is not None and not adapter.layers.issubset(self.layers):
                raise ValueError(
                    f"modules of {type(self.model).__name__} that held adapter {adapter.name!r} were replaced; "
                    "save the adapter before, and load it with .with_adapter(path)"
                )
            if self.model.training:
                self.model.eval()
            layers = self._layers_to_repeat(kwargs) if torch.is_grad_enabled() else []
            try:
                for layer in layers:
                    layer.__dict__["forward"] = partial(_repeated, layer, setting)
                with setting():
                    return self.model(input_ids, **kwargs)
            finally:
                for layer in layers:
                    layer.__dict__.pop("forward", None)

    def _layers_to_repeat(self, kwargs: dict[str, Any]) -> list[Any]:
        """The layers to compute again in the backward pass; RuntimeError where that would not be right."""
        marked = [m for m in self.checkpointing if m.gradient_checkpointing]
        layers = [m for m in marked if isinstance(m, GradientCheckpointingLayer)]
        reason = ""
        if marked and not layers:
            reason = f"{type(self.model).__name__} has no layers that can be computed again"
        elif marked and any(isinstance(m, ParamWrapper) for m in self.layers):
            # They replace a parameter while a layer runs, which a backward pass under way does not survive.
            reason = "layers with adapters on bare parameters (experts) cannot be computed again"
        elif marked and kwargs.setdefault("use_cache", False):
            reason = "a pass that fills a cache cannot be computed again"
        if reason:
            raise RuntimeError(
                f"gradient checkpointing: {reason}; switch it off: lm.model.activation_checkpointing_disable()"
            )
        return layers

    @_locked
    def add(self, config: peft.PeftConfig, name: str | None) -> Adapter:
        """Inject a new adapter; whatever was there keeps its weights, its gradients and its `requires_grad`."""
        name = self._name(name)
        config = copy.deepcopy(config)  # PEFT writes into it
        config.inference_mode = False
        config.task_type = config.task_type or peft.TaskType.CAUSAL_LM
        config.base_model_name_or_path = config.base_model_name_or_path or self.model.name_or_path
        _refuse(config)
        if getattr(config, "target_modules", None) == "all-linear":
            config.exclude_modules = config.exclude_modules or self._unadaptable() or None
        before = {p: p.requires_grad for p in self.model.parameters()}
        done = False
        try:
            with warnings.catch_warnings():
                # Set for GPT-2 alone, whose linear layers are transposed: PEFT mends it and says so each time.
                warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                # Of an output layer that shares the embeddings' weight: what it warns of is merging.
                warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
                peft.inject_adapter_in_model(config, self.model, adapter_name=name)
            cast_adapter_dtype(self.model, name)  # half precision is too coarse for an optimiser's steps
            done = True
        except (ValueError, TypeError) as error:
            reason = first_line(error)
            raise ValueError(f"peft_config does not fit {type(self.model).__name__}: {reason}") from error
        finally:
            # With the attribute in place, PEFT would take the next adapter for one more of this tuner's.
            self.model.__dict__.pop("peft_config", None)
            for p, requires_grad in before.items():
                p.requires_grad = requires_grad
            if not done:
                self._take_out(name)  # half of it, where PEFT failed midway
            own = [p for p in self.model.parameters() if p not in before]
            self.of_adapters.update(own)
            self.look()
            self.model.eval()
            self._switch(None)  # PEFT leaves new layers on
        layers = {m for m in self.layers if name in _names(m)}
        adapter = Adapter(name, config, [p for p in own if p.requires_grad], layers)
        self._keep(adapter)
        return adapter

    @_locked
    def remove(self, adapter: Adapter) -> None:
        """Take an adapter out of the model; its views can no longer be used."""
        self.refuse_removed(adapter)
        del self.adapters[adapter.name]
        self._take_out(adapter.name)

    def refuse_removed(self, adapter: Adapter) -> None:
        """ValueError where the adapter was taken out."""
        if self.adapters.get(adapter.name) is not adapter:
            raise ValueError(f"adapter {adapter.name!r} was removed; add it again with .with_adapter")

    def _take_out(self, name: str) -> None:
        """Leave no module and no weight of the adapter of this name."""
        holding = [m for m in self.model.modules() if isinstance(m, WRAPPERS)]
        for layer in holding:
            layer._active_adapter = []  # else PEFT would choose another, and switch the weights of the rest
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
        """The layers that "all-linear" leaves out: they are no linear functions, or are read past an adapter."""
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
        """Inject the adapter saved under `path`; raises CheckpointError if there is none or it does not fit.

        After an error the model is as it was.
        """
        try:
            config, weights = files.read(path, lambda: _saved(path, str(self.base_parameters[0].device)))
        except (ImportError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a damaged file can make PEFT and safetensors raise anything
            raise CheckpointError(f"{path}: no adapter can be loaded ({first_line(error)})") from error
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
        """Write the base weights as a Hugging Face checkpoint in which no adapter shows."""
        state = {plain_key(k): w for k, w in self.model.state_dict().items() if plain_key(k) in self.base_keys}
        self.model.save_pretrained(directory, state_dict=state, safe_serialization=True)

    @_locked
    def save_adapter(self, adapter: Adapter, directory: Path) -> None:
        """Write one adapter in the layout of PEFT."""
        self.refuse_removed(adapter)
        with self._peft_config():
            state = peft.get_peft_model_state_dict(self.model, adapter_name=adapter.name, save_embedding_layers=False)
        plain = {plain_key(k): w for k, w in state.items()}
        if len(plain) == len(state):  # else PEFT itself wrapped one layer several times, as it does for experts
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


def first_line(error: BaseException) -> str:
    """What an error says, on one line of bounded length; where its first line announces the next, both."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(" ".join(lines[: 2 if lines[0].endswith(":") else 1]), 200)


def _saved(path: str, device: str) -> tuple[peft.PeftConfig, dict[str, Tensor]]:
    """An adapter's configuration and weights, from a directory or from the Hugging Face hub."""
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


def _wrapped(layer: Any) -> Any:
    """What a layer that holds no adapter any more was put around."""
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
    return weight.detach().cpu().contiguous().clone()  # safetensors refuses tensors that share memory


def _refuse(config: peft.PeftConfig) -> None:
    kind = config.peft_type
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(f"peft_config of type {kind} has no layers of its own to switch; use LoRA or a like method")
    if getattr(config, "bias", "none") != "none":
        raise ValueError(f"peft_config.bias={config.bias!r} trains the base model's biases; use bias='none'")
    start = getattr(config, "init_lora_weights", True)
    if start not in INITIALISATIONS:
        raise ValueError(f"peft_config.init_lora_weights={start!r} changes the base weights; use True or 'gaussian'")


def _no_warning(*args: Any) -> None:
    """In place of a warning about padding without a mask."""


def _repeated(layer: Any, setting: Within, *args: Any, **kwargs: Any) -> Any:
    """The layer's output, of which the backward pass keeps the input only."""

    def compute(*args: Any, **kwargs: Any) -> Any:
        with setting():
            return type(layer).forward(layer, *args, **kwargs)

    # transformers' own recomputation asks for train() mode, and so for dropout.
    return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
