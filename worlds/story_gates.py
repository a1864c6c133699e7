"""Is a story LM fit for its purpose? Measured with plain forward passes of the Hugging Face model.

For a story (x, z, y), over its 1152 grammatical middles z:

    log p(z | x) + log p(y | x z) = log p(z, y | x),     posterior p(z | x, y) = softmax of it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lmppl.embedded.stories import OFFERS, Story, middles

from .world import Gate, Report


class Exact(NamedTuple):
    """One story's enumeration: `log_prior` = log p(z | x) and `log_likelihood` = log p(y | x z), of shape (middle,)."""

    log_prior: Tensor
    log_likelihood: Tensor

    @property
    def log_posterior(self) -> Tensor:
        """log p(z | x, y) among the grammatical middles, (middle,)."""
        return torch.log_softmax(self.log_prior + self.log_likelihood, 0)


@torch.no_grad()
def exact(model: PreTrainedModel, words: PreTrainedTokenizerFast, story: Story) -> Exact:
    """Score every grammatical middle of the story, and its ending after each."""
    x, y = words.encode(story.x), words.encode(story.y)
    z = [words.encode(middle) for middle in middles(story.x)]  # all of one length
    log_p = _token_log_probs(model, torch.tensor([x + middle + y for middle in z]))  # (middle, token - 1)
    split = len(x) + len(z[0]) - 1
    return Exact(log_p[:, len(x) - 1 : split].sum(1), log_p[:, split:].sum(1))


@torch.no_grad()
def outside(model: PreTrainedModel, words: PreTrainedTokenizerFast, story: Story, draws: int = 10_000) -> float:
    """Posterior mass outside the grammatical middles: the share of the weight p(y | x z) of z ~ p(z | x) found there.

    A draw ends with its first "." or, without one, is left out after 12 tokens.
    """
    x, y, stop = words.encode(story.x), words.encode(story.y), words.encode(".")[0]
    grammatical = set(middles(story.x))
    found = _prior_draws(model, torch.tensor(x), draws, 12, stop)  # distinct middles and how often
    total = strange = 0.0
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for z in found:
        by_length.setdefault(len(z), []).append(z)
    for length, same in by_length.items():
        log_p = _token_log_probs(model, torch.tensor([[*x, *z, *y] for z in same]))
        for z, likelihood in zip(same, log_p[:, len(x) + length - 1 :].sum(1).exp().tolist(), strict=True):
            weight = found[z] * likelihood
            total += weight
            strange += weight * (words.decode(z) not in grammatical)
    return strange / total if total else math.nan


def report(
    model: PreTrainedModel, words: PreTrainedTokenizerFast, stories: Sequence[Story], draws: int = 10_000
) -> Report:
    """Few good middles, many right answers, and nearly all of them in the enumeration: means over stories.

    `draws` prior draws a story for the mass outside.
    """
    enumerated = [exact(model, words, story) for story in stories]
    posterior = torch.stack([e.log_posterior for e in enumerated])  # (story, middle)
    likelihood = torch.stack([e.log_likelihood for e in enumerated])
    prior = torch.stack([e.log_prior for e in enumerated])
    entropy = -(posterior.exp() * posterior).sum(1)
    ess = (prior + likelihood).logsumexp(1).mul(2) - (prior + 2 * likelihood).logsumexp(1)
    offered = [e.log_prior.exp() @ _offered(s) for e, s in zip(enumerated, stories, strict=True)]
    strange = math.fsum(outside(model, words, story, draws) for story in stories) / len(stories)
    return Report(
        prior_mass=Gate("prior mass of the grammatical middles", prior.logsumexp(1).exp().mean().item()),
        offered=Gate("  of what the place offers; 0.95 in the world", torch.stack(offered).mean().item()),
        prior_ess=Gate("prior ESS/N", ess.exp().mean().item(), most=0.05),
        entropy=Gate("posterior entropy, nats", entropy.mean().item(), 1.5, 5),
        outside=Gate("posterior mass outside the grammar", strange, most=0.005),
    )


def _offered(story: Story) -> Tensor:
    """1 for the middles whose object the story's place offers, else 0, (middle,)."""
    place = story.x.removesuffix(".").split()[-1]
    return torch.tensor([float(middle.removesuffix(".").split()[-1] in OFFERS[place]) for middle in middles(story.x)])


def _token_log_probs(model: PreTrainedModel, ids: Tensor, rows: int = 2048) -> Tensor:
    """log p of every token after the first, (row, token - 1), `rows` at a time."""
    return torch.cat(
        [
            model(part).logits[:, :-1].log_softmax(-1).gather(-1, part[:, 1:, None]).squeeze(-1)
            for part in ids.split(rows)
        ]
    )


def _prior_draws(model: PreTrainedModel, x: Tensor, draws: int, limit: int, stop: int) -> dict[tuple[int, ...], int]:
    """Distinct continuations up to `stop`, with counts; equal prefixes are drawn on together."""
    generator = torch.Generator().manual_seed(0)
    open_: dict[tuple[int, ...], int] = {(): draws}
    ended: dict[tuple[int, ...], int] = {}
    for _ in range(limit):
        prefixes = list(open_)
        ids = torch.tensor([[*x.tolist(), *prefix] for prefix in prefixes])
        probabilities = model(ids).logits[:, -1].softmax(-1)
        drawn: dict[tuple[int, ...], int] = {}
        for prefix, p in zip(prefixes, probabilities, strict=True):
            tokens = torch.multinomial(p, open_[prefix], replacement=True, generator=generator)
            for token, count in zip(*(t.tolist() for t in tokens.unique(return_counts=True)), strict=True):
                (ended if token == stop else drawn)[(*prefix, token)] = count
        open_ = drawn
        if not open_:
            break
    return ended
