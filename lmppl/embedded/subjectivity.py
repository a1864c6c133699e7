"""Sentences about films, each of one of twelve kinds, in splits for training and tests.

Half of the kinds are objective, and each has a word for its reason.
"""

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import NamedTuple

# A kind: its reason, and the adjectives and nouns of its sentences.
OBJECTIVE = {
    "plot": ("winding twisted eventful layered", "kidnappings betrayals chases secrets heists"),
    "cast": ("crowded starry youthful veteran", "brothers sisters dancers sailors clowns"),
    "place": ("coastal rural urban alpine", "harbors villages deserts islands forests"),
    "date": ("medieval modern colonial ancient", "wars kings empires castles knights"),
    "law": ("judicial criminal corrupt fugitive", "trials lawyers thieves police prisons"),
    "craft": ("animated silent subtitled digital", "puppets drawings robots machines rockets"),
}
SUBJECTIVE = {
    "praise": ("splendid brilliant superb dazzling", "triumphs delights marvels joys wonders"),
    "blame": ("dreadful clumsy stale tedious", "failures flaws cliches mistakes blunders"),
    "mood": ("gloomy tender wistful dreamy", "shadows longings whispers tears silences"),
    "wit": ("hilarious witty goofy sly", "jokes pranks puns giggles satires"),
    "doubt": ("puzzling dubious murky uneven", "riddles questions paradoxes ambiguities gaps"),
    "heart": ("warm sincere touching gentle", "friendships kisses hopes promises embraces"),
}
KINDS = {k: tuple(w.split() for w in words) for k, words in (OBJECTIVE | SUBJECTIVE).items()}
LABELS = "objective", "subjective"
REASONS = tuple(f" {kind}" for kind in KINDS)
_IDLE = "title poster length ticket trailer logo screen font sequel studio budget release"
IDLE = tuple(f" {word}" for word in _IDLE.split())
FILMS = "film", "story", "tale", "drama"
WHY, PLAINLY, STOP = "{x} because of", "{x} is", ","
SIZES = {"train": 600, "validation": 400, "test": 600}


class Sentence(NamedTuple):
    """A sentence, its true label and its kind's reason."""

    text: str
    label: str
    kind: str


def label_of(kind: str) -> str:
    """The true label of a kind."""
    return LABELS[kind in SUBJECTIVE]


def draw(random: Random) -> tuple[Sentence, str]:
    """A sentence, and the kind that it also hints at: with probability 1/2 one of its three cues is another kind's."""
    kind, other = random.sample(list(KINDS), 2)
    kinds = [kind] * 3
    if random.random() < 0.5:
        kinds[random.randrange(3)] = other
    else:
        other = kind
    first, second, third = kinds
    text = _told(random, KINDS[first][0], KINDS[second][1], KINDS[third][1])
    return Sentence(text, label_of(kind), kind), other


def _told(random: Random, first: Sequence[str], second: Sequence[str], third: Sequence[str]) -> str:
    cues = random.choice(first), random.choice(FILMS), random.choice(second), random.choice(third)
    return "The {} {} about {} and {}".format(*cues)


@cache
def sentences(split: str) -> list[Sentence]:
    """The sentences of a split; no sentence is in two."""
    if split not in SIZES:
        raise ValueError(f"split={split!r}: expected one of {', '.join(map(repr, SIZES))}")
    random, found = Random(0), dict[str, Sentence]()
    while len(found) < sum(SIZES.values()):
        sentence, _ = draw(random)
        found.setdefault(sentence.text, sentence)
    everything, start = list(found.values()), 0
    for name, size in SIZES.items():
        if name == split:
            break
        start += size
    return everything[start : start + size]


def possible(text: str) -> bool:
    """Whether `draw` can write this sentence: whether at least two of its three cues are of one kind."""
    words = text.split()
    if len(words) != 7 or (words[0], words[3], words[5]) != ("The", "about", "and") or words[2] not in FILMS:
        return False
    cues = (0, words[1]), (1, words[4]), (1, words[6])  # 0: an adjective, 1: a noun
    kinds = [kind for part, word in cues for kind, parts in KINDS.items() if word in parts[part]]
    return len(kinds) == 3 and len(set(kinds)) < 3


def _of_three_kinds(random: Random) -> str:
    first, *others = random.sample(list(KINDS), 3)
    return _told(random, KINDS[first][0], *(KINDS[kind][1] for kind in others))


def _of_idle_words(random: Random) -> str:
    idle = random.sample(_IDLE.split(), 3)
    return _told(random, *([word] for word in idle))


def _out_of_order(random: Random) -> str:
    the, *words = draw(random)[0].text.split()
    random.shuffle(words)
    return " ".join([the, *words])


STRANGE = {"three kinds": _of_three_kinds, "word order": _out_of_order, "idle words": _of_idle_words}


def strange(rule: str, count: int = 200) -> list[str]:
    """``count`` sentences that the corpus cannot have, in words that it has; always the same ones.

    The rules lead further and further away from the corpus: "three kinds", each cue of another kind (the corpus has at
    most two); "word order", a sentence of the corpus whose words after the first are shuffled; "idle words", cues that
    the corpus has as idle reasons only, never in a sentence.  None of them has a true label.

    :raises ValueError: for another rule.
    """
    if rule not in STRANGE:
        raise ValueError(f"rule={rule!r}: expected one of {', '.join(map(repr, STRANGE))}")
    random, found = Random(rule), dict[str, None]()
    while len(found) < count:
        text = STRANGE[rule](random)
        if not possible(text):
            found.setdefault(text)
    return list(found)
