"""Strings to token ids and back, for one tokenizer and the network that it feeds.

Strings are pieces of text: what is encoded may stand anywhere, and its tokens spell it and nothing else. Tokenizers
encode a string as if it began a document; SentencePiece and its like then put a space before it. `encode` writes the
piece without that space, unless it is told that a document starts here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from .spelling import special_ids, spellings
from .stop_strings import StopStrings

CACHED_STRINGS = 4096
CACHED_AUTOMATA = 16
_ANCHORS = ("\n", ".", "(", "0", "a", "我")  # what a piece is encoded after, where it must not begin a document

Ids = tuple[int, ...]


class Vocabulary:
    """A tokenizer with its special ids, and a small cache of the strings it has encoded.

    :param tokenizer: a Hugging Face tokenizer.
    :param config: the model's configuration, asked for the ends of a text and for a bos.
    :param size: how many ids the network knows.
    :param generation: the model's generation configuration, asked first.
    """

    def __init__(self, tokenizer: Any, config: Any, size: int, generation: Any = None) -> None:
        self.tokenizer = tokenizer
        self.size = size
        self.special = special_ids(tokenizer)
        ends = self._configured((generation, config), "eos_token_id")
        own = tokenizer.eos_token_id
        self.eos_ids: Ids = ends or (() if own is None else (own,))
        # Of several ends, the one that the tokenizer writes.
        self.eos_id = own if own in self.eos_ids else next(iter(self.eos_ids), None)
        starts = self._configured((generation, config), "bos_token_id")
        self.bos_id = next((i for i in (tokenizer.bos_token_id, *starts, self.eos_id) if i is not None), None)
        written = tokenizer("", add_special_tokens=True)["input_ids"]
        self.adds_bos = len(written) > 0 and written[0] == tokenizer.bos_token_id
        self._cache: dict[tuple[str, bool], Ids] = {}
        self._endings: dict[int, str] = {}
        self._stop_strings: dict[tuple[Any, ...], StopStrings] = {}

    def _configured(self, sources: tuple[Any, Any], name: str) -> Ids:
        """The ids that the generation configuration names, else the model's, in the order given.

        A configuration none of whose ids is special to a tokenizer that has one of its own was made for another
        vocabulary, and is passed over.
        """
        for source in sources:
            given = getattr(source, name, None)
            ids = given if isinstance(given, list | tuple) else [given]
            found = [i for i in ids if isinstance(i, int) and 0 <= i < self.size]
            if found and (getattr(self.tokenizer, name) is None or self.special.intersection(found)):
                return tuple(dict.fromkeys(found))
        return ()

    # What tokens spell -----------------------------------------------------------------------------------------------

    @cached_property
    def spelled(self) -> list[bytes]:
        """The bytes that each id spells, b"" for special tokens and for ids that the tokenizer lacks."""
        return spellings(self.tokenizer, self.size)

    @cached_property
    def _ids(self) -> dict[str, int]:
        """The id of each token as the tokenizer writes it."""
        return self.tokenizer.get_vocab()

    @cached_property
    def _by_spelling(self) -> dict[bytes, int]:
        """The first id that spells each string of bytes."""
        return {s: i for i, s in reversed([*enumerate(self.spelled)]) if s}

    @cached_property
    def marks_start(self) -> bool:
        """Whether the tokenizer puts a space before what begins a document."""
        try:
            return self.spell(self._plain(["a"])[0]).startswith(b" ")
        except ValueError:  # a closed vocabulary that lacks it
            return False

    @cached_property
    def _apart(self) -> bool:
        """Whether every token begins with a space, so that a text's first space says nothing."""
        return all(s.startswith(b" ") for s in self.spelled if s)

    def spell(self, ids: Iterable[int]) -> bytes:
        """What these tokens spell."""
        return b"".join([self.spelled[i] for i in ids])

    def decode(self, ids: Sequence[int]) -> str:
        """The string of these ids, special tokens dropped; bytes that make no character become U+FFFD.

        After a bos, the space with which the tokenizer marks the start of a document is dropped too; so is the first
        space where the tokenizer knows no words without.
        """
        spelled = self.spell(ids)
        if self._apart or (len(ids) and ids[0] == self.tokenizer.bos_token_id and self.marks_start):
            spelled = spelled.removeprefix(b" ")
        return spelled.decode(errors="replace")

    def ending(self, token: int) -> str:
        """The last character of any text that ends with this token; "" where the token alone does not say."""
        if token not in self._endings:
            last = self.spelled[token].decode(errors="replace")[-1:]
            self._endings[token] = "" if last == "\ufffd" else last  # a part of a character
        return self._endings[token]

    # How strings are written -----------------------------------------------------------------------------------------

    def encode(self, strings: list[str], start: bool = False) -> list[Ids]:
        """The ids of each string, no special tokens added: as a piece of text or, with `start`, as a document's start.

        Raises ValueError naming the text, and the word of it, that the tokenizer cannot write.
        """
        cache = self._cache
        fresh = [s for s in dict.fromkeys(strings) if (s, start) not in cache]
        if fresh:
            if len(cache) + len(fresh) > CACHED_STRINGS:
                cache.clear()
                fresh = list(dict.fromkeys(strings))
            plain = self._plain(fresh)
            written = plain if start else self._pieces(fresh, plain)
            for s, ids in zip(fresh, written, strict=True):
                if ids and max(ids) >= self.size:
                    raise ValueError(f"text {s!r} has the token id {max(ids)}, outside the model's {self.size} ids")
                cache[s, start] = ids
        return [cache[s, start] for s in strings]

    def _plain(self, strings: list[str]) -> list[Ids]:
        """What the tokenizer makes of each string, no special tokens added."""
        try:
            return [tuple(ids) for ids in self.tokenizer(strings, add_special_tokens=False)["input_ids"]]
        except Exception as error:  # tokenizers raises plain Exception for a word that a closed vocabulary lacks
            text = next((s for s in strings if not self._can_write(s)), strings[0])
            words = re.findall(r"\s*\S+|\s+", text)
            word = next((w for w in words if not self._can_write(w)), None)
            where = "" if word in (None, text) else f" at {word!r}"
            raise ValueError(f"text {text!r} cannot be encoded{where}: {error}") from error

    def _can_write(self, string: str) -> bool:
        try:
            self.tokenizer([string], add_special_tokens=False)
        except Exception:
            return False
        return True

    def _pieces(self, strings: list[str], plain: list[Ids]) -> list[Ids]:
        """Without the space that the tokenizer put before a string as before a document."""
        found = dict(zip(strings, plain, strict=True))
        marked = {}  # what each string that has such a space should spell
        for s, ids in found.items():
            spelled = () if not ids or ids[0] >= self.size else self.spelled[ids[0]]
            if spelled[:1] == b" " and max(ids) < self.size:
                whole = self.spell(ids)
                if _spaces(whole) > _spaces(s.encode()):
                    marked[s] = whole[1:]
        for anchor in _ANCHORS if marked else ():
            try:
                head, *wholes = self._plain([anchor, *(anchor + s for s in marked)])
            except ValueError:  # a closed vocabulary that lacks it
                continue
            for s, ids in zip([*marked], wholes, strict=True):
                rest = ids[len(head) :]
                if ids[: len(head)] == head and max(rest, default=0) < self.size and self.spell(rest) == marked[s]:
                    found[s] = rest
                    del marked[s]
        for s in marked:
            found[s] = self._continuing(found[s])
        return [found[s] for s in strings]

    def _continuing(self, ids: Ids) -> Ids:
        """A text whose first word continues another, as WordPiece writes it; as it is where that cannot be."""
        prefix = getattr(getattr(getattr(self.tokenizer, "backend_tokenizer", None), "decoder", None), "prefix", None)
        if prefix is None:
            return ids
        end = next((t for t in range(1, len(ids)) if not self._is_within(ids[t], prefix)), len(ids))
        word = self.spell(ids[:end]).decode().removeprefix(" ")
        pieces = []
        while word:
            longest = next((n for n in range(len(word), 0, -1) if prefix + word[:n] in self._ids), 0)
            if not longest:
                return ids
            pieces.append(self._ids[prefix + word[:longest]])
            word = word[longest:]
        return (*pieces, *ids[end:])

    def _is_within(self, token: int, prefix: str) -> bool:
        return self.tokenizer.convert_ids_to_tokens(token).startswith(prefix)

    # Stops -----------------------------------------------------------------------------------------------------------

    def token_id(self, stop: str | int) -> int:
        """The id of one stop: "eos", a string that is one token, or an id. Raises ValueError naming `stop`."""
        if stop == "eos":
            if self.eos_id is None:
                raise ValueError("stop='eos', but the tokenizer has no eos token")
            return self.eos_id
        if isinstance(stop, str):
            if (found := self.one_token(stop)) is None:
                raise ValueError(f"stop={stop!r} is {self._written(stop)}; one token is expected here")
            return found
        if isinstance(stop, bool) or not isinstance(stop, int) or not 0 <= stop < self.size:
            raise ValueError(f"stop={stop!r} is neither 'eos', a string nor an id below {self.size}")
        return stop

    def stop_strings(self, strings: tuple[str, ...], device: Any) -> StopStrings:
        """The automaton of these stop strings. Raises ValueError for one that is empty or that no tokens spell."""
        key = (strings, device)
        if key not in self._stop_strings:
            if len(self._stop_strings) >= CACHED_AUTOMATA:
                self._stop_strings.clear()
            self._stop_strings[key] = StopStrings(self.spelled, strings, device)
        return self._stop_strings[key]

    def ending_ids(self, stop: str | int) -> Ids:
        """The tokens that end a text by a stop: one, or those that the tokenizer writes a string of several with."""
        if not isinstance(stop, str) or stop == "eos" or self.one_token(stop) is not None:
            return (self.token_id(stop),)
        (ids,) = self.encode([stop]) if stop else ((),)
        if not ids or self.spell(ids) != stop.encode():
            raise ValueError(f"stop={stop!r} is {self._written(stop)}")
        return ids

    def one_token(self, string: str) -> int | None:
        """The id of the token that spells a string, or is the special token so written; None where there is none."""
        found = self._ids.get(string)
        if (
            found is not None
            and found < self.size
            and (found in self.special or self.spelled[found] == string.encode())
        ):
            return found
        try:
            (ids,) = self.encode([string])
        except ValueError:
            ids = ()
        if len(ids) == 1 and self.spelled[ids[0]] == string.encode():
            return ids[0]
        return self._by_spelling.get(string.encode())

    def _written(self, string: str) -> str:
        """How the tokenizer writes a string, in words."""
        try:
            (ids,) = self.encode([string])
        except ValueError:
            ids = ()
        if self.spell(ids) != string.encode():
            return "nothing that this tokenizer can write"
        return f"written {[self.spelled[i].decode(errors='replace') for i in ids]}"


def _spaces(text: bytes) -> int:
    return len(text) - len(text.lstrip(b" "))


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
