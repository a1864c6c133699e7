"""Facts about a network that only a trial can show."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..language_model import LanguageModel

_DIFFERENT = (AttributeError, TypeError, ValueError, KeyError, IndexError, RuntimeError, NotImplementedError)


def verified(lm: LanguageModel, fact: str, trial: Callable[[LanguageModel], bool]) -> bool:
    """Returns whether ``trial`` succeeds for this network. It runs once; its tokens are not counted.

    ``fact`` is its name.

    Any error in it counts as failure. With other hooks, another autocast, or after modules were replaced, it runs
    again.
    """
    network = lm.network
    with network.lock:
        facts = network.facts
        if fact not in facts:
            before, facts[fact] = network.tokens_scored, False
            try:
                with torch.no_grad():
                    # The same rotary factors for all texts of the trial, whatever their length.
                    facts[fact] = trial(lm if network.rotary.turn is None else lm.reading(long=True))
            except _DIFFERENT:
                pass
            finally:
                network.tokens_scored = before
        return facts[fact]


def agree(lm: LanguageModel, found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Returns whether logits are equal up to rounding: ``tolerance`` in single precision, 5e-2 in half precision."""
    if (lm.network.autocast or lm.dtype) in (torch.float16, torch.bfloat16):
        tolerance = 5e-2
    found, expected = found.float(), expected.float()
    return bool((found - expected).abs().max() <= tolerance * (1 + expected.abs().max()))


def precise(logits: Tensor) -> Tensor:
    """Returns logits in single precision if the network's are in half precision, else unchanged."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
