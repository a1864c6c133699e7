"""The bytes that each token of a tokenizer spells in the middle of a text.

A text is what its tokens spell, one after another, so pieces of text can be joined and decoded in any order. Tokenizers
decode a text as if it began a document: some drop its first space, some put a space between words, some replace bytes
that make no character. Here a token spells the same bytes wherever it stands.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_ANCHORS = ("a", "0", ".", "我")  # texts after which a token is tried


def spellings(tokenizer: Any, size: int) -> list[bytes]:
    """Returns the bytes that each id below ``size`` spells.

    b"" for special tokens and ids that the tokenizer does not have.
    """
    special = special_ids(tokenizer)
    words = {i: word for word, i in tokenizer.get_vocab().items() if i < size and i not in special}
    added = _only_added(tokenizer)
    own = {i: word for i, word in words.items() if i not in added}
    found = [b""] * size
    for i, word in words.items():
        found[i] = word.encode()
    for i, spelled in _spell(tokenizer, own).items():
        found[i] = spelled
    return found


def _only_added(tokenizer: Any) -> frozenset[int]:
    """Returns the tokens that were added to the tokenizer and that its model does not have.

    They are found literally in strings.
    """
    added = {i: str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return frozenset(i for i, word in added.items() if backend is None or backend.model.token_to_id(word) != i)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Returns the ids of tokens that are no part of the string: bos, eos, turn ends and so on."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if getattr(token, "special", False)}


def _spell(tokenizer: Any, words: dict[int, str]) -> dict[int, bytes]:
    """Returns what these tokens spell, by id."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        spell = _rule(_decoders(backend.decoder))
        if spell is not None:
            return {i: spell(word) for i, word in words.items()}
    elif _latin_bytes(tokenizer, words):
        return {i: word.encode("latin-1") if len(word) == 1 else word.encode() for i, word in words.items()}
    return _tried(tokenizer, words)


def _decoders(decoder: Any) -> list[dict[str, Any]]:
    """Returns the settings of the decoders of a `tokenizers.Tokenizer`, in order."""
    if decoder is None:
        return []
    settings = json.loads(decoder.__getstate__())
    return settings["decoders"] if settings["type"] == "Sequence" else [settings]


def _rule(decoders: list[dict[str, Any]]) -> Callable[[str], bytes] | None:
    """Returns a function from a token to what these decoders make of it; None if that is not known."""
    kinds = {d["type"] for d in decoders}
    if "ByteLevel" in kinds:
        return _byte_level
    if not kinds <= {"BPEDecoder", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}:
        return None
    if any("String" not in d["pattern"] for d in decoders if d["type"] == "Replace"):
        return None

    def spell(word: str) -> bytes:
        byte = BYTE.fullmatch(word) if "ByteFallback" in kinds else None
        if byte:
            return bytes([int(byte[1], 16)])
        for d in decoders:
            word = _decoded(d, word)
        return (word if decoders else f" {word}").encode()  # without a decoder, words are separated by spaces

    return spell


def _decoded(decoder: dict[str, Any], word: str) -> str:
    match decoder["type"]:
        case "Metaspace":
            return word.replace(decoder["replacement"], " ")
        case "Replace":
            return word.replace(decoder["pattern"]["String"], decoder["content"])
        case "WordPiece":
            if word.startswith(decoder["prefix"]):
                return word.removeprefix(decoder["prefix"])
            return word if stands_alone(word) else f" {word}"
        case "BPEDecoder":
            return re.sub(f"{re.escape(decoder['suffix'])}$", " ", word)
        case _:
            return word


def stands_alone(word: str) -> bool:
    """Returns whether a word is a punctuation mark or an ideograph, which has no space before it."""
    return len(word) == 1 and (unicodedata.category(word)[0] in "PS" or unicodedata.name(word, "").startswith("CJK"))


def _byte_level(word: str) -> bytes:
    """Returns the bytes of a token of byte-level BPE, which writes each byte as a printable character."""
    if all(c in _BYTES for c in word):
        return bytes(_BYTES[c] for c in word)
    return word.encode()


def _printable_bytes() -> dict[str, int]:
    """Returns the byte for each character of byte-level BPE.

    A printable byte stands for itself, the others are numbered from 256 on.
    """
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in prints]
    return {chr(b): b for b in prints} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _printable_bytes()


def _latin_bytes(tokenizer: Any, words: dict[int, str]) -> bool:
    """Returns whether a tokenizer writes the bytes of UTF-8 as characters with those numbers, as ByT5's does."""
    ids = {word: i for i, word in words.items()}
    pair = [ids.get(chr(b)) for b in "é".encode()]
    return None not in pair and _decode(tokenizer, pair) == "é"


def _tried(tokenizer: Any, words: dict[int, str]) -> dict[int, bytes]:
    """Returns what each token adds to a text that the tokenizer decodes."""
    start: list[int] = []
    for anchor in _ANCHORS:
        try:
            start = list(tokenizer(anchor, add_special_tokens=False)["input_ids"])
        except Exception:  # tokenizers raises a plain Exception for a word that a closed vocabulary lacks
            continue
        if start and anchor in _decode(tokenizer, start):
            break
    before = _decode(tokenizer, start)
    found = {}
    for i, word in words.items():
        byte = BYTE.fullmatch(word)
        after = _decode(tokenizer, [*start, i])
        found[i] = bytes([int(byte[1], 16)]) if byte else after.removeprefix(before).encode()
    return found


def _decode(tokenizer: Any, ids: list[Any]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
