"""Scoring: the logits at every token of many continuations, each shared token computed once.

Rows that share tokens (one prompt with many continuations; all prefixes of one text, each followed by an observation)
are packed into a token tree (`tree_attention`); the sharing is found from the tokens themselves.  Where packing saves
little, or a network attends in some other way, rows go through the network one by one, right-padded, which needs no
mask under causal attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import text
from ..language_model import LanguageModel
from ..rows import distinct_rows, first_equal
from . import distinct
from .again import again, kept_tokens, read_again
from .chunks import fitting
from .packing import Run, Tree
from .tree_attention import windows_seen
from .trials import agree, precise, verified
from .tuning import TUNING
from .unembedding import hidden_states, splits, unembed_each
from .views import by_length

Head = Callable[[Tensor, Tensor], Tensor]
"""``head(logits (r, T, V), rows (r,)) -> (r, ...)``; what a caller keeps of a chunk's logits, float32 or better."""


def with_bos(lm: LanguageModel, context: Tensor) -> Tensor:
    """The context as the network reads it.

    A bos comes first iff the tokenizer puts one there by default or the context is empty, unless it begins with one.
    """
    empty = text.length(context) == 0
    if not (lm.adds_bos or bool(empty.any())):
        return context
    if lm.bos_id is None:
        raise ValueError("prompt: an empty prompt needs a bos or eos token, and this tokenizer has neither")
    wanted = empty
    if lm.adds_bos:
        wanted = (context[..., :1] != lm.bos_id).all(-1)  # of an empty one too
        if not bool(wanted.any()):
            return context
    bos = torch.full((*context.shape[:-1], 1), lm.bos_id, device=context.device)
    return text.cat(bos.masked_fill(~wanted[..., None], text.PAD), context)


def chunk_rows(lm: LanguageModel, tokens_per_row: int) -> int:
    """How many rows of ``tokens_per_row`` tokens fit the token budget."""
    budget = min(lm.token_budget, TUNING.logit_budget // lm.vocab_size)
    return max(1, budget // max(1, tokens_per_row))


def score(lm: LanguageModel, context: Tensor, value: Tensor, head: Head, key: Tensor | None = None) -> Tensor:
    """Apply ``head`` to the logits that predict each token of ``value`` after ``context``.

    ``context`` (*batch, Lc) and ``value`` (*batch, T), leading axes broadcasting; the result is (*batch, ...).
    ``logits[:, t]`` predicts ``value[..., t]``; what it holds at padded positions is unspecified.  ``rows`` index the
    flattened batch.  Equal rows of tokens are read once.  ``key`` (rows, K), integers: what else ``head`` knows of a
    row; rows that are equal in it too have one result.
    """
    context = with_bos(lm, context)
    batch = torch.broadcast_shapes(context.shape[:-1], value.shape[:-1])
    width = value.shape[-1]
    if batch.numel() == 0 or width == 0:
        rows = torch.arange(batch.numel(), device=value.device)
        empty = torch.zeros(batch.numel(), width, lm.vocab_size, device=value.device)
        return head(empty, rows).unflatten(0, batch) if batch else head(empty, rows).squeeze(0)
    start = text.length(context).expand(batch)
    tokens = text.cat(context, value[..., :-1]).expand(*batch, -1)  # (*batch, W)
    if lm.max_length is not None and tokens.shape[-1] > lm.max_length:
        raise ValueError(
            f"prompt: prompt and text together have {tokens.shape[-1] + 1} tokens, but this model's context holds "
            f"{lm.max_length}; shorten the prompt or max_tokens"
        )
    # Axis 0 (prefixes, or particles) shares most, then axis 1; the rest are separate observations: (P, N, B, W).
    shape = (batch + (1, 1))[:2] if len(batch) < 2 else batch[:2]
    rows = tokens.reshape(-1, tokens.shape[-1])
    asked = _asked(rows, start.flatten(), width, key)
    grid = distinct.grid(asked.read.view(*shape, -1), text.length(rows))
    parts = _parts(lm, distinct.at(rows, grid), grid, asked)
    if torch.is_grad_enabled():
        parts = iter(_kept(lm, [*parts]))
    result = _in_order(((part.results, _scores(lm, part, head)) for part in parts), len(asked.rows))
    result = result if asked.result is None else result.index_select(0, asked.result)
    return result.reshape(*batch, *result.shape[1:])


class _Asked(NamedTuple):
    """Of which rows (K,) results are wanted, and where."""

    rows: Tensor  # (K,)
    wanted: Tensor  # (K, T): where in its row each token of the value is predicted
    length: Tensor  # (K,): the tokens of each
    cell: Tensor  # (K,): the row that is read for it, which has the same tokens
    read: Tensor  # (R,): the same for every row
    result: Tensor | None  # (R,): which of the K results is each row's; None: its own


def _asked(rows: Tensor, start: Tensor, width: int, key: Tensor | None) -> _Asked:
    read = first_equal(rows)
    which, result = torch.arange(len(rows), device=rows.device), None
    if key is not None and bool((read != which).any()):
        same = first_equal(torch.cat([read[:, None], start[:, None], key], 1))
        if bool((same != which).any()):
            which, result = same.unique(return_inverse=True)
    wanted = start[which, None] - 1 + torch.arange(width, device=rows.device)
    wanted = wanted.clamp(max=rows.shape[1] - 1)
    return _Asked(which, wanted, text.length(rows)[which], read[which], read, result)


def _in_order(found: Iterator[tuple[Tensor, Tensor]], number: int) -> Tensor:
    """The results (number, ...) of rows that come in parts, each with its rows.

    Without gradient they are written where they belong: each for itself, small among activations that come and go,
    would have a processor's memory in pieces that are too small for the next ones.
    """
    rows, first = next(found)
    if len(rows) == number:
        return first
    if torch.is_grad_enabled():
        order, results = zip((rows, first), *found, strict=True)
        return torch.cat(results)[torch.cat(order).argsort()]
    result = first.new_empty(number, *first.shape[1:])
    result[rows] = first
    for rows, part in found:
        result[rows] = part
    return result


@dataclass(frozen=True)
class _Part:
    """Rows that are read at once, and how."""

    tokens: Tensor  # (P, N, B, W), all PAD where there is no row
    results: Tensor  # (r,): of those asked for
    rows: Tensor  # (r,): of the batch
    at: Tensor  # (r,): where among the P N B rows each is read
    wanted: Tensor  # (r, T): where in its row each token of the value is predicted
    cost: int  # tokens through the network
    readings: list[_Reading]
    split: bool  # hidden states first, then logits a few at a time
    again: bool = False  # whether the backward pass reads it again, its activations not being kept
    logits_again: bool = False  # whether it computes all of the logits again

    def read(self, run: Run, tokens: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """What ``run`` says of the tokens, (M, D), and where in it the positions ``wanted`` (r, T) are."""
        out, index = self.readings[0].read(tokens, self.at, wanted, run)
        for longer in self.readings[1:]:
            more, there = longer.read(tokens, self.at, wanted, run)
            index = torch.where(wanted < self.readings[0].end, index, there + len(out))
            out = torch.cat([out, more])
        return out, index


def _parts(lm: LanguageModel, tokens: Tensor, grid: Tensor, asked: _Asked) -> Iterator[_Part]:
    """Choose packed or plain, and split to the token budget; lazily, as a part may hold what was recalled.

    ``grid`` (P, N, B) are the rows whose ``tokens`` are there, -1 where there is none.
    """
    place = torch.full((len(asked.read),), -1, device=grid.device)
    there = (grid.flatten() >= 0).nonzero()[:, 0]
    place[grid.flatten()[there]] = there
    at = place[asked.cell]
    results = (at >= 0).nonzero()[:, 0]
    at, wanted = at[results], asked.wanted[results]
    readings = _readings(lm, tokens, at, wanted, asked.length[results])
    cost = sum(reading.cost for reading in readings)
    split = cost * lm.vocab_size > TUNING.many_logits and splits(lm)
    most = lm.token_budget if split else chunk_rows(lm, 1)
    if any(reading.tree is not None for reading in readings):
        most = min(most, max(_fitting(lm), TUNING.read_again * sum(reading.repeated for reading in readings)))
    if cost > most and grid.numel() > 1:
        axis = 2 if tokens.shape[2] > 1 else 1 if tokens.shape[1] > 1 else 0
        pieces = -(-cost // most)
        for t, g in zip(*(x.tensor_split(min(pieces, x.shape[axis]), axis) for x in (tokens, grid)), strict=True):
            if bool((g >= 0).any()):
                yield from _parts(lm, t, g, asked)
    else:
        yield _Part(tokens, results, asked.rows[results], at, wanted, cost, readings, split)


@dataclass(frozen=True)
class _Reading:
    """How tokens are read, up to ``end``. It is decided once: the backward pass must read them as they were read."""

    lm: LanguageModel
    end: int
    tree: Tree | None  # None: row by row
    at_once: int
    cost: int

    @property
    def repeated(self) -> int:
        """How many tokens each part of a split would read again."""
        return 0 if self.tree is None else self.tree.repeated

    def read(self, tokens: Tensor, at: Tensor, wanted: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """What ``run`` says of the tokens, (M, D), and where in it positions ``wanted`` of the rows ``at`` are."""
        tokens, wanted = tokens[..., : self.end], wanted.clamp(max=self.end - 1)
        if self.tree is not None:
            out, index = self.tree.read(self.lm, tokens, run)
        else:
            out, index = _read_plain(self.lm, tokens, int(wanted.min()), run, self.at_once)
        return out, index.flatten(0, -2)[at].gather(1, wanted)


def _readings(lm: LanguageModel, tokens: Tensor, at: Tensor, wanted: Tensor, length: Tensor) -> list[_Reading]:
    """How to read the tokens; in two ways where some of ``wanted`` end a short text and others a long one."""
    predicted = (wanted + 1).minimum(length[:, None])  # from so many tokens; what follows a text is not
    found = []
    for view, _ in by_length(lm, predicted):
        end = min(tokens.shape[-1], view.max_length) if view.long is False and view.max_length else tokens.shape[-1]
        seen = tokens[..., :end]
        plain = len(at.unique()) * end
        tree = Tree(seen) if tokens.shape[0] * tokens.shape[1] > 1 else None
        if tree is not None and tree.cost <= TUNING.worthwhile * plain and supports_trees(lm):
            first = wanted.new_full((tokens.shape[2],), end - 1)
            tree.recall(view, first.scatter_reduce(0, at % tokens.shape[2], wanted[:, 0], "amin"))
        else:
            tree = None
        found.append(_Reading(view, end, tree, _fitting(lm), plain if tree is None else tree.cost))
    return found


def _kept(lm: LanguageModel, parts: list[_Part]) -> list[_Part]:
    """The parts, of which no more than the last ones that fit keep what the backward pass needs.

    It begins with the last one, and is done with it before it comes to those that it has to compute again.
    """
    budget = kept_tokens(lm) if all(part.split for part in parts) else chunk_rows(lm, 1)
    tokens = logits = 0
    found: list[_Part] = []
    for part in reversed(parts):
        tokens, logits = tokens + part.cost, logits + part.wanted.numel() * lm.vocab_size
        again = tokens > budget
        if found and (again or logits > TUNING.logits_at_once):
            part = replace(part, split=splits(lm), again=again, logits_again=True)
        found.append(part)
    return found[::-1]


def _scores(lm: LanguageModel, part: _Part, head: Head) -> Tensor:
    """What ``head`` keeps of a part's logits, (P N B, ...)."""
    if part.split:
        # The hidden states are kept in any case, so that logits which are computed again are so once and no more.
        read = partial(part.read, hidden_states, part.tokens, part.wanted)
        states, index = read_again(lm, read) if part.again else read()
        return unembed_each(lm, states, index, part.rows, head, all_again=part.logits_again)

    def whole(tokens: Tensor, wanted: Tensor) -> Tensor:
        logits, index = part.read(_logits, tokens, wanted)
        number = -(-index.numel() * lm.vocab_size // TUNING.logit_budget)  # many rows may be read as few
        chunks = zip(index.tensor_split(number), part.rows.tensor_split(number), strict=True)
        return torch.cat([head(precise(logits[i]), rows) for i, rows in chunks])

    return again(whole, part.tokens, part.wanted) if part.again else whole(part.tokens, part.wanted)


def _fitting(lm: LanguageModel) -> int:
    """How many tokens to read at once, for the sake of the feed-forward layers' activations."""
    width = getattr(lm.model.config.get_text_config(), "hidden_size", lm.vocab_size)  # a table has none
    return fitting(lm, 4 * width, lm.token_budget)


def _logits(lm: LanguageModel, input_ids: Tensor, first: int = 0, **kwargs: Any) -> Tensor:
    """The logits (B, W - first, V) of positions ``first`` to the end."""
    keep = torch.arange(first, input_ids.shape[1], device=input_ids.device)
    logits: Tensor = lm.forward(input_ids, logits_to_keep=keep, **kwargs).logits
    return logits[:, -len(keep) :]  # some networks keep all


def _read_plain(lm: LanguageModel, tokens: Tensor, first: int, run: Run, at_once: int) -> tuple[Tensor, Tensor]:
    """What ``run`` says of one right-padded row per sequence, identical rows once, about ``at_once`` tokens a pass.

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
    """Whether tree attention gives this network's own logits: tried once per network on a small tree, then known."""
    return verified(lm, "tree_attention", _tree_agrees)


def windows(lm: LanguageModel) -> list[int | None] | None:
    """How far back each layer attends, by the configuration, as no small trial could show; None if it does not say."""
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
    """Whether a token's place among the pass's, padding included, is what its attention depends on (Llama 4)."""
    config = lm.model.config.get_text_config()
    return bool(getattr(config, "attn_temperature_tuning", False))


def _tree_agrees(lm: LanguageModel) -> bool:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocab_size, (3, 2, 2, 9), generator=generator).to(lm.device)
    ids[:, :, :, :2] = ids[0, 0, 0, :2]
    ids[1, :, :, :5], ids[2, :, :, :4] = ids[0, :, :, :5], ids[0, :, :, :4]
    ids[2, :, :, 7:] = text.PAD
    with windows_seen() as seen:
        plain, at = _read_plain(lm, ids, 1, _logits, _fitting(lm))
        packed, there = Tree(ids).read(lm, ids, _logits)
    return seen == windows(lm) and agree(lm, packed[there[..., 1:7]], plain[at[..., 1:7]], 1e-4)
