"""`Slots`: texts of a fixed form, with one token from each set in turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import text
from ..language_model import LanguageModel
from .arguments import as_lm
from .masks import PrefixConstraint, only


class Slots(PrefixConstraint):
    r"""The constraint that a text fills the slots of one of several forms: finitely many texts.

    .. math:: \#\text{texts} = \sum_f \prod_t |S_{ft}|

    where :math:`S_{ft}` is slot t of form f. After a prefix, a form allows its next slot if the prefix fills the slots
    before it, and nothing otherwise.

    :param lm: the language model whose tokens fill the slots.
    :param forms: each is a sequence of slots; a slot is a list of token ids or of strings that are one token each. A
        stop is a token too: give it a slot.
    :raises ValueError: naming ``forms``, if there is none, one is empty, or a string is not one token.

        >>> he_did = Slots(lm, [[" He", " She"], [" sharpened", " swung"], [" it"], ["."]])
        >>> len(he_did.texts())
        4
    """

    def __init__(self, lm: LanguageModel, *forms: Sequence[Iterable[int | str]]):
        if not forms or not all(forms):
            raise ValueError("forms: expected at least one form, each with at least one slot")
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
        """Returns whether whole texts fill a form from its first slot to its last.

        :param value: texts (..., L).
        :returns: BoolTensor (...).

        >>> Slots(lm, [["a", "b"], ["c"]]).accepts(lm.encode(["ac", "a"]))
        tensor([ True, False])
        """
        length = text.length(value)
        found = torch.zeros_like(length, dtype=torch.bool)
        for form in self.forms:
            if len(form) <= value.shape[-1]:
                found |= (length == len(form)) & self._fills(form, value[..., : len(form)])
        return found

    def texts(self) -> Tensor:
        """Returns all texts, LongTensor (K, L); a text that fills two forms appears twice.

        >>> lm.decode(Slots(lm, [["a", "b"], ["c"]]).texts())
        ['ac', 'bc']
        """
        filled = [
            torch.cartesian_prod(*(slot.nonzero()[:, 0] for slot in form)).view(-1, len(form)) for form in self.forms
        ]
        return torch.cat([text.pad(z, max(len(form) for form in self.forms)) for z in filled])

    @staticmethod
    def _fills(form: Tensor, prefix: Tensor) -> Tensor:
        """Returns whether tokens (..., t) fill the first t slots, (...)."""
        t = torch.arange(prefix.shape[-1], device=prefix.device)
        return (form[t, prefix.clamp(min=0)] & (prefix >= 0)).all(-1)
