"""Preferences: whose choices, on the embedded stories or in a file; the programs are in `programs/preferences.py`.

There are forty embedded annotators of three kinds, who chose between middles of stories ten times each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeAlias, Unpack

import torch
from torch import Tensor

from ..embedded.stories import ADJECTIVES, middles
from ..inference import Enumerated, Enumeration
from ..language_model import LanguageModel
from .constrained import beginnings, next_sentence
from .data_files import read_each
from .experiment import TEST_OBSERVATIONS, Experiment, Options, Recipe, Start, split
from .programs.preferences import LONGEST, Annotators, Preferences, features, one_of_each, said, words_of

Group: TypeAlias = Mapping[str, Sequence[str]]  # properties by name, each with its words

FOOD = """
egg walnut apple orange lemon loaf cake bun pancake omelette fish potato turnip carrot cocoa soup pie melon pumpkin
"""
TOYS = """
bat ski marble ball drum gong bell rattle piano guitar banjo doll toy puppet kite robot
"""
# At most one property of each group is liked; its name is a word that is one token of the story LM.
GROUPS: tuple[Group, ...] = ({word: (word,) for word in ADJECTIVES}, {"cake": FOOD.split(), "ball": TOYS.split()})
# The story LM does not distinguish adjectives: nothing depends on them.  Its guide reads a thing in their place.
TOLD = {"small": "coin", "old": "clock", "new": "phone"}
KINDS = (24, ("old", "cake")), (12, ("new", "cake")), (4, ("small", "ball"))  # annotators, and what they like
CHOICES = 10  # of each annotator
STRENGTH = 3.0  # nats: of two texts that differ in a liked property, 95% of the choices are right
EMBEDDED_TEMPLATE, EMBEDDED_LONGEST = "Note:{w}.\n{x}", 5
RECIPE = Recipe(steps=300, quick_steps=150, observations=32, particles=4, learning_rate=3e-3, output_layer=True)
MOST = 100_000  # combinations of shares and kinds that are enumerated
LARGEST = 3 * 10**8  # numbers of the largest tensor of their enumeration: 40 annotators with ten choices take 2 * 10**7


class Choice(NamedTuple):
    """A prompt, the text that an annotator chose after it, and the alternative."""

    annotator: str
    prompt: str
    chosen: str
    rejected: str


def choices() -> list[Choice]:
    """The embedded annotators' choices, always the same."""
    random, flat = Random("choices"), {name: words for group in GROUPS for name, words in group.items()}
    told, found = [x for (x,) in beginnings()[0]], []
    for kind, (count, liked) in enumerate(KINDS):
        for a, _ in product(range(count), range(CHOICES)):
            x = random.choice(told)
            pair = random.sample(middles(x), 2)
            first, second = (
                sum(float(f) for f, n in zip(features(z, flat), flat, strict=True) if n in liked) for z in pair
            )
            if random.random() > 1 / (1 + math.exp(-STRENGTH * (first - second))):
                pair.reverse()
            found.append(Choice(f"{kind}.{a}", x, *pair))
    return found


def choice(line: str) -> Choice:
    """The choice in a line of JSON."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    names = Choice._fields
    if not isinstance(found, dict) or not all(isinstance(found.get(n), str) and found[n] for n in names):
        raise ValueError(f"is not a JSON object with the strings {', '.join(names)}")
    return Choice(*(found[n] for n in names))


def read_choices(path: str | Path) -> list[Choice]:
    """Choices from a JSONL file, one in each line; errors as in `read_each`."""
    return read_each(path, choice, "choice")


def parsed(properties: str) -> list[Group]:
    """Groups of properties, with their words.

    >>> parsed("old, new; cake|egg")
    [{'old': ('old',), 'new': ('new',)}, {'cake': ('cake', 'egg')}]
    """
    groups: list[Group] = []
    for group in properties.split(";"):
        words = [tuple(word.strip() for word in name.split("|")) for name in group.split(",")]
        if not all(all(each) for each in words) or len({each[0] for each in words}) < len(words):
            raise ValueError(
                f"properties: expected words with | between those of one property, commas between properties of which "
                f"at most one is liked, and ; between groups, got {properties!r}"
            )
        groups.append({each[0]: each for each in words})
    return groups


def differences(chosen: Sequence[Choice], properties: Group) -> tuple[Tensor, Tensor]:
    """The arguments (d, y) of `Annotators`, on the CPU.

    d (A, J, F) are the features of the chosen minus those of the rejected text, y (A, J) is 1, or -1 for no choice.
    """
    of: dict[str, list[Tensor]] = {}
    for c in chosen:
        of.setdefault(c.annotator, []).append(features(c.chosen, properties) - features(c.rejected, properties))
    d = torch.zeros(len(of), max(map(len, of.values())), len(properties), device="cpu")
    y = torch.full(d.shape[:2], -1, device="cpu")
    for a, own in enumerate(of.values()):
        d[a, : len(own)], y[a, : len(own)] = torch.stack(own), 1
    return d, y


class People(NamedTuple):
    """What is known of annotators: their choices, and the exact posterior of shares and kinds."""

    annotators: Annotators
    d: Tensor
    y: Tensor
    posterior: Enumerated

    @property
    def next_taste(self) -> Tensor:
        """(G,)."""
        return self.annotators.next_taste(self.posterior)


def infer(chosen: Sequence[Choice], groups: Sequence[Group], *, kinds: int = 3, strength: float = STRENGTH) -> People:
    """The exact posterior of the kinds of annotators, given their choices.

    :param groups: groups of properties, see `one_of_each`.
    :raises ValueError: where kinds and tastes have too many combinations, alone or times all choices, and for a
        property in which the texts of no choice differ.
    """
    if not 0 < strength < math.inf:
        raise ValueError(f"strength: must be positive and finite, got {strength}")
    annotators = Annotators(one_of_each([len(group) for group in groups], strength), kinds=kinds)
    if annotators.combinations > MOST:
        raise ValueError(
            f"kinds: {kinds} kinds of {len(annotators.tastes)} tastes have {annotators.combinations:,} combinations, "
            f"more than {MOST:,}; take fewer kinds, or fewer properties"
        )
    d, y = differences(chosen, flat(groups))
    if unknown := [name for name, any_ in zip(flat(groups), d.flatten(0, 1).any(0), strict=True) if not any_]:
        raise ValueError(f"properties: no choice differs in {unknown[0]!r}, so nothing tells who likes it")
    if (size := annotators.combinations * kinds * y.numel()) > LARGEST:
        raise ValueError(
            f"kinds: {annotators.combinations:,} combinations of {kinds} kinds, {len(y)} annotators and {y.shape[1]} "
            f"choices of one make {size:,} numbers, more than {LARGEST:,}; take fewer kinds, properties or choices"
        )
    return People(annotators, d, y, Enumeration(annotators.model, max_support=MOST).run(d, y))


def pooled(d: Tensor, y: Tensor, *, prior: float = 10.0, steps: int = 50) -> Tensor:
    r"""The one utility under which all choices together are most probable, (F,): the reward model of RLHF.

    :math:`\arg\max_w \sum \log \sigma(w \cdot d) - |w|^2 / 2 s^2`, by Newton's method; s = ``prior`` in nats.
    """
    rows = (d * torch.where(y == 1, 1.0, -1.0)[..., None])[y >= 0].double()  # (N, F): chosen less rejected
    w = rows.new_zeros(rows.shape[1])
    for _ in range(steps):
        p = torch.sigmoid(rows @ w)
        gradient = rows.T @ (1 - p) - w / prior**2
        curvature = (rows * (p * (1 - p))[:, None]).T @ rows + torch.eye(
            len(w), dtype=w.dtype, device=w.device
        ) / prior**2
        w = w + torch.linalg.solve(curvature, gradient)
    return w.float()


def flat(groups: Sequence[Group]) -> Group:
    """The properties of all groups.

    :raises ValueError: where two have the same name, and where a word is not a single word.
    """
    found = {name: words for group in groups for name, words in group.items()}
    if len(found) < sum(map(len, groups)):
        raise ValueError("properties: two of them begin with the same word")
    return words_of(found)


def experiment(
    lm: LanguageModel | None = None,
    data: str | Path | None = None,
    *,
    properties: str | None = None,
    kinds: int = 3,
    strength: float = STRENGTH,
    beta: float = 1.0,
    max_tokens: int | None = None,
    **options: Unpack[Options],
) -> Experiment:
    """Texts for people who disagree, in proportion to their shares; tastes are inferred from choices.

    The guide is trained for every taste after every training prompt.  It is tested for people drawn from the posterior
    of the next person's taste, after unseen prompts.  It runs on the embedded story LM, whose 2,304 sentences can be
    counted, or on ``lm`` with the file ``data``.

    :param lm: a language model; None: the embedded one.
    :param data: a JSONL file with a choice in each line; None: the embedded choices.
    :param properties: with ``data``, what can be liked, see `parsed`.
    :param kinds: the most kinds of annotators.
    :param strength: the utility of a liked property, nats.
    :param beta: how much of the utility counts in the target.
    :param max_tokens: the most tokens of a text before its stop; None: 5 on the embedded stories, 30 with ``data``.
    :param options: those of every experiment, see `experiment.Options`.
    :returns: an `Experiment`.
    :raises ValueError: for another language model without ``data``, and for ``data`` without ``properties`` or the
        reverse.
    """
    needs = "choices of its own, a JSONL file with one per line"
    start = Start.of("preferences", "stories", lm, data, RECIPE if data is None else Recipe(), needs, **options)
    if (properties is None) != (data is None):
        raise ValueError("properties: choices of your own, `data`, need them; without `data` there are none to give")
    groups: Sequence[Group] = GROUPS
    longest = EMBEDDED_LONGEST if data is None else LONGEST
    own: dict[str, Any] = {"max_tokens": longest if max_tokens is None else max_tokens}
    if data is None or properties is None:
        chosen, prompts = choices(), [[x for (x,) in part] for part in beginnings()]
        own |= {"template": EMBEDDED_TEMPLATE, "names": TOLD, "allowed": next_sentence(start.lm)}
    else:
        groups, chosen = parsed(properties), read_choices(data)
        prompts = [*split(list(dict.fromkeys(c.prompt for c in chosen)))]
    people = infer(chosen, groups, kinds=kinds, strength=strength)
    task = Preferences(start.lm, start.guide_lm, properties=flat(groups), beta=beta, **own)
    tastes, device = people.annotators.tastes, start.lm.device

    def encode(asked: Sequence[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        return start.lm.encode([x for x, _ in asked]), tastes[[g for _, g in asked]].to(device)

    def describe(asked: tuple[str, int]) -> str:
        names = [name for name, w in zip(task.properties, tastes[asked[1]].tolist(), strict=True) if w > 0]
        return f"{asked[0]}    for who likes:{said(names) or ' nothing in particular'}"

    random, m = Random("people"), people.next_taste.tolist()

    def met(told: Sequence[str]) -> list[tuple[str, int]]:
        """As many people as are tested, each after a prompt."""
        who = random.choices(range(len(m)), m, k=TEST_OBSERVATIONS)
        return [(told[i % len(told)], g) for i, g in enumerate(who)]

    train, held_out, test = prompts
    return start.experiment(
        task,
        (list(product(train, range(len(tastes)))), met(held_out), met(test)),
        describe,
        encode=encode,
        exact=Enumeration(task.model) if data is None else None,
        target=f"p(z|x) e^(beta u(z)) of the taste, beta = {beta:g}",
    )
