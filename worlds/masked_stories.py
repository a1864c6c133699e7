"""What the masked story LM reads: a story a row, or its first two sentences, with gaps.

Its words have the ids of the causal story LM's, and one more is the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lmppl.embedded.stories import OBJECTS, OFFERS, Story, draw, stories, tell, verbs_of

from .stories import WORDS
from .world import Gate, Report, World

LONGEST = 16  # tokens of a story


def rows(random: Random, encode: Callable[[str], list[int]], width: int) -> Iterator[list[int]]:
    """A story, or all but its ending by an even chance, a row for ever, filled up with eos."""
    eos = encode("<eos>")
    while True:
        story = tell(draw(random))
        row = encode("".join(story if random.random() < 0.5 else story[:2]))
        yield (row + eos * width)[:width]


def masks(batch: Tensor, words: PreTrainedTokenizerFast) -> Tensor:
    """Which words are masked, (row, token): k of the n words of some of the sentences, k evenly from 1..n.

    Each sentence is among these by an even chance, one at least.
    """
    (stop,) = words.encode(".")
    real = batch != words.eos_token_id
    ends = batch == stop
    sentence = ends.cumsum(1) - ends.long()  # (row, token)
    among = torch.rand(len(batch), 3) < 0.5
    among.scatter_(1, (torch.rand(len(batch), 1) * ends.sum(1, keepdim=True)).long(), True)
    where = real & among.gather(1, sentence.clamp(max=2))
    n = where.sum(1, keepdim=True)
    k = 1 + (torch.rand(len(batch), 1) * n).long()
    rank = torch.rand(batch.shape).masked_fill(~where, 2.0).argsort(1).argsort(1)
    return rank < k.clamp(max=n)


@torch.no_grad()
def report(model: PreTrainedModel, words: PreTrainedTokenizerFast, told: list[Story]) -> Report:
    """One word taken out of a story, or the object before its ending is told: means over stories."""
    things = torch.tensor([words.encode(f" {thing}")[0] for thing in OBJECTS])
    found: list[tuple[float, float, float]] = []
    for story in told:
        x, z, y = (words.encode(sentence) for sentence in story)
        place, thing, verb = story.x[:-1].split()[-1], story.z[:-1].split()[-1], story.y.split()[1]

        def law(ids: list[int], at: int) -> Tensor:
            """p of the word at a position, all others given."""
            ids = [*ids[:at], words.mask_token_id, *ids[at + 1 :]]
            logits = model(torch.tensor([ids])).logits[0, at]
            return logits.index_fill(0, torch.tensor([words.mask_token_id]), -torch.inf).softmax(0)

        of_object, before = law([*x, *z, *y], len(x) + 4)[things], law([*x, *z], len(x) + 4)[things]
        of_verb = law([*x, *z, *y], len(x) + len(z) + 1)
        fits = torch.tensor([verb in verbs_of(o) for o in OBJECTS])
        offered = torch.tensor([o in OFFERS[place] for o in OBJECTS])
        happens = [words.encode(f" {v}")[0] for v in verbs_of(thing)]
        found.append((of_object[fits].sum().item(), of_verb[happens].sum().item(), before[offered].sum().item()))
    fits_mean, happens_mean, offered_mean = torch.tensor(found).mean(0).tolist()
    return Report(
        fits=Gate("p(an object that the verb happens to)", fits_mean, least=0.9),
        happens=Gate("p(a verb that happens to the object)", happens_mean, least=0.9),
        offered=Gate("p(an object that the place offers), y unseen", offered_mean),
    )


WORLD = World(
    WORDS, rows, lambda model, words, n: report(model, words, stories("test")[:n]),
    context=LONGEST, rows_a_step=128, steps=4000, learning_rate=3e-3, masks=masks,
)  # fmt: skip
