"""Masked language models: scores many unfinished texts, equal ones once, in passes of limited size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import text
from ..masked_language_model import MaskedLanguageModel
from ..rows import distinct_rows
from .again import again
from .chunks import fitting
from .tuning import TUNING


def read(lm: MaskedLanguageModel, states: Tensor) -> Tensor:
    """Returns logits (R, L, V) at each position of texts (R, L), from one pass; unspecified at padding.

    :raises ValueError: if a text is longer than the model's context.
    """
    before, after = lm.frame
    framed = text.cat(before, states, after) if len(before) or len(after) else states
    there = framed != text.PAD
    if lm.max_length is not None and framed.shape[1] > lm.max_length:
        raise ValueError(f"canvas: {framed.shape[1]} tokens, but this model's context holds {lm.max_length}")
    pad = lm.tokenizer.pad_token_id
    ids = framed.masked_fill(~there, 0 if pad is None else pad)
    # Padding needs a mask. Without padding there is none, because attention with a mask is slower.
    mask = {} if bool(there.all()) else {"attention_mask": there.long()}
    logits: Tensor = lm.forward(ids, tokens=int(there.sum()), **mask).logits
    logits = logits[:, len(before) : len(before) + states.shape[1]]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def rows_at_once(lm: MaskedLanguageModel, width: int) -> int:
    """Returns how many texts of this width to read together."""
    most = min(lm.token_budget, TUNING.logits_at_once // lm.vocab_size)
    return max(1, fitting(lm, lm.vocab_size, most) // max(1, width))


def ask(
    lm: MaskedLanguageModel,
    states: Tensor,
    kind: Tensor,
    compute: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Returns ``compute`` of each of R texts and its logits, (R, ...); each distinct text is read once.

    ``states`` (R, L) are the texts; ``kind`` (R,) distinguishes texts with equal tokens that are treated differently.
    ``compute(states (k, L), kind (k,), logits (k, L, V), which (r,), rows (r,)) -> (r, ...)`` is called with k distinct
    texts and r of the R rows; row ``rows[i]`` is the text ``which[i]`` of the k. With gradient, what exceeds the token
    budget is read again in the backward pass.
    """
    distinct, index = distinct_rows(torch.cat([states, kind[:, None]], 1))
    order = index.argsort(stable=True)
    ends = index.bincount(minlength=len(distinct)).cumsum(0).tolist()
    step, found, kept = rows_at_once(lm, states.shape[1]), [], 0
    for first in range(0, len(distinct), step):
        part = distinct[first : first + step]
        rows = order[ends[first - 1] if first else 0 : ends[first + len(part) - 1]]

        def of_part(part: Tensor = part, rows: Tensor = rows, first: int = first) -> Tensor:
            states, kind = part[:, :-1], part[:, -1]
            return compute(states, kind, read(lm, states), index[rows] - first, rows)

        kept += part[:, :-1].numel()
        found.append(again(of_part) if torch.is_grad_enabled() and kept > lm.token_budget else of_part())
    return torch.cat(found)[order.argsort()]
