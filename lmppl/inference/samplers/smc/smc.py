"""Sequential Monte Carlo over the tokens of a program's text sites."""

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
    r"""The posterior of `SMC`: weighted particles with their ancestry.

    After a resampling all weights are equal, so the ESS and k-hat of the final weights do not show what was lost
    before.  `min_ess`, `survival` and `score_khat` do; `suspect` combines them.

    :param values: the latent values by site, as in `Posterior`.
    :param log_weights: unnormalised log weights, (N, *plates).
    :param log_evidence: the log evidence, (*plates).
    :param sites: plates, decoders and query of the program.
    :param ancestry: every resampling of the run, a tuple of `Resampling`.

    Example::

        posterior = SMC(model, guide, num_particles=64).run(x, y)
        posterior.min_ess, posterior.survival  # (*plates) each
        if posterior.suspect.any():
            posterior = SMC(model, guide, num_particles=640).run(x, y)
    """

    ancestry: Ancestry = field(repr=False)

    @property
    def min_ess(self) -> Tensor:
        r"""The smallest effective sample size of the run, of the scores W psi or the final weights, (*plates).

        .. math:: \min_r (\sum_n W_r^n \psi_r^n)^2 / \sum_n (W_r^n \psi_r^n)^2
        """
        if not self.ancestry:
            return self.ess
        return torch.minimum(ess_of_scores(self.ancestry).amin(0), self.ess)

    @property
    def survival(self) -> Tensor:
        """The smallest share of particles before a resampling that have a descendant at the end, (*plates)."""
        if not self.ancestry:
            return torch.ones_like(self.log_evidence)
        return survivors(self.ancestry).amin(0) / self.num_particles

    @property
    def score_khat(self) -> Tensor:
        """The largest Pareto k-hat of the scores W psi at any resampling, (*plates); NaN if none is defined."""
        if not self.ancestry:
            return torch.full_like(self.log_evidence, torch.nan)
        khat = khat_of_scores(self.ancestry)
        return khat.nan_to_num(-torch.inf, neginf=-torch.inf).amax(0).masked_fill(khat.isnan().all(0), torch.nan)

    @property
    def suspect(self) -> Tensor:
        r"""Whether the result depends on too few particles, BoolTensor (*plates).

        It is true if any of these numbers is less than min(10, N/8):

        - the ESS of the final weights,
        - the number of particles before a resampling that have a descendant at the end,
        - the ESS of the weights at a resampling without a twist,

        or if the k-hat of the weights at a resampling without a twist is at least 1, an infinite mean.

        An ESS of E adds 1/E - 1/N to the relative variance of the evidence; for E = 10 this is a standard deviation of
        about 0.3.  Resampling at an ESS below N/2 is normal, so the limit is N/8 for a small N.  Resamplings with a
        twist are left out, because particles are then chosen half by their weights alone, which bounds the loss.  Lines
        of descent also merge in a good run: about N / (1 + r/2) are left after r resamplings.  So more than about 14
        resamplings, or N/5, make a run suspect; use more particles then.
        """
        few = min(10.0, self.num_particles / 8)
        found = (self.ess < few) | (self.survival * self.num_particles < few)
        blind = tuple(event for event in self.ancestry if not event.twisted)
        if blind:
            found = found | (ess_of_scores(blind) < few).any(0) | (khat_of_scores(blind) >= 1).any(0)
        return found

    def standard_error(self, values: Tensor, index: Index = None) -> Tensor:
        r"""The standard error of the weighted mean of ``values`` (N, ...), a function of the particles, (...).

        .. math:: \sqrt{\Big(\frac{N}{N - 1}\Big)^R \sum_e \Big(\sum_{n: e(n) = e} w_n \, (f_n - \bar f)\Big)^2}

        with e(n) the particle before the first of R resamplings from which n descends, because particles with a common
        ancestor are not independent.  It is too small if few ancestors survive (see `survival`), and NaN if all
        particles have the same ancestor.

        :param values: one number, or several, for each particle of one element of the kept plates.
        :param index: the element; None: there is only one.

        Source: Chan and Lai 2013; Lee and Whiteley 2018.
        """
        deviations = self._deviations(values, index)
        one = self._of(plate_element(index, self.log_weights.shape[1:]))
        if not one.ancestry:
            return deviations.square().sum(0).sqrt()
        first = lineages(one.ancestry)[0].to(deviations.device)
        error = torch.zeros_like(deviations).index_add(0, first, deviations).square().sum(0).sqrt()
        resampled, n = sum(bool(event.resampled) for event in one.ancestry), self.num_particles
        error = error * (n / max(1, n - 1)) ** (resampled / 2)  # two lines merge with probability 1 / N
        return torch.full_like(error, torch.nan) if len(first.unique()) == 1 else error

    def summary(self, index: Index = None) -> dict[str, float]:
        """The figures of `Posterior.summary`, with `min_ess`, `survival` and `suspect`.

        :param index: the element; None: there is only one.
        """
        element = plate_element(index, self.log_weights.shape[1:])
        one = self._of(element)
        way = {"least ESS": float(one.min_ess), "survival": float(one.survival), "suspect": float(one.suspect)}
        return super().summary(element) | way

    def _of(self, element: tuple[int, ...]) -> Sequential:
        """This posterior with the weights and the ancestry of one plate element; the values are unchanged."""
        at = all_particles(element)
        ancestry = tuple(e._replace(chosen=e.chosen[at], log_scores=e.log_scores[at]) for e in self.ancestry)
        weights, evidence = self.log_weights[at], self.log_evidence[element]
        return replace(self, log_weights=weights, log_evidence=evidence, ancestry=ancestry)


class SMC(Sampler):
    r"""Sequential Monte Carlo: particles grow token by token, are weighted after each token, and resampled when needed.

    .. math:: W_t = W_{t-1} \, p(z_t \mid z_{<t})^{scale} / q(z_t \mid z_{<t}), \qquad \hat Z = \sum_n W^n

    Before each token of a text, and before every other latent site, the particles of a plate element are resampled if
    the effective sample size of W psi is below ``ess_threshold * N``.  They are chosen in proportion to V and V is
    divided out, :math:`W^n = \frac1N \sum_m V^m \, W^n / V^n`, so that :math:`E[\hat Z] = Z` for every positive psi.
    Without a twist, V is W.  With "stop" and "flow", V is half W psi and half W, each normalised; with a function psi
    it is W psi, or this mixture where the effective sample size of W psi is below N / 2.  So even a bad psi makes the
    result little worse than no twist.  An observation or factor enters the weights when the program reaches it, which
    is after all particles have ended the text before it.

    The twist psi scores unfinished texts by what is still to come; weights never contain it:

    - None: no twist.
    - "stop": p(stop | prefix)^scale times the factors and observations that follow if the text stops here.
    - "flow": the same divided by the guide's q(stop | prefix), for a guide trained as a GFlowNet.
    - a function of the prefix, token ids (N, *plates, t), that returns log psi (N, *plates); with a second parameter it
      also gets a dict of the latent values before this site.  -inf takes the smallest positive psi of its plate
      element; NaN and +inf raise ValueError.

    "stop" and "flow" about double the tokens that the network reads.

    Latent sites that are no texts are drawn in one step.  After a resampling the program is run again up to the same
    place with the values so far; nothing is scored twice.  Sites must not depend on a latent value through Python
    (``if k``, ``range(k)``): loop over all possible values under ``pyro.poutine.mask(mask=i < k)``.

    :param model: a Pyro program.
    :param guide: a Pyro program that samples the model's latent sites, with its texts in the same order; None: the
        model proposes them itself.
    :param num_particles: N, the number of particles per plate element.
    :param ess_threshold: from 0 (never resample, which is importance sampling) to 1 (resample whenever weights differ).
    :param resampling: "systematic", "stratified", "multinomial" or "residual".
    :param twist: psi, see above.
    :param max_plate_nesting: how many batch axes the plates take; None: found from a run without a network.

    ``run(*args)`` passes its arguments to model and guide, and returns a `Sequential`: a `Posterior` with its ancestry.
    It raises SiteMismatch if model and guide do not fit together, and ValueError for a subsampled plate that does not
    enclose every site.

    Source: Chopin and Papaspiliopoulos 2020, ch. 10; twists: Zhao et al. 2024; the flow: Hu et al. 2024.

    Example::

        posterior = SMC(model, guide, num_particles=64).run(x, y)
        posterior.log_evidence  # (*plates): here one for each story
        posterior.table("z", index=0)[:5]  # the most probable texts of the first story
        posterior.suspect  # whether too few particles survived


        def few_words(prefix):  # prefers short prefixes, (N, *plates)
            return -0.1 * text.length(prefix)


        SMC(model, guide, num_particles=64, twist=few_words).run(x, y)
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
        """The weighted particles for these arguments of model and guide, with their ancestry."""
        return run(self, args, kwargs)


@torch.no_grad()
def run(
    smc: SMC, args: tuple[Any, ...], kwargs: dict[str, Any], retained: Mapping[str, Tensor] | None = None
) -> Sequential:
    """SMC; or, with ``retained`` values of every latent site (1, *plate axes, *event), conditional SMC.

    Conditional SMC (Andrieu et al. 2010) keeps particle 0 at the retained values, through multinomial resamplings.  If
    these values are a draw from the posterior, then :math:`E[1 / \\hat Z] = P(\\hat Z > 0) / Z`, where
    :math:`P(\\hat Z > 0)` is the probability that a run of SMC has a particle of positive weight.  It is 1 unless there
    are hard factors.
    """
    state = State(smc, args, kwargs, retained)
    while site := state.next_text():
        state.grow(*site)
    state.check()
    log_weights = state.log_weights - math.log(smc.num_particles)
    found = Posterior.of(state.proposal, state.plates, log_weights, state.query, state.target)
    found = replace(found, sites=replace(found.sites, dependent=True))
    return Sequential(**{f.name: getattr(found, f.name) for f in fields(found)}, ancestry=tuple(state.ancestry))
