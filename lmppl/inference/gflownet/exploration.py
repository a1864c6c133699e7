"""What to draw training samples from instead of the guide: u may be evaluated on any z."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from pyro.distributions import TorchDistribution

from ..programs import Temper


class Exploration(ABC):
    """A proposal made from the guide's text sites."""

    @abstractmethod
    def proposal(self, num_particles: int, nesting: int) -> Temper:
        """A function from a text site's distribution, particle axis at ``-1 - nesting``, to the one to draw from."""


class Tempered(Exploration):
    """The last ``fraction`` of the particles are drawn with every token's temperature raised to ``temperature``.

    :raises ValueError: for a fraction outside [0, 1] or a temperature that is not positive.
    """

    def __init__(self, temperature: float = 1.5, fraction: float = 0.25):
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction: must lie in [0, 1], got {fraction}")
        if temperature <= 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        self.temperature, self.fraction = temperature, fraction

    def proposal(self, num_particles: int, nesting: int) -> Temper:
        heat = torch.ones(num_particles)
        heat[num_particles - round(self.fraction * num_particles) :] = self.temperature
        heat = heat.view(-1, *[1] * nesting)  # (particle, *plate axes)

        def temper(fn: TorchDistribution) -> TorchDistribution:
            return fn.tempered(heat) if hasattr(fn, "tempered") else fn

        return temper
