"""Stop strings: a text ends at the first token at whose end the bytes spelled so far end with one of several strings.

It does not matter which tokens spell the string: an automaton reads their bytes. Its state is the longest suffix of the
text that is a prefix of one of the strings (Aho and Corasick 1975). A token moves it by all of its bytes at once, and
the text has ended if the new state is a whole string. So a token may begin before the string and end with it, but a
token that runs over the string's end does not end the text. Special tokens spell nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class StopStrings:
    """The automaton of several stop strings for the tokens of one vocabulary; PAD does not change its state.

    :param spelled: the bytes that each token spells.
    :param strings: the stop strings.
    :param device: the device of its tables.
    :raises ValueError: naming ``stop``, for an empty string or one that no tokens spell.
    """

    strings: tuple[str, ...]
    longest: int
    next: Tensor
    final: Tensor
    _silent: Tensor

    def __init__(self, spelled: Sequence[bytes], strings: Iterable[str], device: torch.device | None = None):
        self.strings = tuple(dict.fromkeys(strings))
        whole = [s.encode() for s in self.strings]
        if not all(whole):
            raise ValueError("stop='' is an empty string, which ends every text; give at least one character")
        beginnings = sorted({s[:n] for s in whole for n in range(len(s) + 1)}, key=len)
        self.longest = len(beginnings[-1])  # in bytes
        following = _read(_by_byte(beginnings), [s[-self.longest :] for s in spelled])
        ends = np.array([[b.endswith(s) for s in whole] for b in beginnings])  # (state, string)
        missing = ~ends[_reachable(following)].any(0)
        if missing.any():
            raise ValueError(f"stop={self.strings[missing.argmax()]!r} is a string that no tokens of this model spell")
        silent = np.array([not s for s in spelled] + [True])
        self.next, self.final, self._silent = (
            torch.from_numpy(x).to(device) for x in (following.astype(np.int32), ends.any(1), silent)
        )  # (S, V + 1), (S,), (V + 1,): the last column is PAD's
        self._completing = self.final[self.next[:, :-1].long()]  # (S, V)
        self._known: dict[int, list[int]] = {}

    def states(self, text: Tensor, first: int = 0) -> Tensor:
        """Returns the states after the first ``first``, ``first + 1``, ..

        tokens of texts (..., L): (..., L + 1 - first).
        """
        start = max(0, first - self.longest)  # so many tokens are at least as many bytes, unless some spell nothing
        if start and bool(self._silent[text[..., start:first]].any()):
            start = 0
        found = [torch.zeros(text.shape[:-1], dtype=torch.long, device=text.device)]
        for token in text[..., start:].unbind(-1):
            found.append(self.after(found[-1], token))
        return torch.stack(found[first - start :], -1)

    def after(self, state: Tensor, token: Tensor) -> Tensor:
        """Returns the states after one more token."""
        return self.next[state, token].long()

    def ends(self, text: Tensor) -> Tensor:
        """Returns whether texts (..., L) end with a stop string after each of their tokens, (..., L)."""
        return (text >= 0) & self.final[self.states(text)[..., 1:]]

    def completing(self, state: Tensor) -> Tensor:
        """Returns which tokens complete a stop string, given the states before them: (...) -> (..., V)."""
        return self._completing[state]

    def state(self, ids: Sequence[int]) -> int:
        """Returns the state after these tokens."""
        read = torch.tensor(ids, dtype=torch.long, device=self.next.device)
        return int(self.states(read, len(ids))[..., -1])

    def completing_ids(self, state: int) -> list[int]:
        """Returns the tokens that complete a stop string after one state; they are computed once."""
        if state not in self._known:
            self._known[state] = self._completing[state].nonzero()[:, 0].tolist()
        return self._known[state]


class Stops(NamedTuple):
    """What ends a text: tokens (``ids``), and strings, whatever tokens spell them (``strings``)."""

    ids: Tensor  # (S,)
    strings: StopStrings | None

    def ends(self, text: Tensor) -> Tensor:
        """Returns whether each token of texts (..., L) ends the text, as if no earlier one had: (..., L)."""
        by_token = torch.isin(text, self.ids)
        return by_token if self.strings is None else by_token | self.strings.ends(text)

    def ending(self, text: Tensor) -> Ending:
        """Returns where texts (..., L) first end, and by what."""
        length = (text >= 0).sum(-1)
        if not text.shape[-1]:
            nowhere = torch.zeros_like(length, dtype=torch.bool)
            return Ending(length, nowhere, nowhere, self._first(length))
        ends = self.ends(text)
        ended, at = ends.any(-1), ends.long().argmax(-1)
        last = text.gather(-1, at[..., None])[..., 0]
        by_string = ended & ~torch.isin(last, self.ids)
        own = torch.where(ended & ~by_string, last, self._first(length))
        return Ending(torch.where(ended, at + by_string.long(), length), ended, by_string, own)

    def _first(self, like: Tensor) -> Tensor:
        return self.ids[0].expand_as(like) if len(self.ids) else torch.zeros_like(like)


class Ending(NamedTuple):
    """How texts end; all fields are (...)."""

    at: Tensor  # the number of tokens before the stop token; if a string or nothing ends the text, of all its tokens
    ended: Tensor  # whether it ends
    by_string: Tensor  # whether a string ends it, and no stop token
    stop: Tensor  # the stop token; if there is none, the first possible one

    @property
    def width(self) -> Tensor:
        """The number of tokens of the text, including the one that ends it."""
        return self.at + (self.ended & ~self.by_string).long()


def _by_byte(beginnings: list[bytes]) -> np.ndarray:
    """Returns a table (S, 256): the longest suffix of a prefix and one more byte that is a prefix too."""
    number = {b: i for i, b in enumerate(beginnings)}
    table = np.zeros((len(beginnings), 256), dtype=np.int64)
    for known in beginnings:
        for byte in set(b"".join(beginnings)):
            longer = known + bytes([byte])
            table[number[known], byte] = next(number[e] for n in range(len(longer) + 1) if (e := longer[n:]) in number)
    return table


def _read(by_byte: np.ndarray, tokens: list[bytes]) -> np.ndarray:
    """Returns the state after each token, (S, V + 1); the last column is for a token that spells nothing."""
    tokens = [*tokens, b""]
    lengths = np.array([len(t) for t in tokens])
    width = lengths.max()
    letters = np.frombuffer(b"".join(t.ljust(width) for t in tokens), dtype=np.uint8).reshape(len(tokens), width)
    state = np.repeat(np.arange(len(by_byte))[:, None], len(tokens), 1)
    for j in range(width):
        longer = np.flatnonzero(lengths > j)
        state[:, longer] = by_byte[state[:, longer], letters[longer, j]]
    return state


def _reachable(following: np.ndarray) -> np.ndarray:
    """Returns which states some tokens lead to from the start, (S,)."""
    found, fresh = np.zeros(len(following), dtype=bool), {0}
    while fresh:
        found[list(fresh)] = True
        fresh = {s for state in fresh for s in np.unique(following[state]) if not found[s]}
    return found
