"""Draws that are possible, searched for among many of the model's own: for conditions that few texts satisfy."""

from __future__ import annotations

import torch

from .. import programs
from ..arguments import at_least, instance_of
from ..programs import Replay
from ..resampling import systematic
from ..weights import kept_plates, log_weight_of_prior
from .exploration import Exploration, Source, Values

HARD = 0.25  # the share of impossible draws in a step from which on one searches


class Searched(Exploration):
    r"""Another exploration; once its draws are impossible, half of the particles are found by the model itself.

    From the first step on of which more than a quarter of the draws had reward zero, half of every observation's
    particles are resampled from N tries of the model's latent sites by what follows them,

    .. math:: z_n \sim p(z), \qquad P(z_n) \propto p(observed \mid z_n), \qquad N \le tries \cdot num\_particles,

    that is by importance sampling, which rejects where a condition is hard.  A guide learns a condition from draws that
    satisfy it; one that is trained on its own draws alone seldom sees any, and may lose what it has not drawn.  An
    observation for which nothing is found keeps the draws of the other exploration.  Nothing is searched if the guide
    has latent sites that the model has not.

    :param otherwise: what the other particles are drawn from, and all of them where draws are possible.
    :param tries: of the model, for each particle at most; a quarter of them first, the others where some observation
        still has nothing.
    """

    def __init__(self, otherwise: Exploration, tries: int = 16):
        instance_of(Exploration, otherwise=otherwise)
        at_least(1, tries=tries)
        self.otherwise, self.tries = otherwise, tries

    def draw(self, source: Source, num_particles: int) -> Values:
        share = num_particles // 2 if source.impossible > HARD else 0
        drawn = self.otherwise.draw(source, num_particles)
        found = self._found(source, drawn, share) if share else None
        if found is None:
            return drawn
        return programs.cat_particles([{name: v[share:] for name, v in drawn.items()}, found])

    def _found(self, source: Source, drawn: Values, share: int) -> Values | None:
        """``share`` particles that are possible; those of ``drawn`` for observations that have none."""
        pool: list[Values] = []
        count = max(1, self.tries * len(next(iter(drawn.values()))) // 4)
        for _ in range(4):
            pool.append(source.draw(source.model, count))
            if pool[0].keys() != drawn.keys():
                return None
            values = programs.cat_particles(pool)
            run = programs.trace(
                source.model,
                source.args,
                source.kwargs,
                Replay(values | source.subsamples),
                nesting=source.nesting,
                particles=len(pool) * count,
            )
            plates = kept_plates([run], source.nesting)
            log_w = log_weight_of_prior(run, plates)[0].expand(len(pool) * count, *plates.sizes)
            some = (log_w > -torch.inf).any(0)  # (*kept)
            if bool(some.all()):
                break
        chosen = systematic(log_w.masked_fill(~some, 0.0).softmax(0), share)
        own = {name: v[:share] for name, v in drawn.items()}
        found = {name: plates.take(v, chosen) for name, v in values.items()}
        own, found = (
            {name: v[a : a + share] for name, v in programs.cat_particles([own, found]).items()} for a in (0, share)
        )  # texts are as wide as one another
        where = plates.spread(some[None])
        return {
            name: torch.where(where.reshape(*where.shape, *[1] * (v.dim() - where.dim())), v, own[name].expand_as(v))
            for name, v in found.items()
        }
