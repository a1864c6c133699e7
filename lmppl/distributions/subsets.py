r"""The probability of a text that an `Unmasking` writes, summed over all paths: a sum over subsets of its holes.

The partly filled canvas :math:`x_S` depends on *which* holes S are filled and not on their order. So the sum over n!
orders becomes a recursion over the :math:`2^n` subsets of holes, with :math:`\pi` the order:

.. math:: f(\emptyset) = 1, \qquad
          f(S) = \sum_{i \in S} f(S') \, \pi(i \mid x_{S'}) \, p_\theta(w_i \mid x_{S'}, i), \; S' = S \setminus i,
          \qquad p(w) = f(\{0 \dots n-1\})
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.denoising import ask

if TYPE_CHECKING:
    from .unmasking import Unmasking


def summed(d: Unmasking, words: Tensor, kind: Tensor) -> Tensor:
    """Returns log p of texts with ``words`` (R, n) in the holes of canvases ``kind`` (R,): (R,), with gradient."""
    rows, n = words.shape
    hole = torch.arange(n, device=words.device)
    subset = torch.arange(2**n, device=words.device)
    filled = (subset[:, None] >> hole) & 1 == 1  # (S, n)
    count = d.count[kind]
    state = d.canvases[kind][:, None].expand(-1, 2**n, -1)  # (R, S, L)
    for j in range(n):
        at = d.holes[kind, j][:, None, None].expand(-1, 2**n, 1)
        word = torch.where(filled[:, j] & (j < count[:, None]), words[:, j, None], d.lm.mask_id)
        own = torch.where((j < count[:, None]), word, state.gather(2, at)[..., 0])
        state = state.scatter(2, at, own[..., None])
    inside = subset < (1 << count[:, None]) - 1  # (R, S): subsets of the canvas's own holes, except all of them
    r, s = inside.nonzero().unbind(1)
    safe = words.clamp(min=0)

    def each_hole(states: Tensor, kind: Tensor, logits: Tensor, which: Tensor, rows: Tensor) -> Tensor:
        log_order, log_words = d.law(states, kind, logits)
        own = safe[r[rows]][..., None]  # (r, n, 1)
        return log_order[which] + log_words[which].gather(-1, own)[..., 0]

    step = ask(d.lm, state[r, s], kind[r], each_hole)  # (r, n)
    step = step.new_full((rows, 2**n, n), -torch.inf).index_put((r, s), step)
    log_f = step.new_full((rows, 2**n), -torch.inf).index_fill(1, subset[:1], 0.0)
    for size in range(1, n + 1):
        these = (filled.sum(1) == size).nonzero()[:, 0]
        before = these[:, None] ^ (1 << hole)  # (m, n): where hole j is filled, without it
        before = torch.where(filled[these], before, 0)
        terms = (log_f[:, before] + step[:, before, hole]).masked_fill(~filled[these], -torch.inf)
        possible = (terms > -torch.inf).any(-1)
        total = torch.where(possible[..., None], terms, 0.0).logsumexp(-1).masked_fill(~possible, -torch.inf)
        log_f = log_f.index_copy(1, these, total)
    return log_f.gather(1, ((1 << count) - 1)[:, None])[:, 0]
