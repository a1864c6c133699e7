"""A text distribution of somebody else's: a hidden Markov chain that writes tokens, with exact answers by plain loops.

It subclasses nothing of the package, and keeps the promises of `lmppl.distributions.protocols`.
"""

from __future__ import annotations

import itertools
import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from lmppl.distributions.protocols import PrefixScores

PAD, STOP, LETTERS = -1, 0, "abc"
STATES, TOKENS, LONGEST = 2, 4, 3


class Chain(nn.Module):
    """Parameters: where it begins (K, S) for each of K batch elements, how it moves (S, S), what it writes (S, V)."""

    def __init__(self, seed: int = 0, elements: int = 1):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        shapes = {"begin": (elements, STATES), "move": (STATES, STATES), "write": (STATES, TOKENS)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=rng, dtype=torch.double)))

    def forward(self, element: int | None = None) -> HiddenChain:
        begin = self.begin if element is None else self.begin[element]
        return HiddenChain(*(x.softmax(-1) for x in (begin, self.move, self.write)))


class HiddenChain(TorchDistribution):
    """At most three letters, then a stop: a state moves after each letter and writes the next one, or the stop."""

    arg_constraints: dict = {}
    stop, vocab_size = torch.tensor([STOP]), TOKENS

    def __init__(self, begin: Tensor, move: Tensor, write: Tensor):
        self.begin, self.move, self.write = begin, move, write
        super().__init__(begin.shape[:-1], torch.Size([LONGEST + 1]), validate_args=False)

    def decode(self, value: Tensor):
        if value.dim() > 1:
            return [self.decode(v) for v in value]
        return "".join(LETTERS[t - 1] for t in value.tolist() if t > 0)

    def token_steps(self, shape: torch.Size, share=None) -> ChainSteps:
        return ChainSteps(self, self.begin.expand(*shape, STATES).reshape(-1, STATES))

    def sample(self, sample_shape=()):
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            steps = self.token_steps(shape)
            for _ in range(LONGEST + 1):
                steps.append(steps.draw(torch.rand(shape.numel(), dtype=torch.double))[0])
        return steps.prefix.view(*shape, -1)

    def log_prob(self, value):
        return _last(self, value)[0]

    def prefix_scores(self, value):
        return PrefixScores(*_last(self, value)[1:])


def _last(fn: HiddenChain, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(value), log p(z_1..z_t stop) and log p(stop | z_1..z_t), by the forward algorithm."""
    shape = torch.broadcast_shapes(value.shape[:-1], fn.batch_shape)
    value = torch.nn.functional.pad(value, (0, max(0, LONGEST + 1 - value.shape[-1])), value=PAD).expand(*shape, -1)
    state = fn.begin.expand(*shape, STATES)  # p(state, z_1..z_t)
    before, stops, by_prefix = torch.zeros(shape, dtype=torch.double), [], []
    whole, over = torch.full(shape, -math.inf, dtype=torch.double), torch.zeros(shape, dtype=torch.bool)
    for t in range(LONGEST + 1):
        token = value[..., t]
        stop = state @ fn.write[:, STOP] / state.sum(-1) if t < LONGEST else torch.ones(shape, dtype=torch.double)
        stops.append(stop.log())
        by_prefix.append((before + stop.log()).masked_fill(over, -math.inf))
        whole = torch.where((token == STOP) & ~over, by_prefix[-1], whole)
        over = over | (token == STOP)
        state = (state * fn.write.T[token.clamp(min=0)]) @ fn.move
        before = state.sum(-1).log()
    return whole, torch.stack(by_prefix, -1), torch.stack(stops, -1)


class ChainSteps:
    def __init__(self, fn: HiddenChain, state: Tensor):
        self.fn, self.state = fn, state
        self.prefix = torch.empty(len(state), 0, dtype=torch.long)
        self.ended = torch.zeros(len(state), dtype=torch.bool)

    def _probs(self) -> Tensor:
        if self.prefix.shape[1] >= LONGEST:
            return torch.eye(TOKENS, dtype=torch.double)[STOP].expand(len(self.state), -1)
        return self.state @ self.fn.write

    def draw(self, uniform):
        probs = self._probs()
        token = (uniform[:, None] > probs.cumsum(1)).sum(1).clamp(max=TOKENS - 1)
        log_prob = probs.gather(1, token[:, None])[:, 0].log()
        return token.masked_fill(self.ended, PAD), log_prob.masked_fill(self.ended, 0.0)

    def score(self, tokens):
        return self._probs().gather(1, tokens.clamp(min=0)[:, None])[:, 0].log()

    def append(self, tokens):
        state = self.state * self.fn.write.T[tokens.clamp(min=0)]
        self.state = torch.where((tokens > 0)[:, None], state / state.sum(1, keepdim=True) @ self.fn.move, self.state)
        self.prefix = torch.cat([self.prefix, tokens[:, None]], 1)
        self.ended = self.ended | (tokens == STOP) | (tokens == PAD)

    def select(self, index):
        self.state, self.prefix, self.ended = self.state[index], self.prefix[index], self.ended[index]


def every_text() -> Tensor:
    """All texts, (K, LONGEST + 1)."""
    texts = [word for n in range(LONGEST + 1) for word in itertools.product(range(1, TOKENS), repeat=n)]
    rows = [[*word, STOP, *[PAD] * (LONGEST - len(word))] for word in texts]
    return torch.tensor(rows)


def probability(begin: Tensor, move: Tensor, write: Tensor, word: list[int]) -> float:
    """Of the letters and the stop, summed over all paths of states; the stop after the last letter is certain."""
    total = 0.0
    for path in itertools.product(range(STATES), repeat=len(word) + 1):
        p = float(begin[path[0]])
        for t, token in enumerate(word):
            p *= float(write[path[t], token]) * float(move[path[t], path[t + 1]])
        total += p * (float(write[path[-1], STOP]) if len(word) < LONGEST else 1.0)
    return total
