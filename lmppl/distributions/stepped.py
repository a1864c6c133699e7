"""`SteppedText`: what a text distribution has that is drawn by its token steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from .. import randomness
from .protocols import Steps
from .support import Texts
from .token_steps import DeadEnd


class SteppedText(TorchDistribution):
    """Texts that are drawn token by token; a subclass has ``stop``, `vocab_size`, `decode` and `token_steps`."""

    arg_constraints: dict[str, Any] = {}
    stop: Tensor

    @property
    def vocab_size(self) -> int:
        raise NotImplementedError

    @property
    def support(self) -> Texts:
        return Texts(self.vocab_size)

    def decode(self, value: Tensor) -> Any:
        """Texts (..., L) as strings, nested lists of the leading axes."""
        raise NotImplementedError

    def token_steps(self, shape: torch.Size | None = None, share: Any = None) -> Steps:
        """See `protocols.Stepwise`."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Texts (*sample_shape, *batch_shape, L).

        :raises DeadEnd: where nothing can follow a text that was drawn.
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
