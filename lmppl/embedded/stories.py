"""Three-sentence stories in which the middle determines the ending.

    Tom went to the kitchen. He found the small knife. He sharpened it.

The beginning names a place, each place has half of the objects, and each object allows two verbs.  The ending shows the
verb and hides the object, so that many middles explain it: a place and a verb leave one or two likely objects, each
with any getting-verb and any adjective.
"""

from itertools import product
from random import Random
from typing import NamedTuple

HE = ("Tom", "Sam", "Ben", "Max")
SHE = ("Ann", "Eve", "Mia", "Kate")
NAMES = HE + SHE
PLACES = ("kitchen", "garden", "market", "attic", "beach", "school", "barn", "library")
GETTING = ("found", "took", "got", "chose")
ADJECTIVES = ("small", "old", "new")

# A closed chain: each verb goes with the object before it and with the object after it.
CHAIN = """
knife sharpened axe swung bat waxed ski strapped boot laced shoe wore hat brushed coat buttoned shirt ironed curtain
drew picture framed mirror wiped window opened box packed suitcase locked door painted fence climbed ladder carried
bucket filled kettle boiled egg cracked walnut ate apple peeled orange squeezed lemon sliced loaf baked cake iced bun
buttered pancake flipped omelette fried fish salted potato mashed turnip chopped carrot chewed straw sipped cocoa
stirred soup tasted pie shared melon halved pumpkin carved candle lit lantern hung hammock tied rope knotted scarf
knitted sweater washed blanket folded map studied book read letter mailed parcel wrapped gift hid coin flicked marble
rolled ball kicked drum beat gong rang bell shook rattle repaired clock wound toy bought doll dressed puppet sold
piano tuned guitar strummed banjo plucked flower planted tree watered bush trimmed hedge jumped puddle splashed duck
fed horse rode bicycle oiled engine started boat rowed raft floated kite flew plane built robot programmed phone
charged lamp fixed chair dusted shelf stacked crate lifted stone threw stick snapped pencil borrowed pen signed cheque
cashed ticket stamped card dealt note crumpled napkin stained carpet swept rug guarded
"""
NOISE_OBJECT = 0.05  # probability that the place does not have the object
NOISE_VERB = 0.01  # probability that the object does not allow the verb
SPLITS = {"train": (4096, 0.70), "validation": (256, 0.15), "test": (256, 0.15)}  # stories, share of (place, verb)

OBJECTS = tuple(CHAIN.split()[0::2])
VERBS = tuple(CHAIN.split()[1::2])


class Story(NamedTuple):
    """The three sentences of a story: `x` (beginning), `z` (middle), `y` (ending), with `x + z + y` its text."""

    x: str
    z: str
    y: str


class Facts(NamedTuple):
    """What a story tells: one value for each slot."""

    name: str
    place: str
    getting: str
    adjective: str
    object: str
    verb: str


# The 48 objects of each place, always the same.
OFFERS = {place: frozenset(Random(f"{place} offers").sample(OBJECTS, 48)) for place in PLACES}
_OFFERED = {place: [o for o in OBJECTS if o in OFFERS[place]] for place in PLACES}
_OTHER = {place: [o for o in OBJECTS if o not in OFFERS[place]] for place in PLACES}


def verbs_of(thing: str) -> tuple[str, str]:
    """The two verbs that an object allows."""
    i = OBJECTS.index(thing)
    return VERBS[i - 1], VERBS[i]


_VERBS_OF = {thing: verbs_of(thing) for thing in OBJECTS}


def draw(random: Random) -> Facts:
    """One story's facts: name, place, object given place, verb given object, with noise."""
    place = random.choice(PLACES)
    thing = random.choice((_OTHER if random.random() < NOISE_OBJECT else _OFFERED)[place])
    verb = random.choice(VERBS if random.random() < NOISE_VERB else _VERBS_OF[thing])
    return Facts(random.choice(NAMES), place, random.choice(GETTING), random.choice(ADJECTIVES), thing, verb)


def tell(facts: Facts) -> Story:
    """The facts in words; the sentences after the first begin with a space."""
    who = "He" if facts.name in HE else "She"
    return Story(
        x=f"{facts.name} went to the {facts.place}.",
        z=f" {who} {facts.getting} the {facts.adjective} {facts.object}.",
        y=f" {who} {facts.verb} it.",
    )


def middles(x: str) -> list[str]:
    """The 4 * 3 * 96 = 1152 grammatical middles of a beginning."""
    who = "He" if any(f"{name} went to" in x for name in HE) else "She"
    return [f" {who} {got} the {adj} {thing}." for got, adj, thing in product(GETTING, ADJECTIVES, OBJECTS)]


def pairs(split: str) -> frozenset[tuple[str, str]]:
    """The (place, verb) pairs of a split; every pair is in exactly one."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    every = sorted(product(PLACES, VERBS))
    Random("pairs").shuffle(every)
    start = 0
    for name, (_, share) in SPLITS.items():
        end = start + round(share * len(every))
        if name == split:
            return frozenset(every[start:end])
        start = end
    raise AssertionError("unreachable")


def stories(split: str) -> list[Story]:
    """The stories of a split: random stories whose (place, verb) is in the split."""
    belonging, random = pairs(split), Random(f"stories {split}")
    kept: list[Story] = []
    while len(kept) < SPLITS[split][0]:
        facts = draw(random)
        if (facts.place, facts.verb) in belonging:
            kept.append(tell(facts))
    return kept
