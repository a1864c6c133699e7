"""Sentences that the corpus cannot have, and the study of uncertainty."""

from __future__ import annotations

import hashlib

import pytest

from lmppl import LanguageModel, embedded
from lmppl.embedded.subjectivity import IDLE, KINDS, SIZES, STRANGE, possible, strange

# As they were before any method read them.
FROZEN = {
    "three kinds": ("The youthful tale about kisses and puns", "60045c2815a7c3dd"),
    "word order": ("The tears longings story and about tender", "2f1d744b1b80cbb1"),
    "idle words": ("The title film about poster and budget", "b799101463b9b0c1"),
}


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def test_strange_sentences_are_those_that_were_frozen():
    assert {rule: (strange(rule)[0], digest(strange(rule))) for rule in STRANGE} == FROZEN
    with pytest.raises(ValueError, match="rule='odd'"):
        strange("odd")


def test_strange_sentences_are_impossible_and_told_in_known_words():
    """And what the corpus has is possible: all of 1,600 sentences."""
    texts = [s.text for split in SIZES for s in embedded.data("subjectivity", split)]
    assert all(map(possible, texts)) and len(texts) == sum(SIZES.values())
    lm = LanguageModel.embedded("subjectivity")
    kind_of = {word: kind for kind, parts in KINDS.items() for part in parts for word in part}
    for rule in STRANGE:
        found = strange(rule)
        assert len(set(found)) == 200 and not any(map(possible, found)) and not {*found} & {*texts}
        assert lm.decode(lm.encode(found)) == found
    for text in strange("three kinds"):
        assert len({kind_of[w] for w in text.split() if w in kind_of}) == 3
    for text in strange("idle words"):
        assert len({f" {w}" for w in text.split()} & {*IDLE}) == 3
    for text in strange("word order"):
        the, *rest = text.split()
        assert the == "The" and {"about", "and"} < {*rest} and len(rest) == 6


@pytest.mark.parametrize(
    "text",
    [
        "The winding film about kidnappings",  # too short
        "A winding film about kidnappings and betrayals",
        "The winding film of kidnappings and betrayals",
        "The winding movie about kidnappings and betrayals",
        "The kidnappings film about winding and betrayals",  # an adjective in a noun's place
        "The winding film about brothers and villages",  # three kinds
        "The winding film about posters and brothers",
    ],
)
def test_what_is_not_possible(text):
    assert possible("The winding film about kidnappings and brothers") and not possible(text)
