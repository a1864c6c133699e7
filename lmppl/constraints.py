"""Constraints on which token may come next, masked *inside* a distribution (a proposal, renormalised token by token).

A constraint is a function ``prefix (..., t) -> BoolTensor (..., V)`` of the tokens drawn so far, or simply a
``BoolTensor (V,)`` for one that ignores them.  A condition on the whole text is something else, a `pyro.factor` in the
model: masking gives each token's mass to its allowed siblings, conditioning gives it to all allowed texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from .language_model import LanguageModel

Constraint: TypeAlias = Tensor | Callable[[Tensor], Tensor]


def only(lm: LanguageModel, tokens: Iterable[int | str]) -> Tensor:
    """The constraint ``(V,)`` that allows these tokens (ids, or strings of one token each) and nothing else.

    The stop token is a token too: name it, or the text runs to ``max_tokens``.

        >>> Completion(lm, prompt, max_tokens=5, stop=".", allowed=only(lm, [" red", " apple", "."]))
    """
    mask = torch.zeros(lm.vocab_size, dtype=torch.bool, device=lm.device)
    mask[lm.stop_ids(list(tokens))] = True
    return mask


def ban(lm: LanguageModel, tokens: Iterable[int | str]) -> Tensor:
    """The constraint ``(V,)`` that allows every token but these."""
    return ~only(lm, tokens)


def checked(allowed: Constraint | Iterable[int] | None, vocab_size: int, device: torch.device) -> Constraint | None:
    """``allowed`` as a mask (V,) or a callable; a list of ids becomes a mask."""
    if allowed is None or (callable(allowed) and not isinstance(allowed, Tensor)):
        return allowed
    given = torch.as_tensor(allowed if isinstance(allowed, Tensor) else list(allowed), device=device)
    if given.dtype == torch.bool:
        if given.shape != (vocab_size,):
            raise ValueError(f"allowed: a mask must have shape ({vocab_size},), got {tuple(given.shape)}")
        mask = given
    else:
        if given.dim() != 1 or given.is_floating_point():
            raise ValueError("allowed: expected a list of token ids, a BoolTensor (V,) or a function of the prefix")
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
