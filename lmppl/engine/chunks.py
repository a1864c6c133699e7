"""How much of a pass goes through the network at once."""

from __future__ import annotations

from ..view import View
from .tuning import TUNING


def chunk_rows(lm: View, tokens_per_row: int) -> int:
    """How many rows of ``tokens_per_row`` tokens fit the token budget."""
    budget = min(lm.token_budget, TUNING.logit_budget // lm.vocab_size)
    return max(1, budget // max(1, tokens_per_row))


def fitting(lm: View, floats: int, most: int) -> int:
    """How many tokens, of ``most``, to compute at once where each makes ``floats`` numbers at the widest place.

    On a processor as many as its caches hold: sums and activation functions of more would wait for memory.
    """
    if lm.device.type != "cpu" or is_sharded(lm):  # processes that share weights must make the same passes
        return most
    return min(most, max(TUNING.fewest, TUNING.cache // floats))


def drawn_from(lm: View) -> int:
    """How many rows of logits to draw tokens from at once: on a processor as many as stay in its caches meanwhile."""
    floats = TUNING.looked_at if lm.device.type == "cpu" else TUNING.logits_at_once
    return max(1, floats // lm.vocab_size)


def is_sharded(lm: View) -> bool:
    """Whether the weights are spread over processes, so that every pass is a collective that all must enter."""
    return lm.network.sharded
