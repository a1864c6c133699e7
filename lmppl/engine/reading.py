"""How rows of tokens go through a network: packed into one tree (`packing`), or row by row.

Rows are read one by one if packing saves little or the network's attention does not support trees. They are padded on
the right, which needs no mask under causal attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import text
from ..language_model import LanguageModel
from ..rows import distinct_rows
from .chunks import fitting
from .packing import Run, Tree
from .tree_attention import windows_seen
from .trials import agree, verified
from .tuning import TUNING
from .views import by_length


@dataclass(frozen=True)
class Reading:
    """How tokens are read, up to ``end``.

    It is decided once, because the backward pass must read them in the same way.
    """

    lm: LanguageModel
    end: int
    tree: Tree | None  # None: row by row
    at_once: int
    cost: int

    @property
    def repeated(self) -> int:
        """The number of tokens that each part of a split would read again."""
        return 0 if self.tree is None else self.tree.repeated

    def read(self, tokens: Tensor, at: Tensor, wanted: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Returns what ``run`` returns for the tokens, (M, D), and where in it the wanted positions are.

        These are position ``wanted`` (n,) of each row ``at``.
        """
        tokens, wanted = tokens[..., : self.end], wanted.clamp(max=self.end - 1)
        if self.tree is not None:
            out, index = self.tree.read(self.lm, tokens, run)
        else:
            out, index = read_plain(self.lm, tokens, int(wanted.min()), run, self.at_once)
        return out, index.flatten(0, -2)[at, wanted]


def readings(lm: LanguageModel, tokens: Tensor, predicted: Tensor, at: Tensor, earliest: Tensor) -> list[Reading]:
    """Returns how to read the tokens (P, N, B, W).

    There are two ways if the texts before some predictions are short and before others long.

    :param predicted: (n,), the number of tokens from which each wanted token is predicted.
    :param at: (r,), the rows, of P N B, that are needed.
    :param earliest: (r,), the first position that is needed of each.
    """
    found = []
    for view, _ in by_length(lm, predicted):
        end = min(tokens.shape[-1], view.max_length) if view.long is False and view.max_length else tokens.shape[-1]
        plain = len(at.unique()) * end
        tree = packed(lm, tokens[..., :end], plain)
        if tree is not None:
            first = earliest.new_full((tokens.shape[2],), end - 1)
            tree.recall(view, first.scatter_reduce(0, at % tokens.shape[2], earliest, "amin"))
        found.append(Reading(view, end, tree, fitting_tokens(lm), plain if tree is None else tree.cost))
    return found


def packed(lm: LanguageModel, tokens: Tensor, plain: int) -> Tree | None:
    """Returns the tree of these rows (P, N, B, W), or None if reading ``plain`` tokens row by row is better."""
    tree = Tree(tokens) if tokens.shape[0] * tokens.shape[1] > 1 else None
    worthwhile = tree is not None and tree.cost <= TUNING.worthwhile * plain and supports_trees(lm)
    return tree if worthwhile else None


def fitting_tokens(lm: LanguageModel) -> int:
    """Returns how many tokens to read at once, limited by the activations of the feed-forward layers."""
    width = getattr(lm.model.config.get_text_config(), "hidden_size", lm.vocab_size)  # `NGram` has no hidden size
    return fitting(lm, 4 * width, lm.token_budget)


def read_logits(lm: LanguageModel, input_ids: Tensor, first: int = 0, **kwargs: Any) -> Tensor:
    """Returns the logits (B, W - first, V) of positions ``first`` to the end."""
    keep = torch.arange(first, input_ids.shape[1], device=input_ids.device)
    logits: Tensor = lm.forward(input_ids, logits_to_keep=keep, **kwargs).logits
    return logits[:, -len(keep) :]  # some networks ignore logits_to_keep


def read_plain(lm: LanguageModel, tokens: Tensor, first: int, run: Run, at_once: int) -> tuple[Tensor, Tensor]:
    """Returns what ``run`` returns for right-padded rows; equal rows are read once, about ``at_once`` tokens in a pass.

    The result is (M, D), and where in it the rows' positions from ``first`` on are, (P, N, B, W).
    """
    unique, inverse = distinct_rows(tokens.flatten(0, -2))
    parts = [
        run(lm, part.clamp(min=0), first, tokens=int(text.length(part).sum()), use_cache=False)
        for part in unique.split(max(1, at_once // unique.shape[1]))
    ]
    out = torch.cat(parts) if len(parts) > 1 else parts[0]  # (U, W - first, D)
    position = torch.arange(tokens.shape[-1], device=tokens.device) - first
    return out.flatten(0, 1), inverse.view(*tokens.shape[:-1], 1) * out.shape[1] + position


def supports_trees(lm: LanguageModel) -> bool:
    """Returns whether tree attention gives this network's own logits: tried once for each network, on a small tree."""
    return verified(lm, "tree_attention", _tree_agrees)


def windows(lm: LanguageModel) -> list[int | None] | None:
    """Returns how far back each layer attends, from the configuration, because no small trial shows it.

    None if unknown.
    """
    config = lm.model.config.get_text_config()
    if getattr(config, "attention_chunk_size", None) is not None or getattr(config, "attention_layers", None):
        return None
    if counts_columns(lm):
        return None
    window = getattr(config, "sliding_window", None)
    alike = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    reach = {"full_attention": None, "sliding_attention": window}
    kinds = getattr(config, "layer_types", None) or alike
    return [reach[kind] for kind in kinds] if set(kinds) <= set(reach) else None


def counts_columns(lm: LanguageModel) -> bool:
    """Returns whether attention depends on a token's column in the pass, padding included (Llama 4)."""
    config = lm.model.config.get_text_config()
    return bool(getattr(config, "attn_temperature_tuning", False))


def _tree_agrees(lm: LanguageModel) -> bool:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocab_size, (3, 2, 2, 9), generator=generator).to(lm.device)
    ids[:, :, :, :2] = ids[0, 0, 0, :2]
    ids[1, :, :, :5], ids[2, :, :, :4] = ids[0, :, :, :5], ids[0, :, :, :4]
    ids[2, :, :, 7:] = text.PAD
    with windows_seen() as seen:
        plain, at = read_plain(lm, ids, 1, read_logits, fitting_tokens(lm))
        joined, there = Tree(ids).read(lm, ids, read_logits)
    return seen == windows(lm) and agree(lm, joined[there[..., 1:7]], plain[at[..., 1:7]], 1e-4)
