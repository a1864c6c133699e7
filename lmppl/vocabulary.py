"""Strings to token ids and back, for one tokenizer and the network that it feeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CACHED_STRINGS = 4096


class Vocabulary:
    """A tokenizer with its special ids, and a small cache of the strings it has encoded.

    :param tokenizer: a Hugging Face tokenizer.
    :param config: the model's configuration, asked for a bos or eos that the tokenizer does not know.
    :param size: how many ids the network knows.
    """

    def __init__(self, tokenizer: Any, config: Any, size: int) -> None:
        self.tokenizer = tokenizer
        self.size = size
        self.eos_id = first_int(tokenizer.eos_token_id, getattr(config, "eos_token_id", None))
        self.bos_id = first_int(tokenizer.bos_token_id, getattr(config, "bos_token_id", None), self.eos_id)
        special = tokenizer("", add_special_tokens=True)["input_ids"]
        self.adds_bos = len(special) > 0 and special[0] == tokenizer.bos_token_id
        self._cache: dict[str, tuple[int, ...]] = {}
        self._endings: dict[int, str] = {}

    def encode(self, strings: list[str]) -> list[tuple[int, ...]]:
        """The ids of each string, no special tokens added. Raises ValueError where the network lacks one."""
        cache = self._cache
        fresh = [s for s in dict.fromkeys(strings) if s not in cache]
        if fresh:
            if len(cache) + len(fresh) > CACHED_STRINGS:
                cache.clear()
                fresh = list(dict.fromkeys(strings))
            try:
                encoded = self.tokenizer(fresh, add_special_tokens=False)["input_ids"]
            except Exception as error:  # tokenizers raises plain Exception for a word that a closed vocabulary lacks
                raise ValueError(f"text {fresh[0]!r} cannot be encoded: {error}") from error
            for s, ids in zip(fresh, encoded, strict=True):
                if ids and max(ids) >= self.size:
                    raise ValueError(f"text {s!r} has the token id {max(ids)}, outside the model's {self.size} ids")
                cache[s] = tuple(ids)
        return [cache[s] for s in strings]

    def decode(self, ids: list[int]) -> str:
        """The string of these ids, special tokens dropped."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def ending(self, token: int) -> str:
        """The last character of any text that ends with this token; "" where the token alone does not say."""
        if token not in self._endings:
            last = self.decode([token])[-1:]
            self._endings[token] = "" if last == "\ufffd" else last  # a part of a character
        return self._endings[token]

    def token_id(self, stop: str | int) -> int:
        """The id of one stop: "eos", a string that is one token, or an id. Raises ValueError naming `stop`."""
        if stop == "eos":
            if self.eos_id is None:
                raise ValueError("stop='eos', but the tokenizer has no eos token")
            return self.eos_id
        if isinstance(stop, str):
            found = self.tokenizer.convert_tokens_to_ids(stop)
            # As written in the vocabulary, where it stands for itself: some tokenizers encode "." alone as " .".
            if isinstance(found, int) and self._spelling(found) == stop:
                return found
            ids = self.encode([stop])[0]
            if len(ids) != 1 or self._spelling(ids[0]) != stop:
                written = [self._spelling(i) for i in ids]
                raise ValueError(f"stop={stop!r} is written {written}; a stop is one token")
            return ids[0]
        if isinstance(stop, bool) or not isinstance(stop, int) or not 0 <= stop < self.size:
            raise ValueError(f"stop={stop!r} is neither 'eos', a string nor an id below {self.size}")
        return stop

    def _spelling(self, token: int) -> str:
        return self.tokenizer.decode([token], clean_up_tokenization_spaces=False)


def flatten(nested: Any) -> tuple[tuple[int, ...], list[str]]:
    """The shape of an evenly nested list of strings, and its strings in a row. Raises ValueError naming `text`."""
    if isinstance(nested, str):
        return (), [nested]
    if not isinstance(nested, list | tuple):
        raise ValueError(f"text must be a string or a nested list of strings, not {type(nested).__name__}")
    inner = [flatten(n) for n in nested]
    if len({shape for shape, _ in inner}) > 1:
        raise ValueError("text must be nested evenly: lists on one level have different lengths")
    return (len(nested), *(inner[0][0] if inner else ())), [s for _, flat in inner for s in flat]


def nest(flat: list[str], shape: Sequence[int]) -> Any:
    """The inverse of `flatten`."""
    if not shape:
        return flat[0]
    size = len(flat) // shape[0] if shape[0] else 0
    return [nest(flat[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]


def first_int(*candidates: Any) -> int | None:
    """The first candidate that is there; of several ids, the first."""
    for candidate in candidates:
        one = candidate[0] if isinstance(candidate, list | tuple) and candidate else candidate
        if isinstance(one, int):
            return one
    return None
