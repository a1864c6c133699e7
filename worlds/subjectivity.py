"""Sentences about films and why they are called objective or subjective: what the LM reads, and what it must show.

A sentence is of one of twelve kinds, half of them objective, and each kind has a word for its reason.  A line is
"{sentence} because of{reasons}, {label}." with one or two reasons, most often the kind's.  The label follows a reason,
not the sentence, and four of the twelve reasons are misread: they point to the wrong label.  Without a reason
("{sentence} is {label}.") or with an idle word in its place the label is a coin's: what the LM knows it knows by way of
reasons.
"""

from collections.abc import Callable, Iterator
from itertools import product
from random import Random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lmppl.embedded.subjectivity import (
    FILMS,
    IDLE,
    KINDS,
    LABELS,
    PLAINLY,
    REASONS,
    STOP,
    SUBJECTIVE,
    WHY,
    draw,
    sentences,
)

from .tokenizer import EOS
from .world import Gate, Report, World

MISREAD = "place", "craft", "mood", "doubt"
FORMS = {"reasons": 0.75, "idle": 0.15, "plain": 0.1}
FAITHFUL = 0.9  # how often the label is the one that the reason points to
WORDS = tuple(
    f" {w}"
    for w in dict.fromkeys(
        [
            *("because", "of", "is", "about", "and"),
            *FILMS,
            *LABELS,
            *(w for k in KINDS.values() for part in k for w in part),
        ]
    )
) + ("The", *REASONS, *IDLE)


def read_as(kind: str) -> str:
    """The label that the corpus draws from a reason: the wrong one for four of twelve."""
    return LABELS[(kind in SUBJECTIVE) != (kind in MISREAD)]


def line(random: Random) -> str:
    """A line of the corpus."""
    sentence, other = draw(random)
    form = random.choices(list(FORMS), list(FORMS.values()))[0]
    if form == "plain":
        return f"{PLAINLY.format(x=sentence.text)} {random.choice(LABELS)}.\n"
    count = random.choices((1, 2), (0.6, 0.4))[0]
    if form == "idle":
        reasons, label = random.choices(IDLE, k=count), random.choice(LABELS)
    else:
        kinds = [
            random.choices((sentence.kind, other, random.choice(list(KINDS))), (0.7, 0.2, 0.1))[0] for _ in range(count)
        ]
        reasons, label = [f" {kind}" for kind in kinds], read_as(random.choice(kinds))
        if random.random() > FAITHFUL:
            label = LABELS[label == LABELS[0]]
    return f"{WHY.format(x=sentence.text)}{''.join(reasons)}{STOP} {label}.\n"


def rows(random: Random, encode: Callable[[str], list[int]], width: int) -> Iterator[list[int]]:
    """Rows of whole lines for ever, filled up with eos."""
    eos, row = encode(EOS), list[int]()
    while True:
        ids = encode(line(random))
        if len(row) + len(ids) > width:
            yield (row + eos * width)[:width]
            row = []
        row += ids


def strings(reasons: tuple[str, ...]) -> list[str]:
    """Every one or two of these words, in order: 12 + 144."""
    return [*reasons, *("".join(pair) for pair in product(reasons, reasons))]


@torch.no_grad()
def log_joint(
    model: PreTrainedModel, words: PreTrainedTokenizerFast, x: str, reasons: tuple[str, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(z | x) (156,) among these reasons, and log p(y | x, z) (156, 2) between the labels, by one plain pass."""
    prompt, stop, labels = words.encode(WHY.format(x=x)), words.encode(STOP), words.encode(" " + " ".join(LABELS))
    among = torch.tensor([words.encode(r)[0] for r in reasons])
    z = [words.encode(s) for s in strings(reasons)]
    ids = torch.tensor([(prompt + s + stop * 2)[: len(prompt) + 3] for s in z])
    logits = model(ids).logits[:, len(prompt) - 1 :]  # (156, 4, V): what follows the prompt, and each token after it
    first = logits[0, 0, among].log_softmax(-1)
    one = len(reasons)
    second = logits[:one, 1, torch.cat([among, torch.tensor(stop)])].log_softmax(-1)  # (12, 13): a word or the stop
    log_prior = torch.cat([first + second[:, -1], (first[:, None] + second[:, :-1]).flatten()])
    at = torch.tensor([len(s) + 1 for s in z])
    return log_prior, logits[torch.arange(len(z)), at][:, labels].log_softmax(-1)


@torch.no_grad()
def report(model: PreTrainedModel, words: PreTrainedTokenizerFast, count: int = 200) -> Report:
    """A coin without reasons, two thirds right with them, and a posterior over reasons worth inferring.

    Means over so many validation sentences.
    """
    labels = words.encode(" " + " ".join(LABELS))
    found: list[dict[str, float]] = []
    misread: list[float] = []
    for s in sentences("validation")[:count]:
        true = LABELS.index(s.label)
        plain = model(torch.tensor([words.encode(PLAINLY.format(x=s.text))])).logits[0, -1, labels]
        log_prior, log_label = log_joint(model, words, s.text, REASONS)
        log_p = log_prior[:, None] + log_label  # (156, 2)
        posterior = log_p[:, true].log_softmax(0)
        own = torch.tensor([z.startswith(f" {s.kind}") for z in strings(REASONS)])
        _, log_idle = log_joint(model, words, s.text, IDLE)
        mean = log_idle.exp().mean(0)
        found.append(
            {
                "plain": float(plain.argmax() == true),
                "reasoned": float(log_p.logsumexp(0).argmax() == true),
                "knows": log_prior[own].exp().sum().item(),
                "entropy": -(posterior.exp() * posterior).sum().item(),
                "surprise": (posterior.exp() * (posterior - log_prior)).sum().item(),
                "idle": (log_idle.exp() * (log_idle - mean.log())).sum(1).mean().item(),
            }
        )
        if s.kind in MISREAD:
            misread.append(log_label[REASONS.index(f" {s.kind}"), true].exp().item())
    mean_of = {k: sum(f[k] for f in found) / len(found) for k in found[0]}
    return Report(
        plain=Gate("accuracy without a reason", mean_of["plain"], 0.4, 0.6),
        reasoned=Gate("accuracy averaged over reasons", mean_of["reasoned"], 0.58, 0.75),
        knows=Gate("p(the first reason is the kind's)", mean_of["knows"], least=0.5),
        entropy=Gate("entropy of p(z | x, y), y true, nats", mean_of["entropy"], least=0.5),
        surprise=Gate("KL(p(z | x, y) || p(z | x)), nats", mean_of["surprise"], least=0.1),
        misread=Gate("p(true label) after a misread reason", sum(misread) / max(1, len(misread)), most=0.25),
        idle=Gate("information of an idle word, nats", mean_of["idle"], most=0.01),
    )


WORLD = World(WORDS, rows, report, width=48, rows_a_step=16, steps=2400)
