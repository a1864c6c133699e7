"""Text is a tensor: ``LongTensor[..., L]`` of token ids, padded on the right with ``PAD = -1``.

No token has the id -1. So padding is never confused with a token, even where a tokenizer pads with its eos.
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
    """The part of a language model that `map` needs.

    >>> class Letters:
    ...     def decode(self, text):
    ...         return ["".join(chr(97 + i) for i in row if i >= 0) for row in text.tolist()]
    >>> map(len, torch.tensor([[0, 1], [2, -1]]), Letters())
    tensor([2, 1])
    """

    def decode(self, text: Tensor) -> Any:
        """Returns the string of a text ``[L]``, or nested lists of strings for leading axes.

        :param text: texts ``[..., L]``.
        """


def _ask(**given: Any) -> None:
    """Raises ValueError, naming the argument, unless it is an integer tensor with at least one axis."""
    for name, t in given.items():
        if not isinstance(t, Tensor) or not t.dim() or t.is_floating_point():
            raise ValueError(f"{name} must be a LongTensor[..., L] of token ids, not {_kind(t)}")


def _kind(given: Any) -> str:
    return f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__


def length(text: Tensor) -> Tensor:
    """Returns the number of tokens of each text; padding is not counted.

    :param text: texts ``[..., L]``.
    :returns: ``LongTensor[...]``.
    :raises ValueError: if ``text`` is not an integer tensor with at least one axis.

    >>> length(torch.tensor([[5, -1], [6, 7]]))
    tensor([1, 2])
    """
    _ask(text=text)
    return (text != PAD).sum(-1)


def pad(text: Tensor, width: int) -> Tensor:
    """Returns the same texts with ``width`` columns: more padding on the right, or less of it.

    :param text: texts ``[..., L]``.
    :param width: the number of columns of the result.
    :returns: ``LongTensor[..., width]``.
    :raises ValueError: if ``width`` is not an integer, or if a token would be cut off.

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
    """Joins texts one after another, without the padding between them.

    :param texts: texts ``[..., L1], [..., L2], ...``, at least one; their leading axes broadcast.
    :returns: ``LongTensor[..., L]``, where L is the length of the longest joined text.
    :raises ValueError: if no text is given, or if the leading axes do not broadcast.

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
    end = keep.cumsum(-1)  # (*batch, sum of L): the number of tokens up to this column
    width = int(end[..., -1].max()) if end.numel() else 0
    # Column `width` receives the padding and is cut off afterwards.
    out = joined.new_full((*batch, width + 1), PAD)
    out.scatter_(-1, torch.where(keep, end - 1, width), joined)
    return out[..., :width]


def prefixes(text: Tensor, stop: int | Tensor) -> Tensor:
    """Returns every prefix of each text, followed by a stop.

    Row t of the result is z_1 .. z_t stop, then padding. Here z_1 .. z_n are the tokens before the text's first stop,
    or all tokens if there is no stop. Rows with t > n repeat the whole text, so that a model can run on all rows; mask
    them.

    :param text: texts ``[..., L]``.
    :param stop: the stop token: one id, or a LongTensor that broadcasts with the leading axes, one id for each text.
    :returns: ``LongTensor[W, ..., W]`` with ``W = max(L, n.max() + 1)``.
    :raises ValueError: if ``stop`` is neither an id nor a tensor of ids.

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
    text = pad(text, text.shape[-1] + 1).expand(*batch, -1)  # one more column: room for a stop after the last token
    stopped = text == stop
    n = torch.where(stopped.any(-1), stopped.int().argmax(-1), length(text))  # (*batch)
    width = max(text.shape[-1] - 1, int(n.max()) + 1 if n.numel() else 1)
    text = text[..., :width]
    column = torch.arange(width, device=text.device)
    row = column.view(-1, *(1 for _ in batch)).minimum(n)[..., None]  # (W, *batch, 1)
    return torch.where(column < row, text, torch.where(column == row, stop, PAD))  # (W, *batch, W)


def equal(a: Tensor, b: Tensor) -> Tensor:
    """Returns whether two texts have the same tokens; the amount of padding does not matter.

    :param a: texts ``[..., L1]``.
    :param b: texts ``[..., L2]``; the leading axes broadcast.
    :returns: ``BoolTensor[...]``.
    :raises ValueError: if ``a`` or ``b`` is not an integer tensor with at least one axis.

    >>> equal(torch.tensor([[5, -1], [5, 6]]), torch.tensor([5]))
    tensor([ True, False])
    """
    _ask(a=a, b=b)
    width = max(a.shape[-1], b.shape[-1])
    return (pad(a, width) == pad(b, width)).all(-1)


def map(f: Callable[[str], Any], text: Tensor, lm: Decoder) -> Tensor:
    """Applies a Python function to the string of each text, once for each distinct string.

    Use it for a condition of your own on a text: a model runs with extra particle and prefix axes on the left, and this
    function accepts any leading axes.

    :param f: a function of a string; it returns a number, a bool or a tensor.
    :param text: texts ``[..., L]``.
    :param lm: the language model that decodes them.
    :returns: a tensor ``[...]``; if ``f`` returns tensors of shape S, ``[..., *S]``.
    :raises ValueError: if ``f`` is not callable, or returns anything else.

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
    """Raises ValueError, naming the argument, if a tensor is not a well-formed text.

    A text is a LongTensor with at least one axis, with ids from 0 to ``vocab_size - 1``, and with padding only on the
    right.

    :param text: the tensor to check.
    :param name: the name of the argument, for the message.
    :param vocab_size: the number of ids; None: ids have no upper limit.
    :raises ValueError: if ``text`` is not well-formed.

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
