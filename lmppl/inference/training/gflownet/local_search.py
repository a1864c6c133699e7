"""Local search: moves training samples towards higher rewards."""

from __future__ import annotations

from ...core import programs
from ...core.arguments import at_least, instance_of
from ...core.programs import Values
from ...samplers.metropolis.kernels import density, regrow
from ..loop.schedules import Schedule, at, checked
from .exploration import Exploration, OnPolicy, Source


class LocalSearch(Exploration):
    r"""Draws from another exploration, then moves the last ``fraction`` of the particles by Metropolis-Hastings.

    The target of the moves is p(z, observed)^(1/T).  A move cuts off the end of one latent text, from a uniform
    position on, and lets the guide write another end (an ordinary latent is redrawn whole).  It is accepted with
    probability

    .. math:: \min\Big(1, \Big(\frac{p(z', y)}{p(z, y)}\Big)^{1/T} \frac{k(z \mid z')}{k(z' \mid z)}\Big)

    separately for every particle and observation; see `metropolis.kernels`.  A move costs about as much as a fresh draw
    and its reward.  The rewards found by the moves are used for acceptance only.

    :param base: the exploration whose draws are moved; None: the guide.
    :param moves: moves of each particle, at least 1.
    :param fraction: in [0, 1], of the particles that move.  A number or a function of the step.
    :param temperature: T > 0.  A number or a function of the step.
    :raises ValueError: for moves < 1, a fraction outside [0, 1], a temperature that is not positive; when it draws, for
        a subsampled plate that does not enclose every site.

    Source: Kim et al. 2024, "Local search GFlowNets".

    Example::

        trainer = GFlowNet(model, guide, optimizer=optimizer, exploration=LocalSearch(Tempered(), moves=2))
        trainer.fit(batches, steps=100)
    """

    def __init__(
        self,
        base: Exploration | None = None,
        moves: int = 2,
        fraction: Schedule = 0.5,
        temperature: Schedule = 1.0,
    ):
        at_least(1, moves=moves)
        self.base, self.moves = base or OnPolicy(), moves
        instance_of(Exploration, base=self.base)
        self.fraction = checked(fraction, "fraction", lambda f: 0 <= f <= 1, "must lie in [0, 1]")
        self.temperature = checked(temperature, "temperature", lambda t: t > 0, "must be positive")

    def draw(self, source: Source, num_particles: int) -> Values:
        start = self.base.draw(source, num_particles)
        n = round(at(self.fraction, source.step) * num_particles)
        if not n:
            return start
        still = {name: v[: num_particles - n] for name, v in start.items()}
        values = {name: v[num_particles - n :] for name, v in start.items()} | source.subsamples
        log_p = density(source, n, values).joint
        temperature = at(self.temperature, source.step)
        for _ in range(self.moves):
            move = regrow(source, values, log_p, temperature=temperature)
            values, log_p = move.values, move.log_p
        moved = {name: values[name] for name in start}
        return programs.cat_particles([still, moved]) if n < num_particles else moved
