"""Scoring: the logits at every token of many continuations, each shared token computed once.

Rows that share tokens (one prompt with many continuations; all prefixes of one text, each followed by an observation)
are packed into a token tree (`tree_attention`); the sharing is found from the tokens themselves.  Where packing saves
little, or a model's attention is not plain causal attention, rows go through the network one by one, right-padded,
which needs no mask under causal attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import text
from ..language_model import LanguageModel
from .tree_attention import Level, UnsupportedAttention, tree

Head = Callable[[Tensor, Tensor], Tensor]
"""``head(logits (r, T, V), rows (r,)) -> (r, ...)``; what a caller keeps of a chunk's logits."""

_LOGIT_BUDGET = 2**28  # floats of logits alive at once
_WORTHWHILE = 0.75  # pack when it sends at most this share of the tokens through the network


def with_bos(lm: LanguageModel, context: Tensor) -> Tensor:
    """The context as the network reads it: bos first iff the tokenizer does so by default or the context is empty."""
    empty = text.length(context) == 0
    if not (lm.adds_bos or bool(empty.any())):
        return context
    if lm.bos_id is None:
        raise ValueError("prompt: an empty prompt needs a bos or eos token, and this tokenizer has neither")
    bos = torch.full((*context.shape[:-1], 1), lm.bos_id, device=context.device)
    if not lm.adds_bos:
        bos = bos.masked_fill(~empty[..., None], text.PAD)
    return text.cat(bos, context)


def chunk_rows(lm: LanguageModel, tokens_per_row: int) -> int:
    """How many rows of ``tokens_per_row`` tokens fit the token budget."""
    budget = min(lm.token_budget, _LOGIT_BUDGET // lm.vocab_size)
    return max(1, budget // max(1, tokens_per_row))


def score(lm: LanguageModel, context: Tensor, value: Tensor, head: Head) -> Tensor:
    """Apply ``head`` to the logits that predict each token of ``value`` after ``context``.

    ``context`` (*batch, Lc) and ``value`` (*batch, T), leading axes broadcasting; the result is (*batch, ...).
    ``logits[:, t]`` predicts ``value[..., t]``; what it holds at padded positions is unspecified.  ``rows`` index the
    flattened batch.
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
    tokens = tokens.reshape(*shape, -1, tokens.shape[-1])
    start = start.reshape(*shape, -1)
    rows = torch.arange(batch.numel(), device=value.device).view(start.shape)
    result = _score(lm, tokens, start, rows, width, head)  # (P, N, B, ...)
    return result.reshape(*batch, *result.shape[3:])


def _score(lm: LanguageModel, tokens: Tensor, start: Tensor, rows: Tensor, width: int, head: Head) -> Tensor:
    """Choose packed or plain, split to the token budget, and run; (P, N, B, W) -> (P, N, B, ...)."""
    plan = _Tree(tokens) if tokens.shape[0] * tokens.shape[1] > 1 else None
    packed = plan is not None and plan.cost <= _WORTHWHILE * tokens.numel() and supports_trees(lm)
    cost = plan.cost if packed and plan is not None else tokens.numel()
    most = chunk_rows(lm, 1)
    if cost > most and rows.numel() > 1:
        axis = 2 if tokens.shape[2] > 1 else 1 if tokens.shape[1] > 1 else 0
        pieces = -(-cost // most)
        split = (x.tensor_split(min(pieces, x.shape[axis]), axis) for x in (tokens, start, rows))
        return torch.cat([_score(lm, t, s, r, width, head) for t, s, r in zip(*split, strict=True)], axis)
    run = plan.logits if packed and plan is not None else _plain_logits
    # position of the logits that predict each token of the value
    wanted = start[..., None] - 1 + torch.arange(width, device=start.device)  # (P, N, B, T)
    wanted = wanted.clamp(max=tokens.shape[-1] - 1)
    logits = run(lm, tokens, wanted)  # (P, N, B, T, V)
    return head(logits.flatten(0, 2), rows.flatten()).unflatten(0, rows.shape)


def _plain_logits(lm: LanguageModel, tokens: Tensor, wanted: Tensor) -> Tensor:
    """One right-padded row per sequence, identical rows once."""
    flat, wanted_flat = tokens.flatten(0, -2), wanted.flatten(0, -2)
    unique, inverse = torch.unique(flat, dim=0, return_inverse=True)
    first = int(wanted_flat.min())
    keep = torch.arange(first, tokens.shape[-1], device=tokens.device)
    out = lm.forward(
        unique.clamp(min=0), tokens=int(text.length(unique).sum()), use_cache=False, logits_to_keep=keep
    ).logits  # (U, W - first, V)
    return out[inverse[:, None], wanted_flat - first].view(*wanted.shape, -1)


class _Tree:
    """A packing of rows (P, N, B, W): per b a shared root, per (n, b) its longest row as trunk, the rest branches."""

    def __init__(self, tokens: Tensor):
        P, N, B, W = tokens.shape
        length = text.length(tokens)  # (P, N, B)
        longest = length.argmax(0)  # (N, B)
        self.trunk = trunk = tokens.gather(0, longest[None, ..., None].expand(1, N, B, W))[0]  # (N, B, W)
        self.shared = _common(tokens, trunk)  # (P, N, B): tokens each row has in common with its trunk
        root = torch.minimum(_common(trunk, trunk[0]), self.shared.amin(0)).amin(0) if N > 1 else length.new_zeros(B)
        self.root = root  # (B,)
        self.length = length
        self.A = int(root.max())
        self.S = int((text.length(trunk) - root).max())
        self.L = int((length - self.shared).max())
        self.cost = B * (self.A + N * (self.S + P * self.L))

    def logits(self, lm: LanguageModel, tokens: Tensor, wanted: Tensor) -> Tensor:
        """The logits (P, N, B, T, V) at the rows' positions ``wanted`` (P, N, B, T)."""
        P, N, B, _ = tokens.shape
        A, S, L, root, shared = self.A, self.S, self.L, self.root, self.shared
        device = tokens.device
        # Each level's segments as slices of the rows they were found in, positions counted from the row's start.
        position = [
            torch.arange(A, device=device).expand(B, A),
            (root[:, None, None] + torch.arange(S, device=device)).expand(B, N, S),
            (shared.permute(2, 1, 0)[..., None] + torch.arange(L, device=device)),  # (B, N, P, L)
        ]
        source = [self.trunk[0], self.trunk.transpose(0, 1), tokens.permute(2, 1, 0, 3)]
        end = [root, text.length(self.trunk).T, self.length.permute(2, 1, 0)]
        ids, places, count = [], [], 0
        for p, s, e in zip(position, source, end, strict=True):
            inside = p < e[..., None]
            ids.append((s.gather(-1, p.clamp(max=s.shape[-1] - 1)) * inside).flatten(1))
            places.append((p * inside).flatten(1))
            count += int(inside.sum())
        visible_root = root[:, None].expand(B, N)
        every = (
            Level((), A, ()),
            Level((N,), S, (visible_root,)),
            Level((N, P), L, (visible_root[..., None].expand(B, N, P), shared.permute(2, 1, 0) - root[:, None, None])),
        )
        kept = [i for i, level in enumerate(every) if level.tokens > 0]
        levels = tuple(
            Level(every[i].fanout, every[i].width, tuple(v for j, v in enumerate(every[i].visible) if j in kept))
            for i in kept
        )
        with tree(lm.model, levels):
            out = lm.forward(
                torch.cat(ids, 1), position_ids=torch.cat(places, 1), tokens=count, use_cache=False
            ).logits  # (B, A + N S + N P L, V)
        n = torch.arange(N, device=device)[:, None, None]
        p = torch.arange(P, device=device)[:, None, None, None]
        c, r = shared[..., None], root[:, None]
        in_trunk = A + n * S + wanted - r
        in_branch = A + N * S + (n * P + p) * L + wanted - c
        index = torch.where(wanted < r, wanted, torch.where(wanted < c, in_trunk, in_branch))
        index = index.clamp(max=out.shape[1] - 1)
        return out[torch.arange(B, device=device)[:, None], index]


def _common(rows: Tensor, reference: Tensor) -> Tensor:
    """The number of leading tokens that each row shares with its reference."""
    return ((rows == reference) & (rows != text.PAD)).cumprod(-1).sum(-1)


def supports_trees(lm: LanguageModel) -> bool:
    """Whether tree attention gives this network's own logits: tried once per network on a small tree, then known."""
    facts = lm.network.facts
    if "tree_attention" not in facts:
        facts["tree_attention"] = attends_to_everything(lm) and _tree_agrees(lm)
    return bool(facts["tree_attention"])


def attends_to_everything(lm: LanguageModel) -> bool:
    """Whether the configuration promises attention to all that came before, which no small trial could show."""
    config = lm.model.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    kinds = [*(getattr(config, "layer_types", None) or ()), *(getattr(config, "attention_layers", None) or ())]
    return all(limit is None for limit in limits) and all(kind in ("full_attention", "global") for kind in kinds)


def _tree_agrees(lm: LanguageModel) -> bool:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocab_size, (3, 2, 2, 9), generator=generator).to(lm.device)
    ids[:, :, :, :2] = ids[0, 0, 0, :2]
    ids[1, :, :, :5], ids[2, :, :, :4] = ids[0, :, :, :5], ids[0, :, :, :4]
    ids[2, :, :, 7:] = text.PAD
    wanted = torch.arange(1, 7, device=lm.device).expand(3, 2, 2, 6)
    before = lm.network.tokens_scored
    try:
        with torch.no_grad():
            plain = _plain_logits(lm, ids, wanted).float()
            packed = _Tree(ids).logits(lm, ids, wanted).float()
    except (UnsupportedAttention, TypeError, ValueError, KeyError, IndexError, RuntimeError):
        return False  # the plain path serves
    finally:
        lm.network.tokens_scored = before
    tolerance = 1e-4 if lm.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((plain - packed).abs().max() <= tolerance * (1 + plain.abs().max()))
