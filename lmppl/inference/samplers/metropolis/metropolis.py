"""Markov chain Monte Carlo over latent texts, with its diagnostics."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from .... import text
from ...core import programs
from ...core.arguments import all_particles, at_least, is_program, plate_element
from ...core.plates import Plates
from ...core.programs import Program, Substitute
from ...core.query import Query
from ...core.sites import is_text
from ...core.validation import check_axes
from ...posterior.algorithm import Sampler
from ...posterior.posterior import Index, Posterior, scorer
from .kernels import Density, Proposal, Values, accept, draw, independence, regrowth, select

MOVES = ("regrowth", "branch", "independence")


@dataclass(frozen=True, kw_only=True, repr=False)
class MarkovChains(Posterior):
    """The posterior of `MetropolisHastings`: equally weighted draws of several Markov chains.

    There are N = chains x draws particles, one chain after another.  ``log_evidence`` is NaN, because Metropolis does
    not estimate it.  A draw of probability zero has weight zero; if all draws have, ``log_evidence`` is -inf and
    `Posterior.table` raises ZeroEvidence.

    :param values: the latent values by site, as in `Posterior`.
    :param log_weights: log weights, (N, *plates).
    :param log_evidence: NaN, (*plates).
    :param sites: plates, decoders and query of the program.
    :param log_joint: log p(z, observed) of the draws, (chain, draw, *plates).
    :param acceptance: the share of proposals accepted after warm-up, (*plates), by move; "swap" is that of exchanges
        between temperatures.

    Example::

        chains = MetropolisHastings(model, guide, num_chains=4, num_samples=500).run(x, y)
        chains.rhat["log_joint"]  # (*plates): above 1.01 the chains have not mixed
        chains.ess, chains.acceptance["regrowth"]  # (*plates) each
    """

    log_joint: Tensor = field(repr=False)
    acceptance: dict[str, Tensor]

    @property
    def num_chains(self) -> int:
        """The number of chains."""
        return self.log_joint.shape[0]

    @cached_property
    def statistics(self) -> dict[str, Tensor]:
        """The numbers that diagnostics use, (chain, draw, *plates, ...) each, by name.

        They are ``log_joint``, ``length(z)`` of every text z, in tokens with its stop (of several, their sum), and the
        sites that are numbers.
        """
        chains = self.log_joint.shape[:2]
        found = {"log_joint": self.log_joint}
        for name, value in self.values.items():
            if name in self.sites.decoders:
                axes = range(1 - self.sites.event_dims[name], 0)  # of several texts (.to_event)
                length = text.length(value).double()
                length = self.sites.plates.reduce(length.sum(tuple(axes)) if axes else length)[0]
                found[f"length({name})"] = length.view(self.log_joint.shape)
            elif name in self.samples:
                found[name] = self.samples[name].unflatten(0, chains)
        return found

    @cached_property
    def rhat(self) -> dict[str, Tensor]:
        """The rank-normalised split R-hat of each statistic, (*plates, ...), by arviz.

        Above 1.01 the chains have not mixed.  It is NaN for fewer than two chains or four draws, and for a statistic
        that never changes, and inf if each chain stays at a value of its own.
        """
        return {name: _arviz("rhat", x) for name, x in self.statistics.items()}

    @cached_property
    def mcmc_ess(self) -> dict[str, Tensor]:
        """The bulk effective sample size of each statistic, (*plates, ...), by arviz."""
        return {name: _arviz("ess", x) for name, x in self.statistics.items()}

    @property
    def ess(self) -> Tensor:
        """The smallest `mcmc_ess`, (*plates); 0 where all draws have probability zero.

        Unlike in other posteriors it is not computed from the weights, which are equal and do not show autocorrelation.
        """
        kept = self.log_evidence.dim()
        found = [
            x.nan_to_num(nan=torch.inf).flatten(kept).amin(-1) if x.dim() > kept else x for x in self.mcmc_ess.values()
        ]
        ess = torch.stack([x.masked_fill(x == torch.inf, torch.nan) for x in found])
        least = ess.nan_to_num(nan=torch.inf).amin(0)
        least = torch.where(ess.isnan().all(0), torch.nan, least)
        return least.masked_fill(self.log_evidence == -torch.inf, 0.0)

    @property
    def khat(self) -> Tensor:
        """NaN, because the weights are equal."""
        return torch.full_like(self.log_evidence, torch.nan)

    def standard_error(self, values: Tensor, index: Index = None) -> Tensor:
        r"""The standard error of the mean of ``values`` (N, ...), a function of the draws, (...).

        .. math:: \mathrm{sd}(f) / \sqrt{\mathrm{ESS}(f)}

        with arviz's effective sample size of the mean of f over all chains.  It is NaN for fewer than four draws per
        chain, and if f never changes.

        :param values: one number, or several, for each draw of one element of the kept plates.
        :param index: the element; None: there is only one.
        """
        element = plate_element(index, self.log_weights.shape[1:])
        deviations = self._deviations(values, element)
        weights = self.log_weights[all_particles(element)].softmax(0).double().to(values.device)
        weights = weights.view(-1, *[1] * (values.dim() - 1))
        variance = torch.where(weights > 0, deviations.square() / weights, 0.0).sum(0)
        ess = _arviz("ess", values.double().unflatten(0, self.log_joint.shape[:2]), method="mean")
        return (variance / ess.to(variance.device)).sqrt()

    def summary(self, index: Index = None) -> dict[str, float]:
        """The smallest ESS and the largest R-hat of the `statistics` of one plate element, by name.

        :param index: the element; None: there is only one.
        """
        element = plate_element(index, self.log_weights.shape[1:])
        found = super().summary(element)
        rhat = torch.cat([x[element].flatten() for x in self.rhat.values()])
        rhat = rhat[~rhat.isnan()]
        return found | ({"R-hat": float(rhat.max())} if len(rhat) else {})

    def take(self, chosen: Tensor) -> Posterior:
        """The draws of these indices, ``chosen`` (n, *plates), as an equally weighted `Posterior` without chains."""
        return Posterior(self.values, self.log_weights, self.log_evidence, self.sites).take(chosen)


class MetropolisHastings(Sampler):
    r"""Metropolis-Hastings: Markov chains whose moves draw the end of a text again, all chains in one vectorised run.

    .. math:: \alpha = \min\Big(1, \frac{p(z', observed)}{p(z, observed)} \frac{k(z \mid z')}{k(z' \mid z)}\Big)

    is the probability that a proposal z' of density k is accepted, separately in every chain and plate element.  The
    target includes scales, masks and factors.  Chains start from the guide, or from the prior if there is no guide.

    :param model: a Pyro program.
    :param guide: a Pyro program that samples the model's latent sites and proposes their new values; None: the model's
        own latent sites propose.
    :param num_chains: the number of independent chains.
    :param num_samples: draws kept of each chain; N = num_chains x num_samples.
    :param warmup: moves of each chain before the first draw, which are discarded.
    :param thin: moves between two draws.
    :param moves: "regrowth" changes one latent site, chosen uniformly: of a text the tokens after a uniform cut.
        "branch" does so and draws all later sites again, for programs in which one site says which others exist.
        "independence" draws all latent sites again.  Or a dict of moves with their probabilities.
    :param temperatures: None, or 1 = T_1 < T_2 < ... for parallel tempering.  Every chain then has a copy at each
        temperature,

        .. math:: \pi_k(z) \propto p(z)\, p(observed \mid z)^{1/T_k}

        and neighbours try to exchange their states after each move; draws come from T_1.  T = inf is the prior.  Only
        observations and factors are tempered, because a tempered language model writes long nonsense.
    :param max_plate_nesting: how many batch axes the plates take; None: found from a run without a network.

    ``run(*args)`` passes its arguments to model and guide, and returns `MarkovChains`, a `Posterior` with diagnostics.
    It raises SiteMismatch if model and guide do not fit together, and ValueError for a subsampled plate that does not
    enclose every site.

    Source: Hastings 1970; tempering: Geyer 1991.

    Example::

        posterior = MetropolisHastings(model, num_chains=8, num_samples=500, warmup=100).run(x, y)
        posterior.rhat["log_joint"], posterior.table("z", index=0)
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None = None,
        *,
        num_chains: int = 4,
        num_samples: int = 250,
        warmup: int = 100,
        thin: int = 1,
        moves: str | Mapping[str, float] = "regrowth",
        temperatures: Sequence[float] | None = None,
        max_plate_nesting: int | None = None,
    ):
        is_program(model=model, guide=model if guide is None else guide)
        at_least(1, num_chains=num_chains, num_samples=num_samples, thin=thin)
        at_least(0, warmup=warmup)
        moves = {moves: 1.0} if isinstance(moves, str) else dict(moves)
        if not set(moves) <= set(MOVES) or min(moves.values(), default=-1.0) < 0 or sum(moves.values()) <= 0:
            raise ValueError(f"moves: expected one of {MOVES} or a dict of their probabilities, got {moves}")
        ladder = [1.0] if temperatures is None else [float(t) for t in temperatures]
        if ladder[:1] != [1.0] or any(not a < b for a, b in zip(ladder, ladder[1:], strict=False)):
            raise ValueError(f"temperatures: expected 1 = T_1 < T_2 < ..., got {temperatures}")
        self.model, self.guide, self.moves, self.temperatures = model, guide, moves, ladder
        self.num_chains, self.num_samples, self.warmup, self.thin = num_chains, num_samples, warmup, thin
        self.max_plate_nesting = max_plate_nesting

    def sized(self, num_particles: int) -> Self:
        """A copy with ``num_particles`` draws in all, in at most as many chains, with the same share of warm-up."""
        at_least(1, num_particles=num_particles)
        other = copy.copy(self)
        other.num_chains = min(self.num_chains, num_particles)
        other.num_samples = num_particles // other.num_chains
        other.warmup = round(self.warmup * other.num_samples / self.num_samples)
        return other

    @torch.no_grad()
    def run(self, *args: Any, **kwargs: Any) -> MarkovChains:
        """The draws of the chains for these arguments of model and guide."""
        state = _State(self, args, kwargs)
        for _ in range(self.warmup):
            state.step()
        state.tally = {}
        draws: list[Values] = []
        log_joint = []
        for _ in range(self.num_samples):
            for _ in range(self.thin):
                state.step()
            draws.append({name: v[: self.num_chains] for name, v in state.values.items()})
            log_joint.append(state.density.joint[: self.num_chains])
        return self._posterior(state, draws, torch.stack(log_joint, 1))

    def _posterior(self, state: _State, draws: list[Values], log_joint: Tensor) -> MarkovChains:
        values = {name: _stack([d[name] for d in draws], name in state.texts) for name in draws[0]}
        possible = (log_joint > -torch.inf).flatten(0, 1)  # (chain x draw, *kept)
        count = possible.sum(0)
        log_weights = torch.where(possible, -count.clamp(min=1).to(log_joint.dtype).log(), -torch.inf)
        plain = Posterior.of(state.proposal, state.plates, log_weights, state.query)
        return MarkovChains(
            values=values,
            log_weights=log_weights,
            log_evidence=torch.where(count > 0, torch.nan, -torch.inf),
            sites=replace(plain.sites, score=lambda: state.score(values)),
            log_joint=log_joint,
            acceptance={move: accepted / tried for move, (accepted, tried) in state.tally.items()},
        )


class _State:
    """The state of the chains between two moves; chain c at temperature k is particle ``k * num_chains + c``."""

    def __init__(self, algorithm: MetropolisHastings, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.algorithm = algorithm
        ladder = algorithm.temperatures
        self.chains = len(ladder) * algorithm.num_chains
        self.query = Query(algorithm.model, algorithm.guide, args, kwargs, algorithm.max_plate_nesting)
        pair, start = draw(self.query, self.chains, {})
        self.proposal = pair.matched().proposal
        self.plates: Plates = start.plates
        self.values, self.density, self.log_q = start.values, start.density, start.log_q
        self.subsamples = {n: v for n, v in programs.values(self.proposal).items() if n not in self.values}
        self.texts = {n for n, node in programs.latents(self.proposal).items() if is_text(node["fn"])}
        beta = 1 / torch.tensor(ladder, dtype=torch.float64, device=self.density.joint.device)
        self.beta = beta.repeat_interleave(algorithm.num_chains).view(-1, *[1] * len(self.plates.sizes))
        self.tally: dict[str, tuple[Tensor, int]] = {}  # by move: how many were accepted (*kept), how many tried
        check_axes(pair)

    def score(self, values: Values) -> dict[str, Tensor]:
        """log p of the texts under the model, (N, *plate axes) each."""
        n = len(next(iter(values.values())))
        trace = self.query.trace(self.query.model, Substitute(values | self.subsamples), particles=n)
        return scorer(trace, list(self.texts))()

    def step(self) -> None:
        """One move of every chain, and one attempt to exchange neighbouring temperatures."""
        moves = self.algorithm.moves
        move = list(moves)[int(torch.multinomial(torch.tensor(list(moves.values())), 1))]
        if move != "independence":
            sites = list(self.values)
            first = int(torch.randint(len(sites), ()))
            later = sites[first + 1 :] if move == "branch" else []
            self._accept(move, regrowth(self.query, self.chains, self.values | self.subsamples, sites[first], later))
        else:
            self._accept(move, independence(self.query, self.chains, self.values, self.log_q, self.subsamples))
        if len(self.algorithm.temperatures) > 1:
            self._swap()

    def _accept(self, move: str, new: Proposal) -> None:
        log_old, log_new = (d.tempered(self.beta) for d in (self.density, new.density))
        accepted = accept(log_old, log_new, new.log_ratio)
        self.values = select(self.plates, accepted, new.values, self.values)
        self.density = new.density.where(accepted, self.density)
        # An independence move computes q of all sites before and after; a regrowth of one site does not.
        self.log_q = None if new.log_q is None else torch.where(accepted, new.log_q, new.log_q + new.log_ratio)
        self._count(move, accepted[: self.algorithm.num_chains])

    def _count(self, move: str, accepted: Tensor) -> None:
        total, tried = self.tally.get(move, (0, 0))
        self.tally[move] = total + accepted.sum(0), tried + len(accepted)

    def _swap(self) -> None:
        r"""Exchanges the states of neighbouring temperatures k and k+1 with the probability

        .. math:: \min(1, \exp((\beta_k - \beta_{k+1}) (\log p(observed \mid z_{k+1}) - \log p(observed \mid z_k))))

        for the pairs (0, 1), (2, 3), .. first, then for (1, 2), (3, 4), ..
        """
        K, C = len(self.algorithm.temperatures), self.algorithm.num_chains
        beta = self.beta.unflatten(0, (K, C))
        for first in range(min(2, K - 1)):
            likelihood = self.density.likelihood.masked_fill(self.density.prior == -torch.inf, -torch.inf)
            likelihood = likelihood.unflatten(0, (K, C))
            cold, hot = slice(first, K - 1, 2), slice(first + 1, K, 2)
            log_ratio = (beta[cold] - beta[hot]) * (likelihood[hot] - likelihood[cold])  # (pair, chain, *kept)
            swapped = torch.rand(log_ratio.shape, dtype=torch.float64, device=log_ratio.device).log() < log_ratio
            index = torch.arange(K * C, device=beta.device).view(K, C, *[1] * len(self.plates.sizes))
            index = index.expand(K, C, *self.plates.sizes)
            chosen = index.clone()
            chosen[cold] = torch.where(swapped, index[hot], index[cold])
            chosen[hot] = torch.where(swapped, index[cold], index[hot])
            self._reorder(chosen.flatten(0, 1))
            self._count("swap", swapped.flatten(0, 1))

    def _reorder(self, chosen: Tensor) -> None:
        """Replaces particle n by particle ``chosen[n]``, (particle, *kept)."""
        self.values = {name: self.plates.take(v, chosen) for name, v in self.values.items()}
        self.density = Density(*(x.gather(0, chosen) for x in self.density))
        self.log_q = None if self.log_q is None else self.log_q.gather(0, chosen)


def _stack(values: list[Tensor], is_text: bool) -> Tensor:
    """Draws (chain, ...) as one tensor (chain x draw, ...)."""
    if is_text:
        width = max(v.shape[-1] for v in values)
        values = [text.pad(v, width) for v in values]
    return torch.stack(values, 1).flatten(0, 1)


def _arviz(name: str, statistic: Tensor, **options: Any) -> Tensor:
    """A diagnostic of (chain, draw, *plates) by arviz, (*plates); NaN for a statistic that never changes."""
    chains, draws = statistic.shape[:2]
    if draws < 4 or (chains < 2 and name == "rhat"):
        return torch.full(statistic.shape[2:], torch.nan, dtype=torch.float64)
    import arviz  # slow to import, and only needed here

    with warnings.catch_warnings():
        # arviz warns of a variance of zero, and of more chains than draws; both are allowed here.
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", UserWarning)
        dataset = arviz.convert_to_dataset({"x": statistic.double().cpu().numpy()})
        found = torch.from_numpy(getattr(arviz, name)(dataset, **options)["x"].values.copy())
    return found.masked_fill((statistic == statistic[0, 0]).all(0).all(0).cpu(), torch.nan)
