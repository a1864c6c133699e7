"""What each token of a vocabulary spells, as llguidance needs to know it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..language_model import LanguageModel

_TRIALS = 64  # random texts on which the spelling is compared with the tokenizer's own decoder


def llguidance() -> ModuleType:
    """The library. Raises ImportError that says how to install it."""
    try:
        import llguidance
    except ImportError as error:
        raise ImportError(
            "constraints on the text need the library llguidance: pip install pyro-lmppl[grammar]"
        ) from error
    return llguidance


@dataclass(frozen=True)
class Spelling:
    """A vocabulary by what its tokens spell; tokens that spell the same are one to llguidance."""

    tokenizer: Any  # llguidance's, over the distinct spellings; number 0 is no spelling at all
    index: np.ndarray  # (V,): which spelling each token has; 0 for special tokens and ids that the tokenizer lacks

    def is_silent(self, token: int) -> bool:
        """Whether a token is no part of a text: eos and other special tokens."""
        return self.index[token] == 0


_KNOWN: WeakKeyDictionary[Any, Spelling] = WeakKeyDictionary()


def spelling(lm: LanguageModel) -> Spelling:
    """The spelling of a language model's vocabulary, found once per vocabulary.

    :raises ValueError: where the tokenizer's decoder does more than to put the tokens' spellings one after another.
    """
    vocabulary = lm.vocabulary
    if vocabulary not in _KNOWN:
        _KNOWN[vocabulary] = _spelling(lm)
    return _KNOWN[vocabulary]


def _spelling(lm: LanguageModel) -> Spelling:
    spelled = _bytes_of_tokens(lm)
    special = {*lm.tokenizer.all_special_ids, lm.eos_id, lm.bos_id}
    spelled = [b"" if i in special else s for i, s in enumerate(spelled)]
    _compare(lm, spelled)
    number: dict[bytes, int] = {b"": 0}
    index = np.array([number.setdefault(s, len(number)) for s in spelled])
    return Spelling(llguidance().LLTokenizer(_Wrapped([*number, b"<end>"]), slices=[]), index)


def _bytes_of_tokens(lm: LanguageModel) -> list[bytes]:
    """What each id below the vocabulary's size spells, b"" where the tokenizer does not know it."""
    known = min(len(lm.tokenizer), lm.vocab_size)
    try:
        from llguidance.hf import from_tokenizer

        of = from_tokenizer(lm.tokenizer, slices=[])
        spelled = [of.decode_bytes([i]) for i in range(known)]
    except (ValueError, AttributeError):  # a decoder that it does not know: tokens are taken as they are written
        written = lm.tokenizer.convert_ids_to_tokens(list(range(known)))
        spelled = [(w or "").encode() for w in written]
    return spelled + [b""] * (lm.vocab_size - known)


def _compare(lm: LanguageModel, spelled: list[bytes]) -> None:
    """Raise unless random texts decode to what their tokens spell (a decoder may drop the first space)."""
    content = [i for i, s in enumerate(spelled) if s]
    draw = random.Random(0)
    for _ in range(_TRIALS if content else 0):
        ids = draw.choices(content, k=6)
        expected = b"".join(spelled[i] for i in ids).decode(errors="replace")
        found = lm.vocabulary.decode(ids)
        if found not in (expected, expected.removeprefix(" ")):
            raise ValueError(
                f"lm: its tokenizer decodes the tokens {ids} as {found!r}, not one after another as {expected!r}; "
                "constraints on the text cannot be used with it"
            )


class _Wrapped:
    """The interface by which llguidance takes a list of spellings for a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, tokens: list[bytes]):
        self.tokens = tokens
        self.eos_token_id, self.bos_token_id = len(tokens) - 1, None
        self.special_token_ids = [len(tokens) - 1]

    def __call__(self, text: str) -> list[int]:
        return []  # asked only where llguidance forces tokens, which it does not here
