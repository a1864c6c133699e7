"""A key-value cache with spare room: a step writes its own keys and values and does not copy the others."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

from .tuning import TUNING


class Roomy(DynamicLayer):
    """The same as `DynamicLayer`, which copies everything at each step."""

    keys: Tensor  # (R, H, A, D)
    values: Tensor

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.__dict__.update(layer.__dict__)
        self._space: list[Tensor] = []  # keys and values (R, H, A + room, D); empty when rows were reordered

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = self.keys.shape[-2]
        if before < TUNING.sooner_copied:
            return super().update(key_states, value_states)
        after = before + key_states.shape[-2]
        if not self._space or after > self._space[0].shape[-2]:
            self._space = [pad(x, (0, 0, 0, after - before + TUNING.room)) for x in (self.keys, self.values)]
        for space, new in zip(self._space, (key_states, value_states), strict=True):
            space[..., before:after, :] = new
        self.keys, self.values = (space[..., :after, :] for space in self._space)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._space = []
        super().reorder_cache(beam_idx)


def make_room(cache: Cache) -> None:
    """Makes the plain layers of ``cache`` that are not empty grow in place."""
    layers = getattr(cache, "layers", [])
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[i] = Roomy(layer)
