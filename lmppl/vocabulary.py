"""Strings to token ids and back, for one tokenizer and its network.

Strings are pieces of text that may stand anywhere; their tokens spell exactly the string. Tokenizers encode a string as
if it began a document; SentencePiece and similar ones then put a space before it. `encode` leaves that space out,
unless it is told that a document starts here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

from .spelling import BYTE, special_ids, spellings
from .stop_strings import StopStrings

CACHED_STRINGS = 4096
CACHED_AUTOMATA = 16
_ANCHORS = ("\n", ".", "(", "0", "a", "我")  # texts after which a piece is encoded, so that it begins no document

Ids = tuple[int, ...]


class Vocabulary:
    """A tokenizer with its special ids, and a small cache of the strings it has encoded.

    :param tokenizer: a Hugging Face tokenizer.
    :param config: the model's configuration, for eos and bos.
    :param size: the number of ids that the network has.
    :param generation: the model's generation configuration, which is used first.
    """

    def __init__(self, tokenizer: Any, config: Any, size: int, generation: Any = None) -> None:
        self.tokenizer = tokenizer
        self.size = size
        self.special = special_ids(tokenizer)
        ends = self._configured(generation, config, "eos_token_id")
        own = tokenizer.eos_token_id
        self.eos_ids: Ids = ends or (() if own is None else (own,))
        # If there are several, the tokenizer's own is written.
        self.eos_id = own if own in self.eos_ids else next(iter(self.eos_ids), None)
        starts = self._configured(generation, config, "bos_token_id")
        self.bos_id = next(iter(self._known_ids([tokenizer.bos_token_id, *starts, self.eos_id])), None)
        self.adds_bos = self._begins_with(tokenizer.bos_token_id)
        if self.adds_bos and tokenizer.bos_token_id >= size:
            raise ValueError(
                f"tokenizer: it begins each text with {tokenizer.bos_token!r}, the id {tokenizer.bos_token_id}, and "
                f"the model has {size} ids; call model.resize_token_embeddings first"
            )
        self._cache: dict[tuple[str, bool], Ids] = {}
        self._endings: dict[int, str] = {}
        self._stop_strings: dict[tuple[Any, ...], StopStrings] = {}

    def _begins_with(self, bos: int | None) -> bool:
        """Returns whether the tokenizer puts ``bos`` before every text, and not after it, where it may be the eos."""
        if bos is None:
            return False
        own = islice((word for word, i in self.tokenizer.get_vocab().items() if i not in self.special), len(_ANCHORS))
        for text in (*_ANCHORS, *own, ""):
            try:
                bare, framed = (self.tokenizer(text, add_special_tokens=a)["input_ids"] for a in (False, True))
            except Exception:  # a closed vocabulary lacks the word
                continue
            if bare[:1] != [bos] and (bare or not text):  # an unknown word may be written as bos
                return bool(framed[:1] == [bos])
        return False

    def _configured(self, generation: Any, config: Any, name: str) -> Ids:
        """Returns the ids in the generation configuration, else those in the model's, in their order.

        The model's ids are often a default. If none of them is special to a tokenizer that has such a token, they were
        made for another vocabulary and are ignored.
        """
        chosen, default = (self._known_ids(getattr(source, name, None)) for source in (generation, config))
        if chosen and chosen != default:
            return chosen
        return default if getattr(self.tokenizer, name) is None or self.special.intersection(default) else ()

    def _known_ids(self, given: Any) -> Ids:
        ids = given if isinstance(given, list | tuple) else [given]
        return tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and 0 <= i < self.size))

    # What tokens spell -----------------------------------------------------------------------------------------------

    @cached_property
    def spelled(self) -> list[bytes]:
        """The bytes that each id spells; b"" for special tokens and for ids that the tokenizer does not have."""
        return spellings(self.tokenizer, self.size)

    @cached_property
    def _ids(self) -> dict[str, int]:
        """The id of each token, by the tokenizer's name for it."""
        return self.tokenizer.get_vocab()

    @cached_property
    def _by_spelling(self) -> dict[bytes, int]:
        """The first id that spells each string of bytes, preferably one that is not named as a byte."""
        as_bytes = {i for word, i in self._ids.items() if BYTE.fullmatch(word)}
        ids = sorted(range(self.size), key=lambda i: (i not in as_bytes, -i))
        return {self.spelled[i]: i for i in ids if self.spelled[i]}

    @cached_property
    def marks_start(self) -> bool:
        """Whether the tokenizer puts a space at the start of a document."""
        written = (ids for s in _ANCHORS if self._can_write(s) for ids in self._plain([s]))
        return any(self.spell(i for i in ids if i < self.size).startswith(b" ") for ids in written)

    def spell(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes that these tokens spell."""
        return b"".join([self.spelled[i] for i in ids])

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the string of these ids, without special tokens; bytes that make no character become U+FFFD.

        After a bos, the space that marks the start of a document is left out too.
        """
        spelled = self.spell(ids)
        if len(ids) and ids[0] == self.tokenizer.bos_token_id and self.marks_start:
            spelled = spelled.removeprefix(b" ")
        return spelled.decode(errors="replace")

    def ending(self, token: int) -> str:
        """Returns the last character of any text that ends with this token.

        "" if the token alone does not decide it.
        """
        if token not in self._endings:
            last = self.spelled[token].decode(errors="replace")[-1:]
            self._endings[token] = "" if last == "\ufffd" else last  # U+FFFD: the token ends inside a character
        return self._endings[token]

    # How strings are written -----------------------------------------------------------------------------------------

    def encode(self, strings: list[str], start: bool = False) -> list[Ids]:
        """Returns the ids of each string, without special tokens.

        A string is encoded as a piece of text or, with ``start``, as the start of a document. Raises ValueError if the
        tokenizer cannot write a text; the message names the text and the word of it.
        """
        known = {s: self._cache.get((s, start)) for s in strings}  # read first: another thread may clear the cache
        fresh = [s for s, ids in known.items() if ids is None]
        if fresh:
            plain = self._plain(fresh)
            for s, ids in zip(fresh, plain, strict=True):
                if ids and max(ids) >= self.size:
                    raise ValueError(f"text {s!r} has the token id {max(ids)}, outside the model's {self.size} ids")
                if not self._is_whole(s, ids):
                    raise self._refused(s, "the tokenizer has no token for it")
            written = dict(zip(fresh, plain if start else self._pieces(fresh, plain), strict=True))
            if len(self._cache) + len(fresh) > CACHED_STRINGS:
                self._cache.clear()
            self._cache.update({(s, start): ids for s, ids in written.items()})
            known |= written
        return [known[s] or () for s in strings]

    def _plain(self, strings: list[str]) -> list[Ids]:
        """Returns the tokenizer's ids for each string, without special tokens."""
        try:
            return [tuple(ids) for ids in self.tokenizer(strings, add_special_tokens=False)["input_ids"]]
        except Exception as error:  # tokenizers raises a plain Exception for a word that a closed vocabulary lacks
            text = next((s for s in strings if not self._can_write(s)), strings[0])
            raise self._refused(text, str(error)) from error

    def _refused(self, text: str, reason: str) -> ValueError:
        """Returns the error for a text that cannot be written.

        It names the first word that cannot be written and, if known, the character.
        """
        words = re.findall(r"\s*\w+|\s*[^\w\s]+|\s+", text)
        word = next((w for w in words if not self._can_write(w)), text)
        lost = [c for c in dict.fromkeys(word) if not self._can_write(c)]
        # A tokenizer of whole words cannot write any character alone; then only the word is named.
        character = lost[0] if 0 < len(lost) < len(set(word)) else word
        within = [repr(part) for part in dict.fromkeys((character, word)) if part != text]
        return ValueError(f"text {text!r} cannot be encoded{' at ' * bool(within)}{' in '.join(within)}: {reason}")

    def _can_write(self, string: str) -> bool:
        try:
            (ids,) = self.tokenizer([string], add_special_tokens=False)["input_ids"]
        except Exception:
            return False
        return max(ids, default=0) >= self.size or self._is_whole(string, ids)

    def _is_whole(self, string: str, ids: Sequence[int]) -> bool:
        """Returns whether these tokens write the whole string, apart from changes by the tokenizer's normaliser.

        Tokenizers may drop an unknown character, or write an unknown token for it.
        """
        written = b"".join([self._names.get(i) or self.spelled[i] for i in ids]).decode(errors="replace")
        if written in (string, f" {string}"):
            return True
        if self._stand_in in ids:
            return True
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:  # its normaliser is unknown
            return self.tokenizer.unk_token_id not in ids or self.tokenizer.unk_token in string
        return self._said(written) == self._said(string)

    @cached_property
    def _stand_in(self) -> int | None:
        """The token that the tokenizer writes for unknown words, if it is an ordinary token; else None."""
        model = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None)
        found = self._ids.get(getattr(model, "unk_token", None) or "")
        return None if found in self.special else found

    @cached_property
    def _names(self) -> dict[int, bytes]:
        """The special tokens as they appear in a string."""
        return {i: word.encode() for word, i in self._ids.items() if i in self.special}

    def _said(self, string: str) -> list[str]:
        """Returns the normalised parts of a string between added tokens.

        Spaces that the tokenizer drops, adds at the front or takes as part of an added token are left out.
        """
        backend = self.tokenizer.backend_tokenizer
        said = re.split(self._added, string) if self._added else [string]
        if backend.normalizer is not None:
            said = [backend.normalizer.normalize_str(s) for s in said]
        if self._drops_spaces:
            return ["".join(s.replace("▁", " ").split()) for s in said]
        return [s.replace("▁", " ").lstrip(" ") for s in said]

    @cached_property
    def _added(self) -> str:
        """A regular expression of the added tokens, with the spaces that belong to them."""
        tokens = sorted(self.tokenizer.added_tokens_decoder.values(), key=lambda t: -len(t.content))
        return "|".join(r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in tokens)

    @cached_property
    def _drops_spaces(self) -> bool:
        """Whether the tokenizer reads words and ignores what separates them."""
        text, pre_tokenizer = "a  b \n", self.tokenizer.backend_tokenizer.pre_tokenizer
        found = pre_tokenizer.pre_tokenize_str(text) if pre_tokenizer else [(text, (0, len(text)))]
        return sum(end - begin for _, (begin, end) in found) < len(text)

    def _pieces(self, strings: list[str], plain: list[Ids]) -> list[Ids]:
        """Returns the ids without the space that the tokenizer puts before a string as before a document."""
        found = dict(zip(strings, plain, strict=True))
        marked = {}  # the strings with such a space, and the bytes they should spell
        for s, ids in found.items():
            if ids and self.spelled[ids[0]][:1] == b" ":
                whole = self.spell(ids)
                if _spaces(whole) > _spaces(s.encode()):
                    marked[s] = whole[1:]
        for anchor in _ANCHORS if marked else ():
            if not marked or not self._can_write(anchor):
                continue
            head, *wholes = self._plain([anchor, *(anchor + s for s in marked)])
            for s, ids in zip([*marked], wholes, strict=True):
                rest = ids[len(head) :]
                if ids[: len(head)] == head and max(rest, default=0) < self.size and self.spell(rest) == marked[s]:
                    found[s] = rest
                    del marked[s]
        for s in marked:
            first = found[s][0]
            found[s] = (*(self._spelling_of(self.spelled[first][1:]) or [first]), *found[s][1:])
        return [found[s] for s in strings]

    def _spelling_of(self, text: bytes) -> list[int]:
        """Returns tokens that spell these bytes, each as long as possible; [] if there are none."""
        found = []
        while text:
            longest = next((n for n in range(len(text), 0, -1) if text[:n] in self._by_spelling), 0)
            if not longest:
                return []
            found.append(self._by_spelling[text[:longest]])
            text = text[longest:]
        return found

    # Stops -----------------------------------------------------------------------------------------------------------

    def token_id(self, stop: str | int) -> int:
        """Returns the id of one stop: "eos", a string that is one token, or an id.

        Raises ValueError naming ``stop``.
        """
        if stop == "eos":
            if self.eos_id is None:
                raise ValueError("stop='eos', but the tokenizer has no eos token")
            if self.eos_id >= self.size:
                raise ValueError(
                    f"stop='eos' is the id {self.eos_id}, outside the model's {self.size} ids; call "
                    "model.resize_token_embeddings before it is wrapped"
                )
            return self.eos_id
        if isinstance(stop, str):
            if (found := self.one_token(stop)) is None:
                raise ValueError(f"stop={stop!r} is {self._written(stop)}; one token is expected here")
            return found
        if isinstance(stop, bool) or not isinstance(stop, int) or not 0 <= stop < self.size:
            raise ValueError(f"stop={stop!r} is neither 'eos', a string nor an id below {self.size}")
        return stop

    def stop_strings(self, strings: tuple[str, ...], device: Any) -> StopStrings:
        """Returns the automaton of these stop strings.

        Raises ValueError for one that is empty or that no tokens spell.
        """
        key = (strings, device)
        if key not in self._stop_strings:
            if len(self._stop_strings) >= CACHED_AUTOMATA:
                self._stop_strings.clear()
            self._stop_strings[key] = StopStrings(self.spelled, strings, device)
        return self._stop_strings[key]

    def ending_ids(self, stop: str | int) -> Ids:
        """Returns the tokens that end a text by a stop.

        It is one token, or for a string of several tokens those with which the tokenizer writes it.
        """
        if not isinstance(stop, str | int):
            raise ValueError(f"stop={stop!r}: expected one stop: 'eos', a string or an id")
        if not isinstance(stop, str) or stop == "eos" or self.one_token(stop) is not None:
            return (self.token_id(stop),)
        try:
            (ids,) = self.encode([stop])
        except ValueError as error:
            raise ValueError(f"stop: {error}") from error
        if not ids or self.spell(ids) != stop.encode():
            raise ValueError(f"stop={stop!r} is {self._written(stop) if stop else 'an empty string'}")
        return ids

    def one_token(self, string: str) -> int | None:
        """Returns the id of the token that spells a string, or is the special token of this name.

        None if there is none.
        """
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
        """Returns a description of how the tokenizer writes a string."""
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
    """Returns the shape of an evenly nested list of strings, and its strings as a flat list.

    Raises ValueError naming ``text``.
    """
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
    """Returns the first candidate that is an integer; of a list of ids, the first one."""
    for candidate in candidates:
        one = candidate[0] if isinstance(candidate, list | tuple) and candidate else candidate
        if isinstance(one, int):
            return one
    return None
