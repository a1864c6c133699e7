"""A distribution over texts written down as a table: an exact posterior, or a guide with one logit per text."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from lmppl import LanguageModel, text
from lmppl.distributions.completion import PrefixScores, Texts


class Table(TorchDistribution):
    """p(text k) = softmax(logits)_k, with everything that inference asks of a distribution over texts.

    ``support`` (K, E) holds complete texts that end with ``stop``; ``logits`` (*batch, K), -inf for impossible texts.
    """

    arg_constraints: dict = {}

    def __init__(self, lm: LanguageModel, support: Tensor, logits: Tensor, stop: int = 0, min_tokens: int = 0):
        self.lm, self.texts, self.logits = lm, support, logits.log_softmax(-1)
        self.stop, self.min_tokens = torch.tensor([stop]), torch.tensor(min_tokens)
        super().__init__(logits.shape[:-1], support.shape[-1:], validate_args=False)

    @property
    def support(self) -> Texts:
        return Texts(self.lm.vocab_size)

    def expand(self, batch_shape, _instance=None):
        new = Table.__new__(type(self))
        new.__dict__.update(self.__dict__)
        super(Table, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def _row(self, value: Tensor) -> Tensor:
        """Which text each value (..., E) is; K where it is none."""
        same = (text.pad(value, self.event_shape[0])[..., None, :] == self.texts).all(-1)  # (..., K)
        return torch.where(same.any(-1), same.int().argmax(-1), len(self.texts))

    def _of(self, row: Tensor) -> Tensor:
        """log p of text ``row`` (*batch); -inf for none."""
        padded = torch.nn.functional.pad(self.logits, (0, 1), value=-torch.inf)
        batch = torch.broadcast_shapes(self.batch_shape, row.shape)
        return padded.expand(*batch, -1).gather(-1, row.expand(batch)[..., None])[..., 0]

    def sample_and_log_prob(self, sample_shape=()):
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            probs = self.logits.exp().expand(*shape, -1)
            row = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1).view(shape)
            return self.texts[row], self._of(row)

    def sample(self, sample_shape=()):
        return self.sample_and_log_prob(sample_shape)[0]

    def placeholder(self):
        return self.texts[0].expand(self.shape())

    def log_prob(self, value):
        return self._of(self._row(value))

    def prefix_scores(self, value):
        width = self.event_shape[0]
        n = text.length(value) - 1
        log_probs, stops = [], []
        for t in range(width):
            cut = torch.where(torch.arange(width) < t, value, text.PAD).scatter(-1, torch.full_like(n, t)[..., None], 0)
            begins = (value[..., None, :t] == self.texts[:, :t]).all(-1)  # (..., K)
            reach = self.logits.masked_fill(~begins, -torch.inf)
            possible = (reach > -torch.inf).any(-1)
            reach = torch.where(possible[..., None], reach, 0.0).logsumexp(-1)
            log_p = self.log_prob(cut).masked_fill(t > n, -torch.inf)
            log_probs.append(log_p)
            stops.append((log_p - reach).masked_fill(~possible, -torch.inf))
        return PrefixScores(*(self._full(torch.stack(torch.broadcast_tensors(*x), -1)) for x in (log_probs, stops)))

    def prefix_log_probs(self, value):
        return self.prefix_scores(value).log_probs

    def _full(self, x: Tensor) -> Tensor:
        return x.expand(*torch.broadcast_shapes(x.shape[:-1], self.batch_shape), -1)
