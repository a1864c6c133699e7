"""What the package computes, once more by plain loops: one Hugging Face forward pass per prefix, one text at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from lmppl import LanguageModel
from lmppl.text import PAD

Tokens = tuple[int, ...]


def tokens(text: Tensor) -> Tokens:
    """The ids of one text, without padding."""
    return tuple(i for i in text.tolist() if i != PAD)


@dataclass
class Plain:
    """A network asked about one sequence at a time."""

    lm: LanguageModel
    memo: dict[Tokens, Tensor] = field(default_factory=dict)

    def logits(self, prompt: Tokens, prefix: Tokens = ()) -> Tensor:
        """(V,): what follows; bos comes first where the prompt is empty, or lacks one that the tokenizer adds."""
        lm = self.lm
        adds = not prompt or (lm.adds_bos and prompt[0] != lm.bos_id)
        sequence = ((lm.bos_id,) if adds else ()) + prompt + prefix
        if sequence not in self.memo:
            with torch.no_grad():
                self.memo[sequence] = lm.forward(torch.tensor([sequence]), use_cache=False).logits[0, -1].double()
        return self.memo[sequence]


@dataclass
class Law:
    """The distribution of one text, defined by a loop over tokens."""

    plain: Plain
    prompt: Tokens
    max_tokens: int
    min_tokens: int = 0
    stops: Tokens = (0,)
    allowed: Callable[[Tokens], set[int]] | None = None
    temperature: float = 1.0
    memo: dict[Tokens, list[float]] = field(default_factory=dict, init=False, repr=False)

    def next(self, prefix: Tokens) -> Tensor:
        """(V,) log-probabilities of the token after ``prefix``."""
        logits = self.plain.logits(self.prompt, prefix) / self.temperature
        permitted = set(range(len(logits)))
        if self.allowed is not None:
            permitted &= self.allowed(prefix)
        if self.stops and len(prefix) < self.min_tokens:
            permitted -= set(self.stops)
        if self.stops and len(prefix) == self.max_tokens:
            permitted = permitted & set(self.stops) or set(self.stops)
        banned = torch.tensor([v not in permitted for v in range(len(logits))])
        return logits.masked_fill(banned, -torch.inf).log_softmax(-1)

    def step(self, prefix: Tokens) -> list[float]:
        """`next`, found once."""
        if prefix not in self.memo:
            self.memo[prefix] = self.next(prefix).tolist()
        return self.memo[prefix]

    def log_prob(self, value: Tokens) -> float:
        """log p(value), -inf for what cannot be drawn."""
        total = 0.0
        for t, token in enumerate(value):
            if any(v in self.stops for v in value[:t]) or t > self.max_tokens - (not self.stops):
                return -torch.inf
            total += self.step(value[:t])[token]
            if total == -torch.inf:
                return total
        complete = value[-1:] and value[-1] in self.stops if self.stops else len(value) == self.max_tokens
        return total if complete else -torch.inf

    def support(self) -> dict[Tokens, float]:
        """Every text of positive probability, with its log-probability."""
        vocab = range(self.plain.lm.vocab_size)
        content = [v for v in vocab if v not in self.stops]
        lengths = range(self.min_tokens if self.stops else self.max_tokens, self.max_tokens + 1)
        texts = [body + end for n in lengths for body in product(content, repeat=n) for end in self._ends()]
        found = {z: self.log_prob(z) for z in texts}
        return {z: p for z, p in found.items() if p > -torch.inf}

    def _ends(self) -> list[Tokens]:
        return [(s,) for s in self.stops] if self.stops else [()]

    def prefix_log_probs(self, value: Tokens, width: int) -> list[float]:
        """log p(z_1..z_t, the value's own stop) for t = 0..width-1."""
        n = next((t for t, v in enumerate(value) if v in self.stops), len(value))
        own = value[n] if n < len(value) else self.stops[0]
        return [self.log_prob((*value[:t], own)) if t <= n else -torch.inf for t in range(width)]
