r"""Stop strings: a text ends at the first token at whose end the bytes spelled so far end with one of several strings.

How the tokens cut the string is no matter: an automaton reads what they spell.  Its state is the longest end of the
text that is a beginning of one of the strings (Aho and Corasick 1975); a token moves it by all of its bytes at once,
and the text has ended if it then stands on a whole string.  So a token may begin before the string and end with it,
but one that runs over the string's end does not end the text.  Special tokens spell nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class StopStrings:
    """The automaton of several stop strings, as it reads the tokens of one vocabulary; PAD leaves it where it is.

    :param spelled: the bytes that each token spells.
    :raises ValueError: naming ``stop``, for an empty string and for one that no tokens spell.
    """

    def __init__(self, spelled: Sequence[bytes], strings: Iterable[str], device: torch.device | None = None):
        self.strings = tuple(dict.fromkeys(strings))
        whole = [s.encode() for s in self.strings]
        if not all(whole):
            raise ValueError("stop='' is an empty string, which ends every text; give one of a character or more")
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
        """The states after the first ``first``, ``first + 1``, .. tokens of texts (..., L): (..., L + 1 - first)."""
        start = max(0, first - self.longest)  # as many tokens are as many bytes, unless some spell nothing
        if start and bool(self._silent[text[..., start:first]].any()):
            start = 0
        found = [torch.zeros(text.shape[:-1], dtype=torch.long, device=text.device)]
        for token in text[..., start:].unbind(-1):
            found.append(self.after(found[-1], token))
        return torch.stack(found[first - start :], -1)

    def after(self, state: Tensor, token: Tensor) -> Tensor:
        """The states after one token more."""
        return self.next[state, token].long()

    def ends(self, text: Tensor) -> Tensor:
        """Whether texts (..., L) end with a stop string after each of their tokens, (..., L)."""
        return (text >= 0) & self.final[self.states(text)[..., 1:]]

    def completing(self, state: Tensor) -> Tensor:
        """Which tokens complete a stop string, by the state before them: (...) -> (..., V)."""
        return self._completing[state]

    def state(self, ids: Sequence[int]) -> int:
        """The state after these tokens."""
        read = torch.tensor(ids, dtype=torch.long, device=self.next.device)
        return int(self.states(read, len(ids))[..., -1])

    def completing_ids(self, state: int) -> list[int]:
        """The tokens that complete a stop string after one state, found once."""
        if state not in self._known:
            self._known[state] = self._completing[state].nonzero()[:, 0].tolist()
        return self._known[state]


class Stops(NamedTuple):
    """What ends a text: tokens, and strings however they are spelled."""

    ids: Tensor  # (S,)
    strings: StopStrings | None

    def ends(self, text: Tensor) -> Tensor:
        """Whether each token of texts (..., L) ends the text, as if nothing before had ended it: (..., L)."""
        by_token = torch.isin(text, self.ids)
        return by_token if self.strings is None else by_token | self.strings.ends(text)

    def ending(self, text: Tensor) -> Ending:
        """Where and by what texts (..., L) end first."""
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
    """How texts end; all are (...)."""

    at: Tensor  # the tokens before the stop token; all of them up to there where a string ends the text or nothing does
    ended: Tensor
    by_string: Tensor  # by a string, that is, and no stop token
    stop: Tensor  # the stop token; where there is none, the first that there might be

    @property
    def width(self) -> Tensor:
        """How many tokens the text has, what ends it among them."""
        return self.at + (self.ended & ~self.by_string).long()


def _by_byte(beginnings: list[bytes]) -> np.ndarray:
    """(S, 256): the longest end of a beginning and one byte more that is a beginning too."""
    number = {b: i for i, b in enumerate(beginnings)}
    table = np.zeros((len(beginnings), 256), dtype=np.int64)
    for known in beginnings:
        for byte in set(b"".join(beginnings)):
            longer = known + bytes([byte])
            table[number[known], byte] = next(number[e] for n in range(len(longer) + 1) if (e := longer[n:]) in number)
    return table


def _read(by_byte: np.ndarray, tokens: list[bytes]) -> np.ndarray:
    """(S, V + 1): the state after each token; the last column is of one that spells nothing."""
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
    """(S,): the states to which some tokens lead from the start."""
    found, fresh = np.zeros(len(following), dtype=bool), {0}
    while fresh:
        found[list(fresh)] = True
        fresh = {s for state in fresh for s in np.unique(following[state]) if not found[s]}
    return found
