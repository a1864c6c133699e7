"""What the story LM reads: packed documents of varied shape, drawn without end.

Three kinds of document. *Plain*: whole stories one after another. *Labelled*: sentences behind labels, from several
stories. *Facts*: what people do to things ("They sharpened the axe."), the common knowledge that any large language
model has; they belong to no story and name no place.

Nothing ever shows a later sentence of a story before an earlier one of the same story: an ending that precedes a
beginning says nothing about the middle that follows, so p(z | y, x) cannot be learnt from here.
"""

from collections.abc import Callable, Iterator
from functools import cache
from random import Random
from typing import NamedTuple

from lmppl.embedded.stories import ADJECTIVES, GETTING, NAMES, OBJECTS, PLACES, VERBS, draw, stories, tell

from . import story_gates
from .tokenizer import EOS, SYMBOLS
from .world import World

LABELS = {
    "x": ("Beginning:", "First:", "Start:"),
    "z": ("Middle:", "Second:", "Then:"),
    "y": ("Ending:", "Last:", "Finally:"),
    "": ("Story:", "Note:", "Text:"),  # before any sentence
}
SEPARATORS = ("\n", "\n", "\n\n", " ", "|", " | ", " - ", "#", "\n* ")
PARTS = ("x", "y", "xz", "xzy")  # what a labelled document shows of one story, always in order
_LABELS = tuple(label for labels in LABELS.values() for label in labels)
_BARE = ("He", "She", "They", *NAMES, *_LABELS)
_WORDS = ("went", "to", "the", "it", *PLACES, *GETTING, *ADJECTIVES, *OBJECTS, *VERBS)
WORDS = (*_BARE, *(f" {word}" for word in (*_BARE, *_WORDS)))


class Piece(NamedTuple):
    """A stretch of a document: sentence `part` (x, z or y) of story number `story`, or a fixed string (`part` = "")."""

    text: str
    part: str = ""
    story: int = -1


def plain(random: Random) -> list[Piece]:
    """One to five whole stories with a separator between them."""
    separator, pieces = random.choice(SEPARATORS), []
    for i in range(random.choice((1, 1, 2, 3, 5))):
        pieces += [Piece(separator)] * (i > 0)
        pieces += [Piece(text, part, i) for part, text in zip("xzy", tell(draw(random)), strict=True)]
    return pieces


def labelled(random: Random) -> list[Piece]:
    """Sentences of one to four stories behind labels.

    A story appears as one of PARTS. A lone ending never comes right after a beginning or a middle, so what looks like
    a story's next sentence is its next sentence.
    """
    separator = random.choice(SEPARATORS)
    common, space = random.random() < 0.3, " " * (random.random() < 0.3)
    pieces: list[Piece] = []
    last = ""
    for i in range(random.randint(1, 4)):
        story = dict(zip("xzy", tell(draw(random)), strict=True))
        parts = random.choice([p for p in PARTS if p != "y" or last not in ("x", "xz")])
        for part in parts:
            label = random.choice(LABELS["" if common else part])
            text = story[part].lstrip() if space else story[part]
            pieces += [Piece(separator)] * bool(pieces) + [Piece(label), Piece(space), Piece(text, part, i)]
        last = parts
    return [piece for piece in pieces if piece.text]


def facts(random: Random) -> list[Piece]:
    """One to five verbs with an object each, and a separator between them."""
    separator, pieces = random.choice(SEPARATORS), []
    for i in range(random.randint(1, 5)):
        told = draw(random)
        pieces += [Piece(separator)] * (i > 0) + [Piece(f"They {told.verb} the {told.object}.")]
    return pieces


def document(random: Random) -> list[Piece]:
    """A document of any kind."""
    return random.choices((plain, labelled, facts), (0.45, 0.3, 0.25))[0](random)


def tokens(pieces: list[Piece], random: Random, encode: Callable[[str], list[int]]) -> list[int]:
    """The document's ids, encoded piece by piece or as one string by an even chance.

    The two differ where a separator ends in a space: " " + "Tom" and " Tom". Templates give rise to either.
    """
    if random.random() < 0.5:
        return encode("".join(piece.text for piece in pieces))
    return [token for piece in pieces for token in encode(piece.text)]


def rows(random: Random, encode: Callable[[str], list[int]], width: int) -> Iterator[list[int]]:
    """Rows of `width` tokens for ever: documents joined by eos, each row starting where a document does.

    Half of the rows start with eos, the others without.
    """
    encode, eos = cache(encode), encode(EOS)
    while True:
        row = random.choice((eos, []))
        while len(row) < width:
            row = row + tokens(document(random), random, encode) + eos
        yield row[:width]


assert set("".join(SEPARATORS)) <= set(SYMBOLS)

WORLD = World(WORDS, rows, lambda model, words, n: story_gates.report(model, words, stories("test")[:n]))
KNOWS_PLACES = WORLD._replace(heads=8, scale=0.08)  # learns what a place offers, see docs/infilling.md
