"""Constraints as such: masks over the vocabulary, functions of the prefix, and what is asked of either."""

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
    """A constraint that knows its vocabulary, so that it can be asked about whole texts too."""

    vocab_size: int

    @abstractmethod
    def __call__(self, prefix: Tensor) -> Tensor:
        """The tokens allowed after ``prefix`` (..., t), BoolTensor (..., V)."""

    def accepts(self, text: Tensor) -> Tensor:
        """Whether whole texts (..., L) satisfy the constraint, BoolTensor (...)."""
        return keeps(self, text, self.vocab_size)

    def log_indicator(self, text: Tensor) -> Tensor:
        """0 where a text (..., L) is accepted and -inf elsewhere, (...): a condition on the whole text.

        >>> pyro.factor("condition", constraint.log_indicator(z))
        """
        return torch.zeros(text.shape[:-1], device=text.device).masked_fill(~self.accepts(text), -torch.inf)


def only(lm: LanguageModel, tokens: Iterable[int | str]) -> Tensor:
    """The constraint ``(V,)`` that allows these tokens (ids, or strings of one token each) and nothing else.

    The stop token is a token too: name it, or the text runs to ``max_tokens``.

    >>> Completion(lm, prompt, max_tokens=5, stop=".", allowed=only(lm, [" red", " apple", "."]))
    """
    mask = torch.zeros(as_lm(lm).vocab_size, dtype=torch.bool, device=lm.device)
    listed = [tokens] if isinstance(tokens, str) else as_list(tokens, "tokens", "a list of token ids or strings")
    try:
        mask[lm.stop_ids(listed)] = True
    except ValueError as error:
        raise ValueError(f"tokens: {error}") from error
    return mask


def ban(lm: LanguageModel, tokens: Iterable[int | str]) -> Tensor:
    """The constraint ``(V,)`` that allows every token but these.

    >>> Completion(lm, prompt, max_tokens=5, stop=".", allowed=ban(lm, [" red", " apple"]))
    """
    return ~only(lm, tokens)


def checked(allowed: Constraint | Iterable[int] | None, vocab_size: int, device: torch.device) -> Constraint | None:
    """``allowed`` as a mask (V,) or a callable; a list of ids becomes a mask."""
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
        raise ValueError("allowed: the constraint allows no token at all")
    return mask


def allowed_at(constraint: Constraint, prefix: Tensor, vocab_size: int) -> Tensor:
    """The mask (V,) or (..., V) after ``prefix`` (..., t)."""
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
    """Whether every token of texts (..., L) is allowed after the tokens before it, BoolTensor (...)."""
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
    """The different rows (n, t) of ``prefix`` (..., t), and which of them each is, (number of rows,)."""
    rows = prefix.reshape(prefix.shape[:-1].numel(), prefix.shape[-1])
    padded = torch.nn.functional.pad(rows, (0, 1))  # rows of no token at all would not be taken
    found, index = distinct_rows(padded)
    return found[:, :-1], index
