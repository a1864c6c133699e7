"""The modules and weights of a model, and what its passes depend on, kept up to date when the model changes."""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as torch_module

from lmppl.positions import Rotary

STATES = 4  # the number of states of a network whose facts are kept
HARMLESS = {"transformers.utils.output_capturing", "transformers.modeling_utils"}  # their hooks change no number
WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


class Parts:
    """The modules and weights of a model, with base and adapters separate, and facts that hold for its current state.

    ``base_parameters`` and ``buffers`` belong to the base network; ``places`` are where its weights are stored in the
    modules; ``layers`` hold adapters; ``of_adapters`` are the adapters' weights. ``changes`` counts replacements.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.base_parameters: list[nn.Parameter] = []
        self.of_adapters: set[nn.Parameter] = set()
        self.changes = 0
        self._facts: dict[tuple[object, ...], tuple[list[object], dict[str, bool]]] = {}
        self.look()

    def look(self) -> None:
        """Reads the model's modules and weights anew."""
        modules = list(self.model.modules())
        base = [p for p in self.model.parameters() if p not in self.of_adapters]
        if set(base) != set(self.base_parameters):
            self.base_parameters = base
            state = self.model.state_dict(keep_vars=True)
            self.base_keys = frozenset(plain_key(k) for k, w in state.items() if w not in self.of_adapters)
        self.buffers: list[Tensor] = [b for m in modules for b in m._buffers.values() if b is not None]
        owners = [m._parameters for m in modules]
        self.places = [(ps, k) for ps in owners for k, p in ps.items() if p is not None and p not in self.of_adapters]
        self.layers: list[Any] = [m for m in modules if isinstance(m, WRAPPERS)]
        self.checkpointing = [m for m in modules if hasattr(m, "gradient_checkpointing")]
        self.rotary = Rotary(self.model)
        head = self.model.get_output_embeddings()
        self._head = next(((m._modules, k) for m in modules for k, child in m._modules.items() if child is head), None)
        self._attributes = [m.__dict__ for m in modules]
        self._holders = [*chain.from_iterable((m._modules, m._parameters, m._buffers) for m in modules)]
        self._classes = list({type(m): None for m in modules})
        self._held = self._holding()
        # Weights that are sharded over processes appear and disappear within each pass.
        self.sharded = any(isinstance(p, DTensor) for p in self.base_parameters)

    def _holding(self) -> list[object]:
        return [*chain.from_iterable(map(dict.values, self._holders)), *(c.forward for c in self._classes)]

    def follow(self) -> None:
        """Reads the model anew if modules, weights or a class's forward method were replaced since."""
        if self.sharded:
            return
        held = self._holding()
        if len(held) == len(self._held) and all(map(operator.is_, held, self._held)):
            return
        self.look()
        self.changes += 1
        self._facts.clear()

    @property
    def vocab_size(self) -> int:
        """The number of token ids for which the network returns a logit."""
        weight = None if self._head is None else getattr(self._head[0].get(self._head[1]), "weight", None)
        return int(self.model.config.get_text_config().vocab_size if weight is None else weight.shape[0])

    def strangers(self) -> list[object]:
        """Returns what changes a pass and is no weight: hooks and patched forward methods."""
        found: list[object] = [*torch_module._global_forward_hooks.values()]
        found += torch_module._global_forward_pre_hooks.values()
        for own in self._attributes:
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
                found += own["_forward_hooks"].values()
                found += own["_forward_pre_hooks"].values()
                # accelerate patches a model that it spreads over devices; that changes no number.
                found += [own["forward"]] if "forward" in own and "_hf_hook" not in own else []
        return [f for f in found if getattr(f, "__module__", None) not in HARMLESS]

    @property
    def autocast(self) -> torch.dtype | None:
        """The type in which autocast computes; None if it is off."""
        kind = self.base_parameters[0].device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    @property
    def facts(self) -> dict[str, bool]:
        """The facts that are known of the network in its current state.

        The state includes hooks, autocast and the attention function.
        """
        self.follow()
        strangers = self.strangers()
        key = (self.autocast, self.model.config._attn_implementation, *map(id, strangers))
        if key not in self._facts:
            while len(self._facts) >= STATES:
                del self._facts[[*self._facts][1]]
            self._facts[key] = strangers, {}  # keeps the strangers alive, so that no other object gets their ids
        return self._facts[key][1]


def plain_key(key: str) -> str:
    """Returns the key that a weight would have if no adapter wrapped its layer."""
    parts = key.replace(".token_adapter.base_layer.", ".base_layer.").split(".")
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))
