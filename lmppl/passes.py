"""Passes through one network under any of its adapters, without effects on the other adapters.

PEFT's own switches (`set_adapter`, `disable_adapters`) change the ``requires_grad`` of other adapters' weights. Here a
view is switched on by setting the state of the adapter layers only.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lmppl.activations import fuse_activations
from lmppl.layers import widen_output
from lmppl.parts import Parts

Within = Callable[[], AbstractContextManager[None]]


@dataclass(eq=False)
class Adapter:
    """One adapter: its PEFT configuration, its own parameters, and the layers that hold them.

    Its views refer to it, and so do the computations that a backward pass repeats for them. When nothing refers to it
    any more, the network removes it.
    """

    name: str
    config: peft.PeftConfig
    parameters: list[nn.Parameter]
    layers: set[nn.Module]


class Lock:
    """A lock that one thread may take several times. A copy, e.g. as part of a copied model, is a new lock."""

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
        """Runs a task with the lock held, but not in the middle of another holder's work: now, or when that is done."""
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


class Passes(Parts):
    """The passes of a Hugging Face model, and the number of tokens they have read.

    ``lock`` is held by whoever runs the model or changes what a run depends on. ``adapters`` are the model's adapters
    by name, as long as something else refers to them. ``kept`` stores what is remembered between passes.
    """

    def __init__(self, model: Any) -> None:
        model.eval()
        fuse_activations(model)
        widen_output(model)
        for module in model.modules():
            # Padding is on the right here, and causal attention needs no mask for it. The warning would be wrong, and
            # it searches the tokens of every pass.
            if hasattr(module, "warn_if_padding_and_no_attention_mask"):
                module.__dict__["warn_if_padding_and_no_attention_mask"] = _no_warning
        super().__init__(model)
        self.lock = Lock()
        self.tokens_scored = 0
        self.adapters: weakref.WeakValueDictionary[str, Adapter] = weakref.WeakValueDictionary()
        self.active: str | None = None  # the name of the adapter that is switched on
        self.kept: dict[str, object] = {}

    def activate(self, adapter: Adapter | None) -> None:
        """Makes the next forward pass use only this adapter (None: the base weights).

        ``requires_grad`` does not change.
        """
        if self.active != (None if adapter is None else adapter.name):
            self._switch(adapter)

    def _switch(self, adapter: Adapter | None) -> None:
        for layer in self.layers:
            layer._disable_adapters = adapter is None or layer not in adapter.layers
            if adapter is not None and layer in adapter.layers:
                layer._active_adapter = [adapter.name]
        self.active = None if adapter is None else adapter.name

    def refuse_removed(self, adapter: Adapter) -> None:
        """Raises ValueError if the adapter was removed."""
        if self.adapters.get(adapter.name) is not adapter:
            raise ValueError(f"adapter {adapter.name!r} was removed; add it again with .with_adapter")

    @contextmanager
    def base_frozen(self) -> Iterator[None]:
        """Inside, no graph is built for the base weights.

        Passes see other parameters in their place, which share their memory. Switching ``requires_grad`` off instead
        would lose the gradients of a backward pass that runs in another thread. (Sharded weights are switched
        nevertheless.)
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
        layers_again: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Runs one forward pass of the base weights with this adapter; gradients reach the adapter's parameters only.

        ``long``: see `Rotary.read`. If the model's gradient checkpointing is on, or with ``layers_again`` where that is
        possible, the backward pass computes layers again: with the adapter of this pass, whichever has been active
        since, and inside ``within()``. Raises ValueError if modules of the adapter were replaced.
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
            if getattr(self.model, "_require_grads_hooks", None):
                # transformers' checkpointing needs these hooks. Layers are computed again in another way here, and the
                # hooks would only add leaves to the graph that train nothing.
                self.model.disable_input_require_grads()
            layers = self._layers_to_repeat(kwargs, layers_again) if torch.is_grad_enabled() else []
            before = [layer.__dict__.get("forward") for layer in layers]  # the user's own patch, if any
            try:
                for layer in layers:
                    layer.__dict__["forward"] = partial(_repeated, layer.forward, setting)
                with setting():
                    return self.model(input_ids, **kwargs)
            finally:
                for layer, forward in zip(layers, before, strict=True):
                    del layer.__dict__["forward"]
                    if forward is not None:
                        layer.__dict__["forward"] = forward

    def _layers_to_repeat(self, kwargs: dict[str, Any], wanted: bool) -> list[Any]:
        """Returns the layers that the backward pass computes again.

        Raises RuntimeError if the model's gradient checkpointing is on and cannot be used.
        """
        marked = [m for m in self.checkpointing if m.gradient_checkpointing]
        layers = [m for m in (marked or self.checkpointing) if isinstance(m, GradientCheckpointingLayer)]
        reason = ""
        if not layers:
            reason = f"{type(self.model).__name__} has no layers that can be computed again"
        elif any(isinstance(m, ParamWrapper) for m in self.layers):
            # They replace a parameter while a layer runs; a backward pass under way would fail.
            reason = "layers with adapters on bare parameters (experts) cannot be computed again"
        elif kwargs.get("use_cache", not marked):
            reason = "a pass that fills a cache cannot be computed again"
        if not marked:
            return layers if wanted and not reason else []
        if reason:
            raise RuntimeError(
                f"gradient checkpointing: {reason}; switch it off: lm.model.activation_checkpointing_disable()"
            )
        kwargs["use_cache"] = False
        return layers


def _no_warning(*args: Any) -> None:
    """Replaces a warning about padding without a mask."""


def _repeated(forward: Callable[..., Any], setting: Within, *args: Any, **kwargs: Any) -> Any:
    """Returns a layer's output, for which the backward pass keeps only the input."""

    def compute(*args: Any, **kwargs: Any) -> Any:
        with setting():
            return forward(*args, **kwargs)

    # transformers' own recomputation needs train() mode, which would switch dropout on.
    return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
