"""Packs rows that share tokens into one sequence, so that shared tokens go through the network once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .. import text
from ..language_model import LanguageModel
from .prompts import Past, recalled
from .tree_attention import Level, tree

Run = Callable[..., Tensor]
"""``run(lm, input_ids (B, W), first=0, **kwargs) -> (B, W - first, D)``: the network's logits or hidden states."""


class Tree:
    """A packing of rows (P, N, B, W) into trees.

    For each b there is a shared root; for each (n, b) the longest row is the trunk, and the others are branches. A row
    without tokens is no row. Only the first n of all ``(n, b)`` need to have rows.
    """

    def __init__(self, tokens: Tensor):
        P, N, B, W = tokens.shape
        length = text.length(tokens)  # (P, N, B)
        longest = length.argmax(0)  # (N, B)
        self.trunk = trunk = tokens.gather(0, longest[None, ..., None].expand(1, N, B, W))[0]  # (N, B, W)
        self.shared = _common(tokens, trunk)  # (P, N, B): tokens each row has in common with its trunk
        common = torch.minimum(_common(trunk, trunk[0]), self.shared.amin(0))  # (N, B)
        self.common = common.masked_fill(text.length(trunk) == 0, W).amin(0)  # (B,)
        self.root = root = self.common if N > 1 else length.new_zeros(B)  # (B,)
        own = length - self.shared  # (P, N, B)
        self.order = (own == 0).int().argsort(dim=0, stable=True)  # rows with tokens of their own come first
        self.branches = int((own > 0).sum(0).max())
        self.length = length
        self.A = int(root.max())
        self.S = int((text.length(trunk) - root).max())
        self.behind: Past | None = None  # the root, if it was read before
        self.L = int(own.max())

    @property
    def cost(self) -> int:
        """The number of tokens that go through the network, padding included."""
        N, B = self.trunk.shape[:2]
        return B * (self.A + N * (self.S + self.branches * self.L))

    @property
    def repeated(self) -> int:
        """The number of tokens that each part of a split would read again."""
        N, B = self.trunk.shape[:2]
        return 0 if B > 1 else self.A if N > 1 else self.A + self.S

    def recall(self, lm: LanguageModel, first: Tensor) -> None:
        """Takes the root from prompts that were read before.

        It ends before ``first`` (B,), the first position whose output is needed.
        """
        self.behind = recalled(lm, self.trunk[0], torch.minimum(self.common, first))
        if self.behind is not None:
            self.A, self.root = 0, self.behind.length
            self.S = int((text.length(self.trunk) - self.root).max())

    def read(self, lm: LanguageModel, tokens: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Returns what ``run`` returns for the packed rows, and where in it each row's positions are."""
        N, B, W = self.trunk.shape
        P = self.branches
        chosen = self.order[:P]
        behind, A, S, L, root, shared = self.behind, self.A, self.S, self.L, self.root, self.shared
        device = tokens.device
        branch = shared.gather(0, chosen).permute(2, 1, 0)  # (B, N, P): the position at which each branch begins
        branches = tokens.gather(0, chosen[..., None].expand(P, N, B, W))
        # The segments of each level are slices of rows; positions are counted from the row's start.
        position = [
            torch.arange(A, device=device).expand(B, A),
            (root[:, None, None] + torch.arange(S, device=device)).expand(B, N, S),
            branch[..., None] + torch.arange(L, device=device),  # (B, N, P, L)
        ]
        source = [self.trunk[0], self.trunk.transpose(0, 1), branches.permute(2, 1, 0, 3)]
        end = [root, text.length(self.trunk).T, self.length.gather(0, chosen).permute(2, 1, 0)]
        ids, places, count = [], [], 0
        for p, s, e in zip(position, source, end, strict=True):
            inside = p < e[..., None]
            ids.append((s.gather(-1, p.clamp(max=s.shape[-1] - 1)) * inside).flatten(1))
            places.append((p * inside).flatten(1))
            count += int(inside.sum())
        visible_root = root[:, None].expand(B, N)
        every = (
            Level(
                (),
                A if behind is None else behind.cache.get_seq_length(),
                (),
                torch.zeros_like(root),
                read=behind is None,
            ),
            Level((N,), S, (visible_root,), visible_root),
            Level((N, P), L, (visible_root[..., None].expand(B, N, P), branch - root[:, None, None]), branch),
        )
        kept = [i for i, level in enumerate(every) if level.tokens > 0]
        levels = tuple(
            replace(every[i], visible=tuple(v for j, v in enumerate(every[i].visible) if j in kept)) for i in kept
        )
        past = {} if behind is None else {"past_key_values": behind.cache}
        out = run(
            lm,
            torch.cat(ids, 1),
            position_ids=torch.cat(places, 1),
            tokens=count,
            use_cache=False,
            **past,
            within=partial(tree, lm.model, levels),
        )
        n, column = torch.arange(N, device=device)[:, None, None], torch.arange(W, device=device)
        p = self.order.argsort(0)[..., None]  # (every row, N, B, 1): the number of its branch
        c, r = shared[..., None], root[:, None]
        in_trunk = A + n * S + column - r
        in_branch = A + N * S + (n * P + p) * L + column - c
        index = torch.where(column < r, column, torch.where(column < c, in_trunk, in_branch))
        index = index.clamp(max=out.shape[1] - 1) + torch.arange(B, device=device)[:, None] * out.shape[1]
        return out.flatten(0, 1), index  # (B (A + N S + N P L), D)


def _common(rows: Tensor, reference: Tensor) -> Tensor:
    """Returns the number of leading tokens that each row shares with its reference."""
    return ((rows == reference) & (rows != text.PAD)).cumprod(-1).sum(-1)
