"""Rotary positions whose factors depend on the length of the text (LongRoPE, dynamic NTK), fixed for each pass.

transformers takes the length from the pass: the largest position in any row. Here it is set for each pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


class Rotary:
    """The modules of ``model`` whose factors depend on length.

    ``turn``: texts of at most so many tokens are read with one set of factors, longer ones with another; None: there is
    no such length.
    """

    def __init__(self, model: Any) -> None:
        modules = [m for m in model.modules() if hasattr(m, "rope_type") and hasattr(m, "config")]
        self.growing = [m for m in modules if any("dynamic" in kind for kind in _kinds(m))]
        self.turning = [m for m in modules if "longrope" in _kinds(m)]
        self.turn: int | None = min((_turn(m) for m in self.turning), default=None)

    @contextmanager
    def read(self, long: bool | None) -> Iterator[None]:
        """Inside, passes use the factors of long texts (True), or those for their own length (None, False).

        What earlier passes left in the modules has no effect.
        """
        for module in self.growing:
            _reset(module)
        turning = [m for m in self.turning if long and "forward" not in m.__dict__]  # not yet set by an outer call
        for module in turning:
            module.__dict__["forward"] = partial(_long, module)
        try:
            yield
        finally:
            for module in turning:
                del module.__dict__["forward"]


def _kinds(module: Any) -> list[str]:
    """Returns the kind of its factors, or the kinds of all layer types."""
    kinds = module.rope_type
    return list(kinds.values()) if isinstance(kinds, dict) else [kinds]


def _turn(module: Any) -> int:
    parameters = module.config.rope_parameters
    by_layer = parameters.values() if isinstance(module.rope_type, dict) else [parameters]
    return min(int(p["original_max_position_embeddings"]) for p in by_layer if p.get("rope_type") == "longrope")


def _long(module: nn.Module, x: Any, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Returns the module's output for these positions, computed together with a position that only a long text has."""
    beyond = position_ids.new_full((*position_ids.shape[:-1], 1), _turn(module))
    out = type(module).forward(module, x, torch.cat([position_ids, beyond], -1), *args, **kwargs)
    if isinstance(out, torch.Tensor):  # complex numbers
        return out[..., :-1, :]
    return tuple(part[..., :-1, :] for part in out)


def _reset(module: Any) -> None:
    """Removes what a text beyond the context has left."""
    names = [f"{kind}_" for kind in module.rope_type] if isinstance(module.rope_type, dict) else [""]
    for name in names:
        factors = getattr(module, f"{name}inv_freq", None)
        original = getattr(module, f"{name}original_inv_freq", None)
        seen = getattr(module, f"{name}max_seq_len_cached", 0)
        if factors is not None and original is not None and seen > module.original_max_seq_len:
            setattr(module, f"{name}inv_freq", original.to(factors))
            setattr(module, f"{name}max_seq_len_cached", module.original_max_seq_len)
