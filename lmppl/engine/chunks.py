"""How much goes through the network at once."""

from __future__ import annotations

from ..view import View
from .tuning import TUNING


def chunk_rows(lm: View, tokens_per_row: int) -> int:
    """Returns how many rows of ``tokens_per_row`` tokens fit the token budget."""
    budget = min(lm.token_budget, TUNING.logit_budget // lm.vocab_size)
    return max(1, budget // max(1, tokens_per_row))


def fitting(lm: View, floats: int, most: int) -> int:
    """Returns how many tokens to compute at once, at most ``most``.

    ``floats`` is how many numbers each token makes at the widest layer. On a processor the result is what fits its
    caches; with more, sums and activation functions would wait for memory.
    """
    if lm.device.type != "cpu" or is_sharded(lm):  # processes that share weights must make the same passes
        return most
    return min(most, max(TUNING.fewest, TUNING.cache // floats))


def drawn_from(lm: View) -> int:
    """Returns how many rows of logits to draw tokens from at once; on a processor, as many as fit its caches."""
    floats = TUNING.looked_at if lm.device.type == "cpu" else TUNING.logits_at_once
    return max(1, floats // lm.vocab_size)


def is_sharded(lm: View) -> bool:
    """Returns whether the weights are sharded over processes; then every process must take part in every pass."""
    return lm.network.sharded
