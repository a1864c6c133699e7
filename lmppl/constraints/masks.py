"""Constraints: masks over the vocabulary, functions of the prefix, and operations on both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from ..language_model import LanguageModel
from ..rows import distinct_rows
from ..text import PAD
from .arguments import as_list, as_lm

#: Which tokens may come next: a BoolTensor (V,), or a function from a prefix (..., t) to a BoolTensor (..., V).
Constraint: TypeAlias = Tensor | Callable[[Tensor], Tensor]


class PrefixConstraint(ABC):
    """The base class of constraints that know their vocabulary, so that they can also judge whole texts.

    A subclass sets ``vocab_size`` and defines ``__call__``.

    Example::

        class NoRepeats(PrefixConstraint):  # a token other than the last one
            def __init__(self, vocab_size):
                self.vocab_size = vocab_size

            def __call__(self, prefix):
                mask = torch.ones(*prefix.shape[:-1], self.vocab_size, dtype=torch.bool)
                return mask.scatter(-1, prefix[..., -1:].clamp(min=0), False) if prefix.shape[-1] else mask

        z = Completion(lm, x, max_tokens=5, allowed=NoRepeats(lm.vocab_size)).sample()
    """

    vocab_size: int

    @abstractmethod
    def __call__(self, prefix: Tensor) -> Tensor:
        """Returns which tokens may follow ``prefix`` (..., t), BoolTensor (..., V)."""

    def accepts(self, text: Tensor) -> Tensor:
        """Returns whether whole texts satisfy the constraint.

        :param text: texts (..., L).
        :returns: BoolTensor (...).

        >>> Slots(lm, [["a", "b"], ["c"]]).accepts(lm.encode(["ac", "bb"]))
        tensor([ True, False])
        """
        return keeps(self, text, self.vocab_size)

    def log_indicator(self, text: Tensor) -> Tensor:
        """Returns 0 for accepted texts and -inf for others: a condition on the whole text.

        :param text: texts (..., L).
        :returns: (...).

        >>> pyro.factor("condition", constraint.log_indicator(z))
        """
        return torch.zeros(text.shape[:-1], device=text.device).masked_fill(~self.accepts(text), -torch.inf)


def only(lm: LanguageModel, tokens: Iterable[int | str]) -> Tensor:
    """Returns the constraint that allows these tokens and no others.

    The stop token is a token too: list it, or the text goes on to ``max_tokens``.

    :param lm: the language model whose tokens these are.
    :param tokens: token ids, or strings that are one token each; "eos" is the eos.
    :returns: BoolTensor (V,).
    :raises ValueError: if a string is not one token.

    >>> d = Completion(lm, prompt, max_tokens=5, stop=".", allowed=only(lm, [" red", " apple", "."]))
    >>> only(lm, [" red", " apple", "."]).sum()
    tensor(3)
    """
    mask = torch.zeros(as_lm(lm).vocab_size, dtype=torch.bool, device=lm.device)
    listed = [tokens] if isinstance(tokens, str) else as_list(tokens, "tokens", "a list of token ids or strings")
    try:
        mask[lm.stop_ids(listed)] = True
    except ValueError as error:
        raise ValueError(f"tokens: {error}") from error
    return mask


def ban(lm: LanguageModel, tokens: Iterable[int | str]) -> Tensor:
    """Returns the constraint that allows every token except these.

    :param lm: the language model whose tokens these are.
    :param tokens: as of `only`.
    :returns: BoolTensor (V,).
    :raises ValueError: if a string is not one token.

    >>> d = Completion(lm, prompt, max_tokens=5, stop=".", allowed=ban(lm, [" red", " apple"]))
    >>> (~ban(lm, [" red", " apple"])).sum()
    tensor(2)
    """
    return ~only(lm, tokens)


def checked(allowed: Constraint | Iterable[int] | None, vocab_size: int, device: torch.device) -> Constraint | None:
    """Returns a constraint as a mask (V,) or a function; a list of ids becomes a mask.

    :param allowed: what the user passed as ``allowed``: a mask, token ids, a function of the prefix, or None.
    :param vocab_size: the number V of tokens.
    :param device: the device of the mask.
    :returns: BoolTensor (V,), a function, or None.
    :raises ValueError: if it is anything else, or allows no token.

    >>> checked([0, 2], 4, torch.device("cpu"))
    tensor([ True, False,  True, False])
    """
    if allowed is None or (callable(allowed) and not isinstance(allowed, Tensor)):
        return allowed
    kinds = "a list of token ids, a BoolTensor (V,) or a function of the prefix"
    listed = allowed if isinstance(allowed, Tensor) else as_list(allowed, "allowed", kinds)
    try:
        given = torch.as_tensor(listed, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"allowed: expected {kinds}, got {allowed!r}") from None
    if given.dtype == torch.bool:
        if given.shape != (vocab_size,):
            raise ValueError(f"allowed: a mask must have shape ({vocab_size},), got {tuple(given.shape)}")
        mask = given
    else:
        if given.dim() != 1 or given.is_floating_point():
            raise ValueError(f"allowed: expected {kinds}")
        if given.numel() and (int(given.min()) < 0 or int(given.max()) >= vocab_size):
            raise ValueError(f"allowed: token ids must lie in 0..{vocab_size - 1}")
        mask = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        mask[given] = True
    if not bool(mask.any()):
        raise ValueError("allowed: the constraint allows no token")
    return mask


def allowed_at(constraint: Constraint, prefix: Tensor, vocab_size: int) -> Tensor:
    """Returns the mask of a constraint after a prefix.

    :param constraint: a mask (V,) or a function of the prefix.
    :param prefix: LongTensor (..., t).
    :param vocab_size: the number V of tokens.
    :returns: BoolTensor (V,) or (..., V).
    :raises ValueError: if a function returns anything else.

    >>> mask = allowed_at(Slots(lm, [["a", "b"], ["c"]]), lm.encode("a"), lm.vocab_size)
    >>> mask.nonzero().flatten().tolist() == [lm.token_id("c")]
    True
    """
    if isinstance(constraint, Tensor):
        return constraint
    mask = constraint(prefix)
    if not isinstance(mask, Tensor):
        raise ValueError(f"allowed: the function must return a BoolTensor, not {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape[-1:] != (vocab_size,):
        raise ValueError(
            f"allowed: the function must return a BoolTensor (..., {vocab_size}); got {mask.dtype} {tuple(mask.shape)}"
        )
    return mask


def keeps(constraint: Constraint, text: Tensor, vocab_size: int) -> Tensor:
    """Returns whether every token of texts (..., L) is allowed after the tokens before it, BoolTensor (...)."""
    kept = torch.ones(text.shape[:-1], dtype=torch.bool, device=text.device)
    for t in range(text.shape[-1]):
        asked = kept & (text[..., t] != PAD)
        if not bool(asked.any()):
            break
        rows = text[asked]
        mask = allowed_at(constraint, rows[:, :t], vocab_size).expand(len(rows), -1)
        kept[asked] = mask.gather(1, rows[:, t, None])[:, 0]
    return kept


def distinct(prefix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distinct rows (n, t) of ``prefix`` (..., t), and the number of each row among them."""
    rows = prefix.reshape(prefix.shape[:-1].numel(), prefix.shape[-1])
    padded = torch.nn.functional.pad(rows, (0, 1))  # distinct_rows needs at least one column
    found, index = distinct_rows(padded)
    return found[:, :-1], index
