"""`Slots`: texts of known form, one token out of each set in turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import text
from ..language_model import LanguageModel
from .arguments import as_lm
from .masks import PrefixConstraint, only


class Slots(PrefixConstraint):
    r"""The texts whose tokens fill the slots of one of several forms: finitely many, :math:`\sum_f \prod_t |S_{ft}|`.

    After a prefix, a form allows its next slot if the prefix fills the slots before it, and nothing otherwise.

    :param lm: the language model whose tokens fill the slots.
    :param forms: each a sequence of slots, a slot several tokens (ids, or strings of one token); a stop is a token too.
    :raises ValueError: naming ``forms``, for none, an empty one, or a string that is not one token.

        >>> Slots(lm, [[" He", " She"], [" sharpened", " swung"], [" it"], ["."]])
    """

    def __init__(self, lm: LanguageModel, *forms: Sequence[Iterable[int | str]]):
        if not forms or not all(forms):
            raise ValueError("forms: expected one or more, each of one slot or more")
        self.vocab_size = as_lm(lm).vocab_size
        try:
            self.forms = [torch.stack([only(lm, slot) for slot in form]) for form in forms]  # (slots, V) each
        except ValueError as error:
            raise ValueError(f"forms: {error}") from error

    def __call__(self, prefix: Tensor) -> Tensor:
        t = prefix.shape[-1]
        mask = torch.zeros(*prefix.shape[:-1], self.vocab_size, dtype=torch.bool, device=prefix.device)
        for form in self.forms:
            if t < len(form):
                mask |= self._fills(form, prefix)[..., None] & form[t]
        return mask

    def accepts(self, value: Tensor) -> Tensor:
        """Whether whole texts (..., L), padded, fill a form from its first slot to its last, BoolTensor (...)."""
        length = text.length(value)
        found = torch.zeros_like(length, dtype=torch.bool)
        for form in self.forms:
            if len(form) <= value.shape[-1]:
                found |= (length == len(form)) & self._fills(form, value[..., : len(form)])
        return found

    def texts(self) -> Tensor:
        """All of the texts, (K, L); distinct where no text fills two forms."""
        filled = [
            torch.cartesian_prod(*(slot.nonzero()[:, 0] for slot in form)).view(-1, len(form)) for form in self.forms
        ]
        return torch.cat([text.pad(z, max(len(form) for form in self.forms)) for z in filled])

    @staticmethod
    def _fills(form: Tensor, prefix: Tensor) -> Tensor:
        """Whether tokens (..., t) fill the first t slots, (...)."""
        t = torch.arange(prefix.shape[-1], device=prefix.device)
        return (form[t, prefix.clamp(min=0)] & (prefix >= 0)).all(-1)
