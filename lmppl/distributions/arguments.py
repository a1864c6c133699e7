"""Checks of the arguments of distributions over texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import text
from ..constraints.arguments import as_lm, as_view
from ..view import View

__all__ = ["as_count", "as_lm", "as_text", "as_view", "no_text", "refuse_nan"]


def no_text(fn: Any, value: Any) -> str:
    """Returns what is wrong with a value that should be a text of a distribution, and how to write it."""
    strings = isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(s, str) for s in value))
    if not strings:
        return f"expected a text, a LongTensor of token ids, got {type(value).__name__}"
    stops = [*fn.stop.tolist(), *(fn.stop_strings.strings if getattr(fn, "stop_strings", None) else ())]
    end = next((stop if isinstance(stop, str) else fn.lm.vocabulary.decode([stop]) or "eos" for stop in stops), None)
    stop = "" if end is None else f", stop={end!r}"
    return f"expected a text, a LongTensor of token ids, got {value!r}; write lm.encode({value!r}{stop})"


def as_text(lm: View, given: Tensor | str | list[Any], name: str) -> Tensor:
    """Returns a text; strings are encoded as starts of documents.

    Raises ValueError, naming the argument, for anything else.
    """
    if not isinstance(given, Tensor):
        try:
            given = lm.encode(given, start=True)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    text.validate(given, name, lm.vocab_size)
    return given.to(lm.device)


def as_count(value: int | Tensor, name: str, device: torch.device) -> Tensor:
    """Returns a LongTensor of numbers of tokens; raises ValueError, naming the argument, for anything else."""
    try:
        count = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected a non-negative integer or a LongTensor of them, got {value!r}") from None
    if count.is_floating_point() or count.dtype == torch.bool or bool((count < 0).any()) or not count.numel():
        raise ValueError(f"{name}: expected a non-negative integer or a LongTensor of them, got {value!r}")
    return count


def refuse_nan(log_probs: Tensor) -> None:
    """Raises ValueError if a network's log-probabilities are NaN."""
    if bool(log_probs.isnan().any()):
        raise ValueError("lm: the network's logits are NaN; its weights are damaged or its dtype overflows")
