r"""Decoding with an adapter: its LoRA is merged into the weights, so that a layer is a single product again.

.. math:: W' = W + s\, B A

Merging costs as much as a step of some 16 rows; then every step is as fast as one of the base network. The network's
own weights do not change.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from ..adapters import Network
from ..language_model import LanguageModel
from ..layers import Linear
from .tuning import TUNING


class Weights(dict[Linear, Tensor]):
    """The merged weights of layers, by layer."""


@torch.no_grad()
def merged(lm: LanguageModel) -> Weights:
    """Returns the merged weight (out, in) of each layer that the view's adapter changes by two factors only.

    Empty for the base network, with hooks, autocast or sharding, or if the weights would be too large.
    """
    network = lm.network
    with network.lock:
        network.follow()
        adapter = network.adapters.get(lm.adapter_name or "")
        if adapter is None or network.sharded or _otherwise(network):
            return Weights()
        network.activate(adapter)
        layers = [m for m in adapter.layers if isinstance(m, Linear) and m.mergeable]
        if sum(m.base_layer.weight.numel() for m in layers) > TUNING.merged:
            return Weights()
        # Writing into memory that was used before is faster; it is reused if no other decoder still reads it.
        kept, reader = cast(Any, network.kept.get("merged", ({}, lambda: None)))
        usable = {m: w for m, w in kept.items() if not w.is_inference()} if reader() is None else {}
        weights = Weights({m: m.merge(usable.get(m)) for m in layers})
        network.kept["merged"] = dict(weights), weakref.ref(weights)
        return weights


def _otherwise(network: Network) -> bool:
    """Returns whether hooks or autocast affect what a layer computes."""
    return network.autocast is not None or bool(network.strangers())


@contextmanager
def reading(lm: LanguageModel, weights: Weights) -> Iterator[None]:
    """Inside, the layers use these weights, unless hooks or autocast were switched on since."""
    weights = weights if weights and not _otherwise(lm.network) else Weights()
    for layer, weight in weights.items():
        layer.__dict__["whole"] = weight
    try:
        yield
    finally:
        for layer in weights:
            del layer.__dict__["whole"]
