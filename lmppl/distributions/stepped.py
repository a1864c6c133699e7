"""`SteppedText`: base class of the text distributions that are sampled and scored by their token steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from .. import randomness, text
from ..rows import distinct_rows
from ..shapes import broadcast_shapes
from ..text import PAD
from .protocols import Steps
from .support import Texts
from .token_steps import DeadEnd, next_log_probs


class SteppedText(TorchDistribution):
    """A distribution over texts that are drawn token by token.

    A subclass defines ``stop``, `vocab_size`, `decode` and `token_steps`.
    """

    arg_constraints: dict[str, Any] = {}
    stop: Tensor

    @property
    def vocab_size(self) -> int:
        """The number V of tokens."""
        raise NotImplementedError

    @property
    def support(self) -> Texts:
        """The constraint on values: ids of the vocabulary, padded on the right."""
        return Texts(self.vocab_size)

    def decode(self, value: Tensor) -> Any:
        """Returns texts as strings.

        :param value: texts (..., L).
        :returns: a string, or nested lists of strings with the shape of the leading axes.
        """
        raise NotImplementedError

    def token_steps(self, shape: torch.Size | None = None, share: Any = None) -> Steps:
        """Returns unfinished texts that grow token by token; see `protocols.Stepwise`.

        :param shape: the shape of the texts, with which the batch broadcasts; None: the batch.
        :param share: steps of another distribution that receive the same tokens.
        :returns: `protocols.Steps`.
        """
        raise NotImplementedError

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Returns texts, drawn token by token without gradient.

        :param sample_shape: leading axes of the sample.
        :returns: LongTensor (*sample_shape, *batch_shape, L).
        :raises DeadEnd: if no token can follow a prefix that was drawn; the message shows the prefix.

        >>> TextMixture([Completion(lm, x, max_tokens=5)], torch.zeros(1)).sample((3,)).shape
        torch.Size([3, 2, 6])
        """
        shape = torch.Size(sample_shape) + self.batch_shape
        steps = self.token_steps(shape)
        width = self.event_shape[0]
        uniform = randomness.uniform((*shape, width), right=1, device=self.stop.device).reshape(-1, width)
        for u in uniform.unbind(1):
            token, log_p = steps.draw(u)
            dead = (log_p == -torch.inf).nonzero()[:, 0]
            if len(dead):
                raise DeadEnd(f"nothing can follow the text {self.decode(steps.prefix[dead[0]])!r}")
            steps.append(token)
        return steps.prefix.view(*shape, width)

    @torch.no_grad()
    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value), token by token, without gradient; equal prefixes are read once.

        :param value: texts (..., L); leading axes broadcast with the batch.
        :returns: log-probabilities (..., *batch_shape); -inf for a text that is impossible.
        :raises ValueError: for a malformed text.
        """
        text.validate(value, "value", self.vocab_size)
        (width,), shape = self.event_shape, broadcast_shapes(value.shape[:-1], self.batch_shape)
        too_long = (value[..., width:] != PAD).any(-1).expand(shape)
        rows = text.pad(value[..., :width], width).expand(*shape, width).reshape(-1, width)
        element = torch.arange(self.batch_shape.numel(), device=value.device).view(self.batch_shape)
        # ``which``: the prefix, among the distinct ones, of each row
        steps, which = self.token_steps(self.batch_shape), element.expand(shape).reshape(-1)
        total: Tensor | float = 0.0
        for token in rows.unbind(1):
            ended = steps.ended[which]
            own = next_log_probs(steps, self.vocab_size)[which, token.clamp(min=0)].masked_fill(ended, 0.0)
            total = total + own.masked_fill((token == PAD) != ended, -torch.inf)
            begun, which = distinct_rows(torch.stack([which, token.masked_fill(ended, PAD)], 1))
            steps.select(begun[:, 0])
            steps.append(begun[:, 1])
        assert isinstance(total, Tensor)
        return total.view(shape).masked_fill(too_long, -torch.inf)
