"""A tiny language model whose tokens overlap, and the law of its texts with stop strings, by plain loops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from reference import Law, Tokens
from tiny import flat_lm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmppl import LanguageModel

WORDS = ("<eos>", ".", "a", "b", "ab", "b.")
EOS, DOT, A, B, AB, BDOT = range(len(WORDS))


def chunk_lm(words: tuple[str, ...] = WORDS, seed: int = 33, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A network over these words, the first of which is eos."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=words[0], pad_token=words[0])
    tried = flat_lm(vocab=len(words), seed=seed, dtype=torch.float32)
    lm = LanguageModel(tried.model.to(dtype), tokenizer)
    lm.network.facts.update(tried.network.facts)
    return lm


@dataclass
class StringLaw(Law):
    """The distribution of a text that stop strings end too."""

    strings: tuple[str, ...] = ()
    words: tuple[str, ...] = WORDS

    def spell(self, value: Tokens) -> str:
        return "".join(self.words[v] for v in value if v)

    def over(self, value: Tokens) -> bool:
        """Whether the last token ends the text."""
        return value[-1:] != () and (value[-1] in self.stops or self.completed(value))

    def completed(self, value: Tokens) -> bool:
        return any(self.spell(value).endswith(s) for s in self.strings)

    def next(self, prefix: Tokens) -> torch.Tensor:
        logits = self.plain.logits(self.prompt, prefix) / self.temperature
        permitted = set(range(len(logits)))
        if self.allowed is not None:
            permitted &= self.allowed(prefix)
        if len(prefix) < self.min_tokens:
            permitted -= {v for v in permitted if v in self.stops or self.completed((*prefix, v))}
        if self.stops and len(prefix) == self.max_tokens:
            permitted = permitted & set(self.stops) or set(self.stops)
        weight = torch.tensor([logits[v].exp() if v in permitted else 0.0 for v in range(len(logits))])
        return (weight / weight.sum()).log()

    def log_prob(self, value: Tokens) -> float:
        total = 0.0
        for t, token in enumerate(value):
            if self.over(value[:t]) or t >= self.max_tokens + bool(self.stops):
                return -torch.inf
            total += self.step(value[:t])[token]
            if total == -torch.inf:
                return total
        return total if self.over(value) or (not self.stops and len(value) == self.max_tokens) else -torch.inf

    def support(self) -> dict[Tokens, float]:
        found: dict[Tokens, float] = {}
        waiting: list[tuple[Tokens, float]] = [((), 0.0)]
        for prefix, log_p in waiting:
            if self.over(prefix) or (not self.stops and len(prefix) == self.max_tokens):
                found[prefix] = log_p
            else:
                waiting += [((*prefix, v), log_p + p) for v, p in enumerate(self.step(prefix)) if p > -torch.inf]
        return found

    def stopped(self, value: Tokens) -> list[Tokens]:
        """The value's prefixes, each ended by its stop token, the first one where it has none; then itself."""
        by_token = value[-1] in self.stops
        own = value[-1:] if by_token else self.stops[:1]
        return [(*value[:t], *own) for t in range(len(value) - by_token)] + [value]

    def prefix_log_probs(self, value: Tokens, width: int) -> list[float]:
        known = [self.log_prob(z) for z in self.stopped(value)]
        return known + [-torch.inf] * (width - len(known))
