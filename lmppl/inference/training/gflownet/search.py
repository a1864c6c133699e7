"""Draws that are possible, found among many of the model's own: for conditions that few texts satisfy."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import programs
from ...core.arguments import at_least, instance_of
from ...core.plates import kept_plates
from ...core.programs import Draw, Values
from ...core.resampling import systematic
from ...core.weights import log_weight_of_prior
from ...processes import distributed
from .exploration import Exploration, Source

HARD = 0.25  # searches begin once a larger share of the draws of a step was impossible
MOST_REST = 63  # steps between searches that find nothing


class Searched(Exploration):
    r"""Draws from another exploration; once draws are impossible, half of them come from a search of the model.

    The search begins after a step in which more than a quarter of the draws, or all draws of one observation, had
    reward zero.  Then half of every observation's particles are resampled from N tries of the model's latent sites, in
    proportion to the likelihood:

    .. math:: z_n \sim p(z), \qquad P(z_n) \propto p(observed \mid z_n), \qquad N \le tries \cdot num\_particles

    This is importance sampling, and rejection sampling where the condition is hard.  A guide learns a condition from
    draws that satisfy it; trained on its own draws alone it seldom sees any, and may lose the texts that it has not
    drawn.

    An observation for which nothing is found keeps the draws of the other exploration.  After a search that finds
    nothing for any observation, the next 1, 3, 7, ... up to 63 steps do not search, so that a condition that is too
    rare costs little.  There is no search if the guide has latent sites that the model does not have.  Once begun,
    searches go on, because a mode that the guide has lost does not show in the guide's own draws.

    :param otherwise: the exploration that draws the other particles, and all of them while draws are possible.
    :param tries: draws of the model for each particle, at most: a quarter of them first, more where some observation
        still has no possible draw.
    :raises ValueError: for ``tries`` < 1 and for what is not an `Exploration`.

    Example::

        exploration = Searched(Tempered(1.5, 0.25), tries=32)  # with tries=16: the default of GFlowNet
        trainer = GFlowNet(model, guide, optimizer=optimizer, exploration=exploration)
        trainer.fit(batches, steps=100)
    """

    def __init__(self, otherwise: Exploration, tries: int = 16):
        instance_of(Exploration, otherwise=otherwise)
        at_least(1, tries=tries)
        self.otherwise, self.tries = otherwise, tries

    def draw(self, source: Source, num_particles: int) -> Values:
        drawn, memory, share = self.otherwise.draw(source, num_particles), source.memory, num_particles // 2
        if not share or memory.impossible <= HARD:
            return drawn
        if memory.rest:
            memory.rest -= 1
            return drawn
        if programs.latents(source.sketches[-1]).keys() != drawn.keys():
            return drawn
        found = self._found(source, drawn, share)
        memory.fruitless = 0 if found is not None else memory.fruitless + 1
        memory.rest = min(2**memory.fruitless - 1, MOST_REST)
        return drawn if found is None else programs.cat_particles([_part(drawn, share, None), found])

    def _found(self, source: Source, drawn: Values, share: int) -> Values | None:
        """``share`` possible particles; observations without any keep those of ``drawn``; None if all are without."""
        most = self.tries * len(next(iter(drawn.values())))
        pool: list[Values] = []
        weights: list[Tensor] = []  # (n, *kept)
        for n in _quarters(most):
            draw = Draw()
            run, values = source.drawn(source.model, n, draw)
            plates = kept_plates([run], source.nesting)
            pool.append(values)
            weights.append(log_weight_of_prior(run, plates, draw.log_probs)[0].expand(n, *plates.sizes))
            some = (torch.cat(weights) > -torch.inf).any(0)  # (*kept)
            if distributed.everywhere(bool(some.all())):
                break
        if distributed.everywhere(not bool(some.any())):
            return None
        chosen = systematic(torch.cat(weights).masked_fill(~some, 0.0).softmax(0), share)
        found = {name: plates.take(v, chosen) for name, v in programs.cat_particles(pool).items()}
        both = programs.cat_particles([_part(drawn, 0, share), found])  # pads texts to one width
        own, found = _part(both, 0, share), _part(both, share, None)
        where = plates.spread(some[None])
        return {
            name: torch.where(where.reshape(*where.shape, *[1] * (v.dim() - where.dim())), v, own[name])
            for name, v in found.items()
        }


def _quarters(n: int) -> list[int]:
    """n as a sum of at most four parts."""
    size = -(-n // 4)
    return [min(size, n - begin) for begin in range(0, n, size)]


def _part(values: Values, begin: int, end: int | None) -> Values:
    return {name: v[begin:end] for name, v in values.items()}
