"""What each token of a vocabulary spells, in the form that llguidance needs."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..language_model import LanguageModel


def llguidance() -> ModuleType:
    """Returns the library; raises ImportError that says how to install it."""
    try:
        import llguidance
    except ImportError as error:
        raise ImportError(
            "constraints on the text need the library llguidance: pip install pyro-lmppl[grammar]"
        ) from error
    return llguidance


@dataclass(frozen=True)
class Spelling:
    """A vocabulary by what its tokens spell. Tokens with the same spelling are one token to llguidance."""

    tokenizer: Any  # llguidance's tokenizer of the distinct spellings; number 0 stands for none
    index: np.ndarray  # (V,): the number of each token's spelling; 0 for special tokens and ids without a token

    def is_silent(self, token: int) -> bool:
        """Returns whether a token is no part of a text: eos and other special tokens."""
        return self.index[token] == 0


_KNOWN: WeakKeyDictionary[Any, Spelling] = WeakKeyDictionary()


def spelling(lm: LanguageModel) -> Spelling:
    """Returns the spelling of a language model's vocabulary; it is computed once for each vocabulary."""
    vocabulary = lm.vocabulary
    if vocabulary not in _KNOWN:
        number: dict[bytes, int] = {b"": 0}
        index = np.array([number.setdefault(s, len(number)) for s in vocabulary.spelled])
        _KNOWN[vocabulary] = Spelling(llguidance().LLTokenizer(_Wrapped([*number, b"<end>"]), slices=[]), index)
    return _KNOWN[vocabulary]


class _Wrapped:
    """The interface through which llguidance accepts a list of spellings as a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, tokens: list[bytes]):
        self.tokens = tokens
        self.eos_token_id, self.bos_token_id = len(tokens) - 1, None
        self.special_token_ids = [len(tokens) - 1]

    def __call__(self, text: str) -> list[int]:
        return []  # only called where llguidance forces tokens, which is switched off
