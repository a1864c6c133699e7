"""Text is a tensor: ``LongTensor[..., L]`` of token ids, right-padded with ``PAD = -1``.

-1 is no token id, so nothing is confused where a tokenizer's pad is its eos.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Number
from typing import Any, Protocol

import torch
from torch import Tensor

from lmppl.shapes import broadcast_shapes

from .rows import distinct_rows

#: What fills a row after its text: no token id.
PAD = -1


class Decoder(Protocol):
    """What `map` needs of a language model."""

    def decode(self, text: Tensor) -> Any: ...


def _ask(**given: Any) -> None:
    """ValueError naming the argument that cannot be a text, whatever its ids."""
    for name, t in given.items():
        if not isinstance(t, Tensor) or not t.dim() or t.is_floating_point():
            raise ValueError(f"{name} must be a LongTensor[..., L] of token ids, not {_kind(t)}")


def _kind(given: Any) -> str:
    return f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__


def length(text: Tensor) -> Tensor:
    """The number of tokens of each text, padding not counted: ``[..., L] -> [...]``.

    >>> length(torch.tensor([[5, -1], [6, 7]]))
    tensor([1, 2])
    """
    _ask(text=text)
    return (text != PAD).sum(-1)


def pad(text: Tensor, width: int) -> Tensor:
    """The same texts, `width` columns wide: padded on the right, or cut where only padding is lost.

    Raises ValueError if a token would be lost.

    >>> pad(torch.tensor([5, 6]), 3)
    tensor([ 5,  6, -1])
    """
    _ask(text=text)
    if not isinstance(width, Integral) or isinstance(width, bool):
        raise ValueError(f"width: expected an integer, got {width!r}")
    excess = text.shape[-1] - int(width)
    if excess <= 0:
        return torch.nn.functional.pad(text, (0, -excess), value=PAD) if excess else text
    if width < 0 or bool((text[..., width:] != PAD).any()):
        raise ValueError(f"width={width} is too small for a text of {int(length(text).max())} tokens")
    return text[..., :width]


def cat(*texts: Tensor) -> Tensor:
    """One text after another, ``[..., L1], [..., L2], ... -> [..., L]``: leading axes broadcast, padding is dropped.

    L is the length of the longest result. Raises ValueError where leading axes do not broadcast.

    >>> cat(torch.tensor([[5, -1], [6, 7]]), torch.tensor([8]))
    tensor([[ 5,  8, -1],
            [ 6,  7,  8]])
    """
    if not texts:
        raise ValueError("cat needs at least one text")
    for t in texts:
        _ask(texts=t)
    try:
        batch = broadcast_shapes(*(t.shape[:-1] for t in texts))
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in texts)
        raise ValueError(f"texts of shapes {shapes} do not broadcast along their leading axes") from error
    joined = torch.cat([t.expand(batch + t.shape[-1:]) for t in texts], -1)  # (*batch, sum of L)
    keep = joined != PAD
    if bool(keep.all()):
        return joined
    end = keep.cumsum(-1)  # (*batch, sum of L): how many tokens up to here
    width = int(end[..., -1].max()) if end.numel() else 0
    # Column `width` takes the padding and is cut off again.
    out = joined.new_full((*batch, width + 1), PAD)
    out.scatter_(-1, torch.where(keep, end - 1, width), joined)
    return out[..., :width]


def prefixes(text: Tensor, stop: int | Tensor) -> Tensor:
    """Every prefix of each text, ended: ``[..., L] -> [W, ..., W]``, row t being ``z_1 .. z_t stop``, then padding.

    A text's content is z_1 .. z_n, the tokens before its first `stop` (all of them where there is none). `stop` is one
    id, or a LongTensor that broadcasts against the leading axes: each text's own. ``W = max(L, n.max() + 1)``. Rows
    t > n repeat the whole text, so that a model can run on them; mask them.

    >>> prefixes(torch.tensor([5, 6, 0]), stop=0)
    tensor([[ 0, -1, -1],
            [ 5,  0, -1],
            [ 5,  6,  0]])
    """
    _ask(text=text)
    if not isinstance(stop, Integral | Tensor) or isinstance(stop, bool):
        raise ValueError(f"stop: expected a token id or a LongTensor of them, got {stop!r}")
    stop = torch.as_tensor(stop, dtype=torch.long, device=text.device)
    batch = broadcast_shapes(text.shape[:-1], stop.shape)
    stop = stop.expand(batch)[..., None]  # (*batch, 1)
    text = pad(text, text.shape[-1] + 1).expand(*batch, -1)  # one column more: room for a stop after the last token
    stopped = text == stop
    n = torch.where(stopped.any(-1), stopped.int().argmax(-1), length(text))  # (*batch)
    width = max(text.shape[-1] - 1, int(n.max()) + 1 if n.numel() else 1)
    text = text[..., :width]
    column = torch.arange(width, device=text.device)
    row = column.view(-1, *(1 for _ in batch)).minimum(n)[..., None]  # (W, *batch, 1)
    return torch.where(column < row, text, torch.where(column == row, stop, PAD))  # (W, *batch, W)


def equal(a: Tensor, b: Tensor) -> Tensor:
    """Whether texts are the same, whatever their padding: ``[..., L1], [..., L2] -> BoolTensor[...]``, broadcasting.

    >>> equal(torch.tensor([[5, -1], [5, 6]]), torch.tensor([5]))
    tensor([ True, False])
    """
    _ask(a=a, b=b)
    width = max(a.shape[-1], b.shape[-1])
    return (pad(a, width) == pad(b, width)).all(-1)


def map(f: Callable[[str], Any], text: Tensor, lm: Decoder) -> Tensor:
    """A Python function of the decoded string, called once per distinct string: ``[..., L] -> [...]``.

    `f` returns a number, a bool or a tensor; tensors of shape S give ``[..., *S]``.

    >>> pyro.factor("rhyme", text.map(lambda s: 0.0 if s.endswith("day") else -5.0, z, lm))
    """
    _ask(text=text)
    if not callable(f):
        raise ValueError(f"f: expected a function of a string, got {f!r}")
    batch = text.shape[:-1]
    if not batch.numel():
        return torch.zeros(batch, device=text.device)
    text = pad(text, max(text.shape[-1], 1))
    rows, inverse = distinct_rows(text.reshape(batch.numel(), -1))
    strings = lm.decode(rows)
    distinct = {s: i for i, s in enumerate(dict.fromkeys(strings))}
    values = [f(s) for s in distinct]
    for s, v in zip(distinct, values, strict=True):
        if not isinstance(v, Tensor | Number) or isinstance(v, complex):
            raise ValueError(f"f: expected a number, a bool or a tensor for {s!r}, got {v!r}")
    if any(isinstance(v, Tensor) for v in values):
        answer = torch.stack([torch.as_tensor(v, device=text.device) for v in values])
    else:
        answer = torch.tensor(values, device=text.device)  # mixed bools, ints and floats become floats
    which = torch.tensor([distinct[s] for s in strings], device=text.device)[inverse]
    return answer[which].reshape(batch + answer.shape[1:])


def validate(text: Tensor, name: str, vocab_size: int | None = None) -> None:
    """Raise ValueError naming the argument unless `text` is a well-formed text with ids below `vocab_size`.

    >>> validate(torch.tensor([5, -1, 6]), "prompt")
    ValueError: prompt has padding before a token; texts are padded on the right
    """
    if not isinstance(text, Tensor) or text.dtype != torch.long or text.dim() < 1:
        raise ValueError(f"{name} must be a LongTensor[..., L] of token ids, not {_kind(text)}")
    if not text.numel():
        return
    if int(text.min()) < PAD:
        raise ValueError(f"{name} has the token id {int(text.min())}; ids are >= 0, and padding is {PAD}")
    if vocab_size is not None and int(text.max()) >= vocab_size:
        raise ValueError(f"{name} has the token id {int(text.max())}, outside the vocabulary of {vocab_size}")
    if bool(((text[..., :-1] == PAD) & (text[..., 1:] != PAD)).any()):
        raise ValueError(f"{name} has padding before a token; texts are padded on the right")
