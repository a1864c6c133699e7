"""Sequential Monte Carlo, token by token inside the text sites of a program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...core.arguments import all_particles, at_least, is_number, is_program, one_of, plate_element
from ...core.programs import Program
from ...core.resampling import SCHEMES
from ...posterior.algorithm import Sampler
from ...posterior.posterior import Index, Posterior
from .ancestry import Ancestry, ess_of_scores, khat_of_scores, lineages, survivors
from .state import State
from .twists import Twist, checked


@dataclass(frozen=True, kw_only=True, repr=False)
class Sequential(Posterior):
    r"""Weighted particles with their ``ancestry``: every resampling on their way, see `samplers.smc.ancestry`.

    The ESS and k-hat of the final weights say nothing of what was lost on the way: after the last resampling weights
    are alike.  `min_ess`, `survival` and `score_khat` do, and `suspect` is their verdict.
    """

    ancestry: Ancestry = field(repr=False)

    @property
    def min_ess(self) -> Tensor:
        r"""The smallest effective sample size along the way, of the scores W psi and of the final weights, (*plates).

        .. math:: \min_r (\sum_n W_r^n \psi_r^n)^2 / \sum_n (W_r^n \psi_r^n)^2
        """
        if not self.ancestry:
            return self.ess
        return torch.minimum(ess_of_scores(self.ancestry).amin(0), self.ess)

    @property
    def survival(self) -> Tensor:
        """The share of the particles before the first resampling that have a descendant at the end, (*plates)."""
        if not self.ancestry:
            return torch.ones_like(self.log_evidence)
        return survivors(self.ancestry).amin(0) / self.num_particles

    @property
    def score_khat(self) -> Tensor:
        """The largest Pareto k-hat of the scores W psi at any resampling, (*plates); NaN where none is defined.

        At each resampling: `samplers.smc.ancestry.khat_of_scores`.
        """
        if not self.ancestry:
            return torch.full_like(self.log_evidence, torch.nan)
        khat = khat_of_scores(self.ancestry)
        return khat.nan_to_num(-torch.inf, neginf=-torch.inf).amax(0).masked_fill(khat.isnan().all(0), torch.nan)

    @property
    def suspect(self) -> Tensor:
        r"""Whether few particles speak for all, (*plates): fewer than min(10, N/8) of

        - the final weights' ESS,
        - the particles before the first resampling that have a descendant at the end, or
        - the ESS of the weights at a resampling by weights alone; or a k-hat of 1 or more there, an infinite mean.

        An ESS of E adds 1/E - 1/N to the relative variance of the evidence, so that 10 is a standard deviation of 0.3.
        Resampling at ESS < N/2 is as it should be, hence N/8 for a small N: weights of relative variance 7.  Where a
        twist has one half of the say, the other half bounds what its scores can do.  Lines of descent meet in the
        healthiest run: some N / (1 + r/2) are left after r resamplings, so that more than about 14 of them, or N/5,
        leave the first sites to fewer draws than this; more particles help.
        """
        few = min(10.0, self.num_particles / 8)
        found = (self.ess < few) | (self.survival * self.num_particles < few)
        blind = tuple(event for event in self.ancestry if not event.twisted)
        if blind:
            found = found | (ess_of_scores(blind) < few).any(0) | (khat_of_scores(blind) >= 1).any(0)
        return found

    def standard_error(self, values: Tensor, index: Index = None) -> Tensor:
        r"""The standard error of the weighted mean of ``values`` (N, ...), a function of the particles, (...).

        .. math:: \sqrt{\sum_e \Big(\sum_{n: e(n) = e} w_n \, (f_n - \bar f)\Big)^2}

        with e(n) the particle before the first resampling from which n descends: what has an ancestor in common is not
        independent.  It is too small where few ancestors survive, see `survival`; NaN where all particles have one
        ancestor.

        Source: Chan and Lai 2013; Lee and Whiteley 2018.
        """
        deviations = self._deviations(values, index)
        one = self._of(plate_element(index, self.log_weights.shape[1:]))
        if not one.ancestry:
            return deviations.square().sum(0).sqrt()
        first = lineages(one.ancestry)[0].to(deviations.device)
        error = torch.zeros_like(deviations).index_add(0, first, deviations).square().sum(0).sqrt()
        return torch.full_like(error, torch.nan) if len(first.unique()) == 1 else error

    def summary(self, index: Index = None) -> dict[str, float]:
        """As `Posterior.summary`, with what was lost on the way."""
        element = plate_element(index, self.log_weights.shape[1:])
        one = self._of(element)
        way = {"least ESS": float(one.min_ess), "survival": float(one.survival), "suspect": float(one.suspect)}
        return super().summary(element) | way

    def _of(self, element: tuple[int, ...]) -> Sequential:
        """The weights and the ancestry of one plate element; the values stay those of all."""
        at = all_particles(element)
        ancestry = tuple(e._replace(chosen=e.chosen[at], log_scores=e.log_scores[at]) for e in self.ancestry)
        weights, evidence = self.log_weights[at], self.log_evidence[element]
        return replace(self, log_weights=weights, log_evidence=evidence, ancestry=ancestry)


class SMC(Sampler):
    r"""Particles that grow token by token, weighed and resampled on the way.

    .. math:: W_t = W_{t-1} \, p(z_t \mid z_{<t})^{scale} / q(z_t \mid z_{<t}), \qquad \hat Z = \sum_n W^n

    The weights W target the untwisted prefix and carry the evidence.  Before each token of a text, and before every
    other latent site, the particles of a plate element are resampled in proportion to V, if the effective sample size
    of W psi is below ``ess_threshold * N``; then V is divided out, :math:`W^n = \frac1N \sum_m V^m \, W^n / V^n`, so
    that :math:`E[\hat Z] = Z` for any positive psi.  Without a twist V is W; with one, V is half W psi and half W, each
    normalised, so that no psi makes it much worse than none (`twists.defended`).  An observation or factor enters when
    the program reaches it, once all particles have ended the text before it.

    Latent sites that are no texts are drawn whole.  A program whose particles were resampled is run again, with the
    values so far, up to where it was; nothing is scored twice.  With a twist, particles wait for the next text where
    one is still to come, because psi is known there.  No site may depend on a latent value through Python (``if k``,
    ``range(k)``): loop over all that there can be, under ``pyro.poutine.mask(mask=i < k)``.

    :param model: a Pyro program.
    :param guide: another, with the model's latent sites, its texts in the model's order; None: the model proposes.
    :param num_particles: N.
    :param ess_threshold: between 0 (never resample) and 1 (whenever weights differ).
    :param resampling: "systematic", "stratified", "multinomial" or "residual".
    :param twist: psi, see `samplers.smc.twists`: None, "stop", "flow" or a function prefix -> log psi.
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
        is_program(model=model, guide=model if guide is None else guide)
        at_least(1, num_particles=num_particles)
        is_number("a number between 0 and 1", lambda x: 0 <= x <= 1, ess_threshold=ess_threshold)
        one_of(SCHEMES, resampling=resampling)
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
    that keep it: if they are a draw of the posterior, then :math:`E[1 / \\hat Z] = P(\\hat Z > 0) / Z`, with the
    probability that a run of SMC finds anything possible: 1 but for hard factors.
    """
    state = State(smc, args, kwargs, retained)
    while site := state.next_text():
        state.grow(*site)
    state.check()
    log_weights = state.log_weights - math.log(smc.num_particles)
    found = Posterior.of(state.proposal, state.plates, log_weights, state.query, state.target)
    found = replace(found, sites=replace(found.sites, dependent=True))
    return Sequential(**{f.name: getattr(found, f.name) for f in fields(found)}, ancestry=tuple(state.ancestry))
