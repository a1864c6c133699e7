"""Scoring: the logits at every token of many continuations, with each shared token computed once.

Rows that share tokens are e.g. one prompt with many continuations, or all prefixes of one text, each followed by an
observation. The sharing is found from the tokens themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import text
from ..language_model import LanguageModel
from ..rows import covering, first_equal
from ..shapes import broadcast_shapes
from . import distinct
from .again import again, kept_tokens, read_again
from .chunks import chunk_rows, is_sharded
from .packing import Run
from .reading import Reading, fitting_tokens, packed, read_logits, readings
from .trials import precise
from .tuning import TUNING
from .unembedding import hidden_states, splits, unembed_each

Head = Callable[[Tensor, Tensor], Tensor]
"""``head(logits (r, T, V), rows (r,)) -> (r, ...)``: the function of a chunk's logits (float32 or better) to return."""


def with_bos(lm: LanguageModel, context: Tensor) -> Tensor:
    """Returns the context as the network reads it.

    A bos comes first if the tokenizer puts one there by default or the context is empty, unless the context begins with
    it.
    """
    empty = text.length(context) == 0
    if not (lm.adds_bos or bool(empty.any())):
        return context
    if lm.bos_id is None:
        raise ValueError("prompt: an empty prompt needs a bos or eos token, and this tokenizer has neither")
    wanted = empty
    if lm.adds_bos:
        wanted = (context[..., :1] != lm.bos_id).all(-1)  # True for an empty context too
        if not bool(wanted.any()):
            return context
    bos = torch.full((*context.shape[:-1], 1), lm.bos_id, device=context.device)
    return text.cat(bos.masked_fill(~wanted[..., None], text.PAD), context)


class Request(NamedTuple):
    """The arguments of `score`."""

    lm: LanguageModel
    context: Tensor
    value: Tensor
    head: Head
    key: Tensor | None = None


def score(lm: LanguageModel, context: Tensor, value: Tensor, head: Head, key: Tensor | None = None) -> Tensor:
    """Applies ``head`` to the logits that predict each token of ``value`` after ``context``.

    ``context`` (*batch, Lc) and ``value`` (*batch, T); leading axes broadcast; the result is (*batch, ...).
    ``logits[:, t]`` predicts ``value[..., t]``; it is unspecified at padding. ``rows`` are numbers in the flattened
    batch. Equal rows of tokens are read once. ``key`` (rows, K) are integers for whatever else ``head`` knows of a row:
    rows with equal tokens and key have the same result.
    """
    return score_together([Request(lm, context, value, head, key)])[0]


def score_together(requests: Sequence[Request]) -> list[Tensor]:
    """Returns `score` of each of several requests to one language model.

    What rows of different requests share is read once: a row that is a prefix of another one is not read by itself, and
    rows of several requests are packed into one tree if fewer tokens then go through the network.
    """
    batches = [_Batch.of(request) for request in requests]
    asking = [i for i, batch in enumerate(batches) if batch.tokens.numel()]
    found = {i: _nothing(requests[i], batches[i]) for i in range(len(requests)) if i not in asking}
    for together in [asking] if _alike(requests, batches) else [[i] for i in asking]:
        if together:
            results = _together(requests[0].lm, [requests[i] for i in together], [batches[i] for i in together])
            found.update(zip(together, results, strict=True))
    return [found[i] for i in range(len(requests))]


class _Batch(NamedTuple):
    """The rows of a request."""

    shape: torch.Size
    tokens: Tensor  # (*shape, W); empty if nothing is needed
    start: Tensor  # (R,): the number of tokens of the context
    width: int  # of the value

    @classmethod
    def of(cls, request: Request) -> _Batch:
        lm, value = request.lm, request.value
        context = with_bos(lm, request.context)
        shape, width = broadcast_shapes(context.shape[:-1], value.shape[:-1]), value.shape[-1]
        if shape.numel() == 0 or width == 0:
            return cls(shape, value.new_empty(0, 0), value.new_empty(0), width)
        start = text.length(context).expand(shape).flatten()
        tokens = text.cat(context, value[..., :-1])
        if lm.max_length is not None and tokens.shape[-1] > lm.max_length:
            raise ValueError(
                f"prompt: prompt and text together have {tokens.shape[-1] + 1} tokens, but this model's context holds "
                f"{lm.max_length}; shorten the prompt or max_tokens"
            )
        return cls(shape, tokens.expand(*shape, -1), start, width)


def _nothing(request: Request, batch: _Batch) -> Tensor:
    device = request.value.device
    rows = torch.arange(batch.shape.numel(), device=device)
    result = request.head(torch.zeros(len(rows), batch.width, request.lm.vocab_size, device=device), rows)
    return result.unflatten(0, batch.shape) if batch.shape else result.squeeze(0)


def _alike(requests: Sequence[Request], batches: list[_Batch]) -> bool:
    """Returns whether all rows are read with the same rotary factors; else a short row is not part of a long one."""
    turn = requests[0].lm.network.rotary.turn
    return turn is None or requests[0].lm.long is not None or all(b.tokens.shape[-1] <= turn for b in batches)


def _together(lm: LanguageModel, requests: list[Request], batches: list[_Batch]) -> list[Tensor]:
    width, sizes = max(batch.tokens.shape[-1] for batch in batches), [batch.shape.numel() for batch in batches]
    each = [text.pad(batch.tokens, width).reshape(-1, width) for batch in batches]
    rows = each[0] if len(each) == 1 else torch.cat(each)
    read = first_equal(rows) if len(each) == 1 else covering(rows)
    length = text.length(rows)
    own = read.where(read == torch.arange(len(rows), device=rows.device), -1).split(sizes)
    asked = [
        _asked(batch, request.key, *of)
        for batch, request, *of in zip(batches, requests, read.split(sizes), length.split(sizes), strict=True)
    ]

    def cost(grid: Tensor) -> int:
        tokens = distinct.at(rows, grid)
        plain = int((grid >= 0).sum()) * tokens.shape[-1]
        tree = packed(lm, tokens, plain)
        return plain if tree is None else tree.cost

    grids = distinct.grids([x.view(batch.shape) for x, batch in zip(own, batches, strict=True)], length, cost)
    parts: Iterable[_Part] = (part for grid in grids for part in _parts(lm, distinct.at(rows, grid), grid, asked))
    if torch.is_grad_enabled():
        parts = _kept(lm, [*parts])
    heads = [request.head for request in requests]
    found = _in_order((each for part in parts for each in _scores(lm, part, heads)), [len(a.rows) for a in asked])
    found = [x if a.result is None else x.index_select(0, a.result) for x, a in zip(found, asked, strict=True)]
    return [x.reshape(*batch.shape, *x.shape[1:]) for x, batch in zip(found, batches, strict=True)]


class _Asked(NamedTuple):
    """Which rows (K,) of a request need results, and where."""

    rows: Tensor  # (K,)
    wanted: Tensor  # (K, T): the position in its row at which each token of the value is predicted
    length: Tensor  # (K,): the number of tokens of each
    cell: Tensor  # (K,): the row of any request that is read for it; it begins with the same tokens
    result: Tensor | None  # (R,): the number, among the K results, of each row's result; None: its own


def _asked(batch: _Batch, key: Tensor | None, read: Tensor, length: Tensor) -> _Asked:
    which, result = torch.arange(len(read), device=read.device), None
    if key is not None:
        same = first_equal(torch.cat([read[:, None], batch.start[:, None], length[:, None], key], 1))
        if bool((same != which).any()):
            which, result = same.unique(return_inverse=True)
    wanted = batch.start[which, None] - 1 + torch.arange(batch.width, device=read.device)
    wanted = wanted.clamp(max=batch.tokens.shape[-1] - 1)
    return _Asked(which, wanted, length[which], read[which], result)


def _in_order(found: Iterator[tuple[_Share, Tensor]], numbers: list[int]) -> list[Tensor]:
    """Returns the results (number, ...) of each request, which arrive in parts.

    Without gradient, results go into one preallocated tensor: many small tensors between activations would fragment a
    processor's memory.
    """
    results: dict[int, Tensor] = {}
    kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for share, part in found:
        i, number = share.request, numbers[share.request]
        if len(share.results) == number:
            results[i] = part
        elif torch.is_grad_enabled():
            kept.setdefault(i, []).append((share.results, part))
        else:
            if i not in results:
                results[i] = part.new_empty(number, *part.shape[1:])
            results[i][share.results] = part
    for i, parts in kept.items():
        order, each = zip(*parts, strict=True)
        results[i] = torch.cat(each)[torch.cat(order).argsort()]
    return [results[i] for i in range(len(numbers))]


class _Share(NamedTuple):
    """The results of one request that a part contains."""

    request: int
    results: Tensor  # (r,): the numbers of the results
    rows: Tensor  # (r,): the numbers of the rows in the batch
    length: Tensor  # (r,)
    at: Tensor  # (r,): the row of the part that is read for each
    wanted: Tensor  # (r, T): the position in its row at which each token of the value is predicted


@dataclass(frozen=True)
class _Part:
    """Rows that are read at once, and how."""

    tokens: Tensor  # (P, N, B, W), all PAD where there is no row
    shares: list[_Share]
    cost: int  # the number of tokens that go through the network
    ways: list[Reading]
    split: bool  # whether hidden states are computed first, and then logits a few at a time
    again: bool = False  # whether its activations are not kept, and the backward pass reads it again
    logits_again: bool = False  # whether the backward pass computes all of the logits again
    layers_again: bool = False  # whether the backward pass computes each layer again, because there are too many tokens

    def read(self, run: Run, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what ``run`` returns for the tokens, (M, D), and where in it the positions of all shares are."""
        at = torch.cat([share.at.repeat_interleave(share.wanted.shape[1]) for share in self.shares])
        wanted = torch.cat([share.wanted.flatten() for share in self.shares])
        out, index = self.ways[0].read(tokens, at, wanted, run)
        for longer in self.ways[1:]:
            more, there = longer.read(tokens, at, wanted, run)
            index = torch.where(wanted < self.ways[0].end, index, there + len(out))
            out = torch.cat([out, more])
        return out, index

    def each(self, index: Tensor) -> list[Tensor]:
        """Splits the second result of `read` into (r, T) for each share."""
        pieces = index.split([share.wanted.numel() for share in self.shares])
        return [piece.view(share.wanted.shape) for piece, share in zip(pieces, self.shares, strict=True)]


def _parts(lm: LanguageModel, tokens: Tensor, grid: Tensor, asked: list[_Asked]) -> Iterator[_Part]:
    """Yields parts: decides between packed and plain reading, and splits to the token budget.

    It is lazy, because a part may hold kept prompts. ``grid`` (P, N, B) are the numbers of the rows in ``tokens``, -1
    for none.
    """
    shares = [*_shares(grid, asked)]
    # The number of tokens from which each is predicted. Positions after the end of a text predict nothing.
    predicted = torch.cat([(share.wanted + 1).minimum(share.length[:, None]).flatten() for share in shares])
    at, earliest = (torch.cat(x) for x in zip(*((share.at, share.wanted[:, 0]) for share in shares), strict=True))
    ways = readings(lm, tokens, predicted, at, earliest)
    cost = sum(way.cost for way in ways)
    split = cost * lm.vocab_size > TUNING.many_logits and splits(lm)
    most = lm.token_budget if split else chunk_rows(lm, 1)
    if any(way.tree is not None for way in ways):
        most = min(most, max(fitting_tokens(lm), TUNING.read_again * sum(way.repeated for way in ways)))
    if cost > most and grid.numel() > 1:
        axis = 2 if tokens.shape[2] > 1 else 1 if tokens.shape[1] > 1 else 0
        pieces = -(-cost // most)
        for t, g in zip(*(x.tensor_split(min(pieces, x.shape[axis]), axis) for x in (tokens, grid)), strict=True):
            if bool((g >= 0).any()):
                yield from _parts(lm, t, g, asked)
    else:
        yield _Part(tokens, shares, cost, ways, split)


def _shares(grid: Tensor, asked: list[_Asked]) -> Iterator[_Share]:
    there = (grid.flatten() >= 0).nonzero()[:, 0]
    most = max(int(each.cell.max()) for each in asked)
    place = torch.full((max(most, int(grid.max())) + 1,), -1, device=grid.device)
    place[grid.flatten()[there]] = there
    for i, each in enumerate(asked):
        at = place[each.cell]
        results = (at >= 0).nonzero()[:, 0]
        if len(results):
            yield _Share(i, results, *(x[results] for x in (each.rows, each.length, at, each.wanted)))


def _kept(lm: LanguageModel, parts: list[_Part]) -> list[_Part]:
    """Returns the parts; only the last ones that fit the budget keep what the backward pass needs.

    The backward pass begins with the last part and frees it before it computes an earlier one again. A part that does
    not fit alone (a long prompt that all of its texts continue) keeps the input of each layer.
    """
    budget = kept_tokens(lm) if all(part.split for part in parts) else chunk_rows(lm, 1)
    tokens = logits = 0
    found: list[_Part] = []
    for part in reversed(parts):
        tokens = tokens + part.cost
        logits += sum(share.wanted.numel() for share in part.shares) * lm.vocab_size
        again = tokens > budget
        part = replace(part, layers_again=part.cost > budget and not is_sharded(lm))
        if found and (again or logits > TUNING.logits_at_once):
            part = replace(part, split=splits(lm), again=again, logits_again=True)
        found.append(part)
    return found[::-1]


def _scores(lm: LanguageModel, part: _Part, heads: list[Head]) -> Iterator[tuple[_Share, Tensor]]:
    """Yields each request's head of the logits in a part, (r, ...)."""
    if part.split:
        # Hidden states are always kept, so that logits are computed again at most once.
        read = partial(part.read, partial(hidden_states, layers_again=part.layers_again), part.tokens)
        states, index = read_again(lm, read) if part.again else read()
        for share, at in zip(part.shares, part.each(index), strict=True):
            all_again = part.logits_again or share is not part.shares[-1]
            yield share, unembed_each(lm, states, at, share.rows, heads[share.request], all_again=all_again)
        return

    def whole(tokens: Tensor) -> list[Tensor]:
        logits, index = part.read(partial(read_logits, layers_again=part.layers_again), tokens)
        found = []
        for share, at in zip(part.shares, part.each(index), strict=True):
            number = -(-at.numel() * lm.vocab_size // TUNING.logit_budget)  # one row that is read may serve many rows
            chunks = zip(at.tensor_split(number), share.rows.tensor_split(number), strict=True)
            found.append(torch.cat([heads[share.request](precise(logits[i]), rows) for i, rows in chunks]))
        return found

    results = again(whole, part.tokens) if part.again else whole(part.tokens)
    yield from zip(part.shares, results, strict=True)
