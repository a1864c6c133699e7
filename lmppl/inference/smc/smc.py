"""Sequential Monte Carlo, token by token inside the text sites of a program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..arguments import at_least, is_program
from ..posterior.posterior import Posterior
from ..programs import Program
from ..resampling import SCHEMES
from .ancestry import Ancestry
from .state import State
from .twists import Twist, checked


@dataclass(frozen=True, kw_only=True)
class Sequential(Posterior):
    """Weighted particles with their ``ancestry``: every resampling on their way, see `lmppl.inference.smc.ancestry`."""

    ancestry: Ancestry = field(repr=False)


class SMC:
    r"""Particles that grow token by token, weighed and resampled on the way.

    .. math:: W_t = W_{t-1} \, p(z_t \mid z_{<t})^{scale} / q(z_t \mid z_{<t}), \qquad \hat Z = \sum_n W^n

    The weights W target the untwisted prefix and carry the evidence.  Before each token the particles of a plate
    element are resampled in proportion to W psi, if the effective sample size of W psi is below ``ess_threshold * N``;
    then psi is divided out, :math:`W^n = \frac1N \sum_m W^m \psi^m / \psi^n`, so that :math:`E[\hat Z] = Z` for any
    positive psi.  An observation or factor enters when the program reaches it, once all particles have ended the text
    before it; latent sites that are no texts are drawn whole.

    :param model: a Pyro program.
    :param guide: another, with the model's latent sites, its texts in the model's order; None: the model proposes.
    :param num_particles: N.
    :param ess_threshold: between 0 (never resample) and 1 (whenever weights differ).
    :param resampling: "systematic", "stratified", "multinomial" or "residual".
    :param twist: psi, see `lmppl.inference.smc.twists`: None, "stop", "flow" or a function prefix -> log psi.
    :param max_plate_nesting: guessed where not given.

    ``run(*args)`` raises SiteMismatch where model and guide do not fit, and ValueError for a subsampled plate that does
    not enclose every site.

    Source: Chopin and Papaspiliopoulos 2020, ch. 10; twists: Zhao et al. 2024.

    Example::

        posterior = SMC(model, guide, num_particles=64, twist="flow").run(x, y)
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None = None,
        num_particles: int = 64,
        ess_threshold: float = 0.5,
        resampling: str = "systematic",
        twist: Twist = None,
        *,
        max_plate_nesting: int | None = None,
    ):
        is_program(model=model, guide=guide or model)
        at_least(1, num_particles=num_particles)
        if not 0 <= ess_threshold <= 1:
            raise ValueError(f"ess_threshold: must lie between 0 and 1, got {ess_threshold}")
        if resampling not in SCHEMES:
            raise ValueError(f"resampling: expected one of {', '.join(SCHEMES)}, got {resampling!r}")
        self.model, self.guide, self.num_particles = model, guide, num_particles
        self.ess_threshold, self.resampling, self.twist = ess_threshold, resampling, checked(twist)
        self.max_plate_nesting = max_plate_nesting

    def run(self, *args: Any, **kwargs: Any) -> Sequential:
        """The weighted particles for these arguments, with their ancestry."""
        return run(self, args, kwargs)


@torch.no_grad()
def run(
    smc: SMC, args: tuple[Any, ...], kwargs: dict[str, Any], retained: Mapping[str, Tensor] | None = None
) -> Sequential:
    """SMC, or with ``retained`` values of every latent site (1, *plate axes, *event) conditional SMC.

    Conditional SMC (Andrieu et al. 2010) holds particle 0 to the retained values, through multinomial resamplings
    that keep it: if they are a draw of the posterior, then :math:`E[1 / \\hat Z] = 1 / Z`.
    """
    state = State(smc, args, kwargs, retained)
    while site := state.next_text():
        state.grow(*site)
    state.check()
    found = Posterior.of(state.proposal, state.plates, state.log_weights - math.log(smc.num_particles), smc.guide)
    return Sequential(**{f.name: getattr(found, f.name) for f in fields(found)}, ancestry=tuple(state.ancestry))
