"""Prompts that the base network has read: their keys and values, kept until its weights change.

A frozen language model so reads each of its prompts once, however often it is sampled from and scored after it. An
adapter in training changes at every step, so only the base network's prompts are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..adapters import Network
from ..language_model import LanguageModel
from ..passes import Lock
from .chunks import is_sharded
from .trials import agree, verified
from .tuning import TUNING

Ids = tuple[int, ...]
Layers = list[tuple[Tensor, Tensor]]  # keys and values (H, A, D) of each layer


class Past(NamedTuple):
    """The keys and values of the first tokens of some rows."""

    cache: DynamicCache  # of each layer keys and values (B, H, A, D), padded to the longest
    length: Tensor  # (B,): how many tokens of each row


class Prompts:
    """The prompts that one network has read. The least recently used ones are dropped first."""

    def __init__(self, lock: Lock) -> None:
        self.capacity = TUNING.prompt_tokens  # 0: nothing is kept
        self._lock = lock  # the network's
        self._kept: OrderedDict[Ids, Layers] = OrderedDict()
        self._state: tuple[object, list[Tensor]] | None = None

    def forget(self) -> None:
        """Drops everything."""
        with self._lock:
            self._kept.clear()

    @contextmanager
    def aside(self, capacity: int) -> Iterator[None]:
        """Inside, an empty store with this capacity is used, e.g. for the texts of a trial.

        It is dropped at the end.
        """
        with self._lock:
            before = self.capacity, self._kept, self._state
            self.capacity, self._kept, self._state = capacity, OrderedDict(), None
            try:
                yield
            finally:
                self.capacity, self._kept, self._state = before

    def past(self, lm: LanguageModel, rows: Tensor, end: Tensor, *, exactly: bool = False) -> Past | None:
        """Returns keys and values of the first ``end`` (B,) tokens of ``rows`` (B, W); None if nothing is to be kept.

        Unless ``exactly``, there may be slightly fewer. What is not in the store is read and stored. The result is
        padded on the left if ``exactly``, as decoding needs it, else on the right.
        """
        with lm.network.lock, torch.no_grad():
            return self._past(lm, rows, end, exactly)

    def _past(self, lm: LanguageModel, rows: Tensor, end: Tensor, exactly: bool) -> Past | None:
        if not self.capacity or len(rows) > TUNING.most_prompts or not int(end.max()) or int(end.sum()) > self.capacity:
            return None
        if not self._current(lm):
            self.forget()
        wanted = [tuple(r[:n]) for r, n in zip(rows.tolist(), end.tolist(), strict=True)]
        lengths = sorted({len(k) for k in self._kept}, reverse=True)
        found = [
            self._longest(ids, [n for n in lengths if n <= len(ids)], 0 if exactly else TUNING.slack) for ids in wanted
        ]
        self._read(lm, [ids for ids, known in zip(wanted, found, strict=True) if known is None])
        layers = []
        for ids, known in zip(wanted, found, strict=True):
            known = ids if known is None else known
            if known:
                self._kept.move_to_end(known)
            any_kept = next(reversed(self._kept.values()))
            layers.append(self._kept[known] if known else [(k[:, :0], v[:, :0]) for k, v in any_kept])
        length = torch.tensor([each[0][0].shape[1] for each in layers], device=rows.device)
        width = int(length.max())
        cache = DynamicCache()
        for i in range(len(layers[0])):
            pairs = zip(*(each[i] for each in layers), strict=True)  # keys of all rows, values of all rows
            cache.update(*(torch.stack([_widened(x, width, exactly) for x in xs]) for xs in pairs), i)
        while sum(map(len, self._kept)) > self.capacity:
            self._kept.popitem(last=False)
        return Past(cache, length)

    def _longest(self, ids: Ids, lengths: list[int], slack: int) -> Ids | None:
        """Returns the longest stored prefix of ``ids`` that is at most ``slack`` tokens shorter."""
        return next((ids[:n] for n in lengths if len(ids) - n <= slack and ids[:n] in self._kept), None)

    def _read(self, lm: LanguageModel, texts: list[Ids]) -> None:
        """Reads and stores these texts, padded on the right of causal attention."""
        texts = [*dict.fromkeys(filter(None, texts))]
        if not texts:
            return
        width = max(map(len, texts))
        ids = torch.tensor([t + (0,) * (width - len(t)) for t in texts], device=lm.device)
        out = lm.forward(ids, tokens=sum(map(len, texts)), use_cache=True, logits_to_keep=1)
        if any(type(layer) is not DynamicLayer for layer in out.past_key_values.layers):
            raise NotImplementedError("a cache that is more than keys and values")
        for row, t in enumerate(texts):
            layers = out.past_key_values.layers
            self._kept[t] = [tuple(x[row, :, : len(t)].clone() for x in (each.keys, each.values)) for each in layers]

    def _current(self, lm: LanguageModel) -> bool:
        """Returns whether everything on which a pass depends is unchanged.

        Weights and buffers are compared by autograd's version counters and by one number of each.
        """
        network = lm.network
        network.follow()
        weights = [w for w in (*network.base_parameters, *network.buffers) if w.numel()]
        versions = [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]
        same = (network.changes, network.model.config._attn_implementation, lm.long, versions)
        numbers = [torch.cat(ws) for ws in _by_type([w.detach().as_strided((1,), (1,)) for w in weights])]
        before, self._state = self._state, (same, numbers)
        return before is not None and before[0] == same and all(map(torch.equal, before[1], numbers))


def prompts(network: Network) -> Prompts:
    """Returns the store of a network."""
    with network.lock:
        kept = network.kept.setdefault("prompts", Prompts(network.lock))
    assert isinstance(kept, Prompts)
    return kept


def recalled(lm: LanguageModel, rows: Tensor, end: Tensor, *, exactly: bool = False) -> Past | None:
    """`Prompts.past` for the base network without gradient; None in all other cases."""
    return prompts(lm.network).past(lm, rows, end, exactly=exactly) if _keeps(lm) else None


def _keeps(lm: LanguageModel) -> bool:
    """Returns whether prompts are kept: for the base network, without gradient, with a cache of plain keys and values.

    Under autocast and with hooks, whose effect may change from pass to pass, nothing is kept and nothing recalled.
    """
    if lm.has_adapter or torch.is_grad_enabled() or not prompts(lm.network).capacity:
        return False
    if is_sharded(lm):
        return False  # reading a weight is a collective operation, and not all processes would take part
    with lm.network.lock:
        if lm.network.autocast is not None or lm.network.strangers():
            return False
    return verified(lm, "kept_prompts", _trial)


def _trial(lm: LanguageModel) -> bool:
    ids = torch.randint(lm.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0)).to(lm.device)
    whole = lm.forward(ids, use_cache=False).logits[:, 4:]
    after = torch.arange(4, 6, device=lm.device).expand(2, -1)
    for use_cache in (True, False):  # Whisper's decoder ignores a cache that it does not add to
        past = Prompts(lm.network.lock).past(lm, ids, torch.tensor([4, 4], device=lm.device))
        assert past is not None
        read = lm.forward(ids[:, 4:], past_key_values=past.cache, position_ids=after, use_cache=use_cache)
        if not agree(lm, read.logits, whole, 1e-4):
            return False
    return True


def _by_type(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    found: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for x in tensors:
        found.setdefault((x.dtype, x.device), []).append(x)
    return found.values()


def _widened(x: Tensor, width: int, left: bool) -> Tensor:
    """Returns (H, A, D) padded to (H, width, D)."""
    missing = width - x.shape[1]
    return pad(x, (0, 0, missing, 0) if left else (0, 0, 0, missing))
