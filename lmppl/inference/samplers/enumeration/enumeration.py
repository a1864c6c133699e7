"""Enumeration: the exact posterior, or a chosen share of it, with a certified interval for the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions import Unit
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .... import text
from ....distributions import Completion
from ...core import programs
from ...core.arguments import at_least, is_program, plate_element
from ...core.partial import advance
from ...core.plates import Plates, kept_plates
from ...core.programs import Node, Program, Sketch
from ...core.query import Pair, Query
from ...core.sites import text_of
from ...core.validation import check_axes
from ...core.weights import device_of, log_density, scale, site_log_prob
from ...posterior.algorithm import Algorithm
from ...posterior.posterior import Index, Posterior
from .token_tree import Texts, dtype_of, explore, most_probable


@dataclass(frozen=True, kw_only=True, repr=False)
class Enumerated(Posterior):
    r"""The posterior of `Enumeration`: every value of the latents that was found, with its exact weight.

    .. math:: \log w(z) = \log p(z, observed)

    There are K particles, the distinct values.  Plate elements with fewer values than the largest are padded: they
    repeat their first value, with weight zero.

    :param values: the latent values by site, as in `Posterior`.
    :param log_weights: log p(z, observed), (K, *plates); -inf at padding.
    :param log_evidence: the log evidence of the values found, (*plates); exact if all were.
    :param sites: plates, decoders and query of the program.
    :param unexplored: the prior mass of all other values, (*plates); 0 if the enumeration is complete.
    :param log_evidence_bounds: the certified lower and upper bound of the log evidence, (*plates) each.
    :param log_prior: the log prior of each value, (K, *plates); -inf at padding.

    Example::

        exact = Enumeration(model).run(x, y)
        exact.unexplored  # 0: complete
        exact.log_prob(lm.encode(["a", "b"], stop="eos"))  # the exact log posterior of one text for each story
        exact.table("z", index=0)[:5]
    """

    unexplored: Tensor
    log_evidence_bounds: tuple[Tensor, Tensor]
    log_prior: Tensor = field(repr=False)

    @property
    def khat(self) -> Tensor:
        """NaN, because the values are not draws."""
        return torch.full_like(self.log_evidence, torch.nan)

    def standard_error(self, values: Tensor, index: Index = None) -> Tensor:
        """Zero, because the values are not draws; ``log_evidence_bounds`` shows what was left out."""
        return torch.zeros_like(self._deviations(values, index)[0])

    def summary(self, index: Index = None) -> dict[str, float]:
        """The log evidence of one plate element; for an incomplete enumeration also the unexplored mass and bounds.

        :param index: the element; None: there is only one.
        """
        element = plate_element(index, self.log_weights.shape[1:])
        found, left = {"log evidence": float(self.log_evidence[element])}, float(self.unexplored[element])
        if left > 0:
            low, high = (float(x[element]) for x in self.log_evidence_bounds)
            found |= {"unexplored": left, "lower bound": low, "upper bound": high}
        return found

    def log_prob(self, values: Mapping[str, Tensor] | Tensor) -> Tensor:
        """The exact log posterior of given values of the latent sites.

        :param values: a dict of values by site, or a tensor if there is only one site.  Their shapes are those of
            `samples`, (n, *plates, ...), or the same without the first axis.
        :returns: (n, *plates), or (*plates).  A value that was not found has -inf if the enumeration is complete, and
            NaN if not.
        :raises ValueError: for values of other sites, and for shapes that do not fit.
        """
        names = list(self.samples)
        if isinstance(values, Tensor):
            if len(names) != 1:
                raise ValueError(f"values: the posterior has the sites {names}; give a dict")
            values = {names[0]: values}
        if set(values) != set(names):
            raise ValueError(f"values: expected the sites {names}, got {list(values)}")
        for name, value in values.items():
            if name in self.sites.decoders and value.is_floating_point():
                raise ValueError(f"values: those of {name!r} are {value.dtype}, expected a text, a LongTensor")
        single = values[names[0]].dim() < self.samples[names[0]].dim()
        known, asked = [], []
        for name in names:
            support, value = self.samples[name], values[name][None] if single else values[name]
            if self.sites.event_dims[name] == 1 and name in self.sites.decoders:
                width = max(int(text.length(x).max()) if x.numel() else 0 for x in (support, value))
                support, value = text.pad(support, width), text.pad(value, width)
            try:
                value = value.expand(len(value), *support.shape[1:])
            except RuntimeError as error:
                expected = f"(n, *{tuple(support.shape[1:])})"
                raise ValueError(f"values: those of {name!r} are {tuple(value.shape)}, expected {expected}") from error
            right = self.log_evidence.dim() + 1
            known.append(support.flatten(right) if support.dim() > right else support[..., None])
            asked.append(value.flatten(right) if value.dim() > right else value[..., None])
        shape = (len(asked[0]), *self.log_evidence.shape)
        cells = self.log_evidence.numel()
        rows, queries = (torch.cat(x, -1).reshape(len(x[0]), cells, -1) for x in (known, asked))  # (K or n, cells, D)
        log_p = (self.log_weights - self.log_evidence).reshape(self.num_particles, -1)
        outside = torch.where(self.unexplored > 0, torch.nan, -torch.inf).flatten()
        result = log_p.new_empty(len(queries), cells)
        for c in range(cells):
            real = self.log_prior.reshape(self.num_particles, -1)[:, c] > -torch.inf
            both = torch.cat([rows[real, c], queries[:, c]])
            _, kind = torch.unique(both, dim=0, return_inverse=True)
            table = log_p.new_full((len(both),), float(outside[c]))
            table[kind[: int(real.sum())]] = log_p[real, c]
            result[:, c] = table[kind[int(real.sum()) :]]
        result = result.view(shape)
        return result[0] if single else result


class Enumeration(Algorithm):
    r"""The exact posterior, by enumerating all latent values, the most probable of the prior first.

    .. math:: \log w(z) = \log p(z, observed), \qquad \log Z = \log \sum_z w(z)

    Latent sites are taken in program order.  A text is searched token by token, the most probable prefix first; a site
    with a finite support multiplies the values found so far.  Plate elements are searched separately.

    If the search is not complete, the result says what is missing: ``unexplored`` is the prior mass left out, and
    ``log_evidence_bounds`` a certified interval of the log evidence.  With scales :math:`s \ge 1` on the latent sites
    the rest adds at most :math:`e^{bound}\,unexplored^{\min s}` to the evidence, since
    :math:`\sum p^s \le (\sum p)^s`; with s < 1 there is no bound.

    :param model: a Pyro program whose latent sites are all discrete, in no plates other than those that enclose every
        latent, observation and factor.
    :param max_support: the most values kept for one plate element.  The search of a text stops after 8 times as many
        prefixes (at least 10,000).
    :param mass: the share of the prior to explore, in (0, 1]; 1 is all of it.
    :param factor_bound: an upper bound of the log of the product of the model's factors and continuous observations, a
        number or (*plates).  None: there is none, and then a model that has them has no upper bound of the evidence.
    :param max_plate_nesting: how many batch axes the plates take; None: found from a run without a network.

    ``run(*args)`` passes its arguments to the model, and returns `Enumerated`, a `Posterior` with exact weights.  It
    raises ValueError for a latent site that is continuous or has an infinite support, for a latent site in a plate that
    does not enclose every site, and for a subsampled plate of that kind.

    Example::

        exact = Enumeration(model).run(x, y)  # feasible for short texts
        exact.log_evidence, exact.unexplored  # exact where nothing is unexplored
        most = Enumeration(model, mass=0.9).run(x, y)  # only the most probable texts of the prior
        low, high = most.log_evidence_bounds  # certified
    """

    def __init__(
        self,
        model: Program,
        *,
        max_support: int = 100_000,
        mass: float = 1.0,
        factor_bound: float | Tensor | None = None,
        max_plate_nesting: int | None = None,
    ):
        is_program(model=model)
        at_least(1, max_support=max_support)
        if not 0 < mass <= 1:
            raise ValueError(f"mass: must lie in (0, 1], got {mass}")
        self.model, self.max_support, self.mass = model, max_support, mass
        self.factor_bound, self.max_plate_nesting = factor_bound, max_plate_nesting

    @torch.no_grad()
    def run(self, *args: Any, **kwargs: Any) -> Enumerated:
        """The exact posterior for these arguments of the model."""
        query = Query(self.model, None, args, kwargs, self.max_plate_nesting)
        sketch = query.trace(self.model, Sketch(), particles=1)
        plates = kept_plates([sketch], query.nesting, subsampling=False)
        _refuse_other_plates(sketch, plates)
        subsamples = {n: s["value"] for n, s in sketch.nodes.items() if s["type"] == "sample" and site_is_subsample(s)}
        support = Support(plates, device_of(sketch))
        count = len(programs.latents(sketch))
        while True:
            known, size = subsamples | support.values, len(support)
            trace, site = advance(query, self.model, known, particles=size, texts_only=False)
            if site is None:
                break
            share = ((1 - self.mass) - support.unexplored).clamp(min=0) / max(1, count - len(support.values))
            support.extend(site["name"], site["fn"], share, self.max_support)
        return self._weigh(query, support, trace)

    def _weigh(self, query: Query, support: Support, trace: Trace) -> Enumerated:
        plates = support.plates
        latents = programs.latents(trace)
        known = {name: support.log_probs[name] for name in latents}
        real = support.log_joint > -torch.inf  # (K, *plates)
        log_weights = log_density(trace, plates, known=known | _observed_texts(trace, plates, real))
        for name, node in latents.items():
            if node["mask"] is not None:
                # A masked site's density does not count, but its values come from the prior.
                log_prior = plates.reduce(support.log_probs[name])
                log_weights = log_weights + log_prior - site_log_prob(node, plates, known[name], scaled=False)
        log_weights = log_weights.expand(1, *real.shape)[0].masked_fill(~real, -torch.inf)
        check_axes(Pair(query, trace, trace, len(log_weights)))
        posterior = Posterior.of(trace, plates, log_weights, query)
        unexplored = support.unexplored.to(log_weights.dtype)
        s = _smallest_scale(latents, plates)
        left_out = s * unexplored.log() + self._rest(trace) if s >= 1 else torch.full_like(unexplored, torch.inf)
        left_out = left_out.masked_fill(unexplored == 0, -torch.inf)
        return Enumerated(
            values=posterior.values,
            log_weights=log_weights,
            log_evidence=posterior.log_evidence,
            sites=posterior.sites,
            unexplored=unexplored,
            log_evidence_bounds=(posterior.log_evidence, torch.logaddexp(posterior.log_evidence, left_out)),
            log_prior=support.log_joint.to(log_weights.dtype),
        )

    def _rest(self, trace: Trace) -> Tensor | float:
        """An upper bound of the log of everything but the latent sites; 0 if all of it are probabilities."""
        if all(_is_probability(n) for n in programs.scored(trace).values() if n["is_observed"]):
            return 0.0
        return torch.inf if self.factor_bound is None else torch.as_tensor(self.factor_bound)


class Support:
    """The joint values of the latent sites met so far, for every plate element (*cell*), with their prior."""

    def __init__(self, plates: Plates, device: torch.device | None = None):
        self.plates = plates
        self.axes = [1] * plates.nesting
        for d, n in zip(plates.dims, plates.sizes, strict=True):
            self.axes[d] = n
        self.values: dict[str, Tensor] = {}  # (K, *plate axes, *event)
        self.log_probs: dict[str, Tensor] = {}  # (K, *plate axes)
        self.log_joint = torch.zeros(1, *plates.sizes, dtype=torch.float64, device=device)
        self.unexplored = torch.zeros(plates.sizes, dtype=torch.float64, device=device)

    def __len__(self) -> int:
        return len(self.log_joint)

    def extend(self, name: str, fn: Any, allowance: Tensor, max_support: int) -> None:
        """Adds a site: combines every value found so far with each value of the site."""
        site = text_of(fn)
        if site is not None and site.stacked:
            raise ValueError(
                f"site {name!r}: its value is several texts (.to_event), which are joint and too many to enumerate; "
                "give each a site, or use Importance or SMC"
            )
        log_root = self.log_joint.reshape(len(self), -1)  # (K, cells)
        if site is not None and site.stepwise:
            found = explore(site, log_root, allowance.flatten(), max_support)
            event_dim, dtype = 1, dtype_of(site)
        else:
            found = _multiply(name, fn, log_root, allowance.flatten(), max_support)
            event_dim, dtype = fn.event_dim, found[0].log_p.dtype
        sizes = torch.tensor([len(f.root) for f in found], device=log_root.device)
        size, cells = max(int(sizes.max()), 1), len(found)
        row = torch.arange(size, device=log_root.device)[:, None]  # cells with fewer values repeat their first value
        real = row < sizes  # (size, cells)
        filler = torch.where(real, row, 0).unbind(1)
        root, value, log_p, joint = (
            torch.stack([_first_or(x, i) for x, i in zip(column, filler, strict=True)], 1)
            for column in list(zip(*found, strict=True))[:4]
        )  # (size, cells, ...)
        cell = torch.arange(cells, device=root.device)
        for known in (self.values, self.log_probs):
            for other, old in known.items():
                flat = old.reshape(len(old), cells, *old.shape[1 + len(self.axes) :])
                known[other] = flat[root, cell].view(size, *self.axes, *flat.shape[2:])
        self.values[name] = value.view(size, *self.axes, *value.shape[value.dim() - event_dim :])
        self.log_probs[name] = log_p.to(dtype).view(size, *self.axes)
        self.log_joint = joint.masked_fill(~real, -torch.inf).view(size, *self.plates.sizes)
        left_out = torch.tensor([f.left_out for f in found], dtype=torch.float64, device=root.device)
        self.unexplored = self.unexplored + left_out.view(self.plates.sizes)


def _multiply(name: str, fn: Any, log_root: Tensor, allowance: Tensor, max_support: int) -> list[Texts]:
    """Every root combined with every value of a site with a finite support."""
    try:
        if not fn.has_enumerate_support:
            raise NotImplementedError
        support = fn.enumerate_support(expand=False)  # (S, 1, ..., *event)
    except NotImplementedError:
        raise ValueError(
            f"site {name!r}: {type(fn).__name__} has no finite support, so it cannot be enumerated; observe it, "
            "or use Importance or SMC"
        ) from None
    count, cells = len(support), log_root.shape[1]
    event = support.shape[support.dim() - fn.event_dim :]
    log_p = fn.log_prob(support).expand(count, *fn.batch_shape).reshape(count, -1, cells)  # (S, K, cells)
    value = support.expand(count, *fn.batch_shape, *event).reshape(count, -1, cells, *event)
    found = []
    for c in range(cells):
        joint = (log_root[:, c] + log_p[:, :, c].double()).flatten()  # (S * K)
        possible = (joint > -torch.inf).nonzero()[:, 0]
        kept, left_out = most_probable(joint[possible], float(allowance[c]), max_support)
        which, root = possible[kept] // len(log_root), possible[kept] % len(log_root)
        found.append(Texts(root, value[which, root, c], log_p[which, root, c], joint[possible[kept]], left_out))
    return found


def _observed_texts(trace: Trace, plates: Plates, real: Tensor) -> dict[str, Tensor]:
    """log p of observed texts, (K, *plate axes), without the padding, sorted by the prompts' lengths to save work."""
    known: dict[str, Tensor] = {}
    for name, node in programs.scored(trace).items():
        fn, value = node["fn"], node["value"]
        if not node["is_observed"] or type(fn) is not Completion or fn.prompt.shape[:-1] != fn.batch_shape:
            continue
        shape = fn.batch_shape
        cells = torch.arange(real[0].numel(), device=real.device).view(real.shape[1:])
        row_real = plates.spread(real).expand(shape).flatten()
        row_cell = plates.spread(cells[None]).expand(shape).flatten()
        prompt, value = fn.prompt.flatten(0, -2), value.expand(*shape, -1).flatten(0, -2)
        log_prob: Tensor | None = None
        for c in range(real[0].numel()):  # one element at a time: its rows share a prompt
            rows = (row_real & (row_cell == c)).nonzero()[:, 0]
            rows = rows[text.length(prompt[rows]).argsort()]
            if not len(rows):
                continue
            own = fn.rows(rows).log_prob(value[rows])
            log_prob = own.new_full(row_real.shape, -torch.inf) if log_prob is None else log_prob
            log_prob[rows] = own
        if log_prob is not None:
            known[name] = log_prob.view(shape)
    return known


def _first_or(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``; zeros if ``x`` is empty."""
    return x[index] if len(x) else x.new_zeros(len(index), *x.shape[1:])


def _refuse_other_plates(trace: Trace, plates: Plates) -> None:
    for name, node in programs.latents(trace).items():
        for f in node["cond_indep_stack"]:
            if f.vectorized and f.name not in (*plates.names, programs.PARTICLES):
                raise ValueError(
                    f"site {name!r}: it lies in the plate {f.name!r}, which does not enclose every latent, observation "
                    "and factor, so that its values are joint over the plate and too many to enumerate; put every site "
                    "into the plate, or use Importance or SMC"
                )


def _smallest_scale(latents: dict[str, Node], plates: Plates) -> float:
    """min(s) over the latent sites; a masked site has s = 1, because its values follow the prior."""
    smallest = torch.inf
    for node in latents.values():
        s = float(torch.as_tensor(scale(node, plates), dtype=torch.float64).min())
        smallest = min(smallest, s if node["mask"] is None else min(s, 1.0))
    return smallest


def _is_probability(node: Node) -> bool:
    """Whether a site's density is a probability, so at most 1."""
    return not isinstance(node["fn"], Unit) and bool(node["fn"].support.is_discrete)
