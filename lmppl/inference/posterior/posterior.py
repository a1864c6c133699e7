"""`Posterior`: weighted particles, what every algorithm answers with."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import torch
from pyro.poutine import Trace
from torch import Tensor

from ...distributions import Table
from ..core import programs
from ..core.arguments import all_particles, at_least, is_path, one_of, plate_element
from ..core.plates import Plates
from ..core.programs import Program
from ..core.query import Query
from ..core.resampling import SCHEMES
from ..core.sites import lm_of, text_of
from ..core.weights import text_log_probs
from .log_weights import ZeroEvidence, effective_sample_size, normalised, pareto_khat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

    from .predictive import Prediction, Predictive

__all__ = ["Posterior", "Sites", "ZeroEvidence", "effective_sample_size", "normalised", "pareto_khat"]

Index = int | tuple[int, ...] | None


@dataclass(frozen=True)
class Sites:
    """What a posterior remembers of its program: plates, event dimensions, how texts are decoded, and its query."""

    plates: Plates
    event_dims: dict[str, int]
    decoders: dict[str, Callable[[Tensor], Any]] = field(repr=False)
    lms: dict[str, Any] = field(default_factory=dict, repr=False)
    stops: dict[str, list[int | str]] = field(default_factory=dict, repr=False)  # what ends texts, perhaps nothing
    query: Query | None = field(default=None, repr=False)
    score: Callable[[], dict[str, Tensor]] | None = field(default=None, repr=False)  # see `Posterior.text_log_probs`
    dependent: bool = False  # particles descend from, or are copies of, one another: their weights tell no error


@dataclass(frozen=True)
class Posterior:
    r"""Particles with unnormalised log weights that carry the evidence.

    ``samples[site]`` has shape (N, *plates, ...), ``log_weights`` (N, *plates), and
    ``log_weights.logsumexp(0) == log_evidence`` wherever an algorithm estimates it (NaN where it does not).  One data
    point's particles never mix with another's: evidence, ESS, k-hat and resampling are per plate element.

    Example::

        posterior = Importance(model, guide, num_particles=256).run(x, y)
        posterior.table("z", index=0)[:5]  # the most probable texts of the first plate element
    """

    values: dict[str, Tensor]  # as the program saw them: (N, *plate axes, *event)
    log_weights: Tensor
    log_evidence: Tensor
    sites: Sites

    @classmethod
    def of(
        cls,
        trace: Trace,
        plates: Plates,
        log_weights: Tensor,
        query: Query | None = None,
        model: Trace | None = None,
    ) -> Posterior:
        """A posterior over the latent sites of a vectorised trace, under log weights (N, *plates).

        Auxiliary sites are left out: summed over, they are no part of it.

        :param query: what was asked; without it a prediction cannot tell which latents are the run's own.
        :param model: the model's trace, where the first one is that of a guide.
        """
        nodes = {n: node for n, node in programs.latents(trace).items() if not node["infer"].get("is_auxiliary")}
        texts = {name: site for name, node in nodes.items() if (site := text_of(node["fn"])) is not None}
        lms = {name: lm for name, site in texts.items() if (lm := lm_of(site.fn)) is not None}
        sites = Sites(
            plates,
            {name: node["fn"].event_dim for name, node in nodes.items()},
            {name: site.fn.decode for name, site in texts.items()},
            lms,
            {name: site.stop_argument for name, site in texts.items()},
            query,
            None if model is None and query and query.guide else scorer(model or trace, list(texts)),
        )
        return cls({n: node["value"] for n, node in nodes.items()}, log_weights, log_weights.logsumexp(0), sites)

    def __repr__(self) -> str:
        """One line: the sites, and how many particles of which plates."""
        plates = self.sites.plates
        kept = "".join(f", {name or 'plate'} {size}" for name, size in zip(plates.names, plates.sizes, strict=True))
        return f"{type(self).__name__}({', '.join(self.values) or 'no site'}: {self.num_particles} particles{kept})"

    @cached_property
    def samples(self) -> dict[str, Tensor]:
        """Each latent site's values, (N, *plates, ...)."""
        event_dims, plates = self.sites.event_dims, self.sites.plates
        return {name: plates.lead(v, event_dims[name]) for name, v in self.values.items() if name in event_dims}

    @property
    def num_particles(self) -> int:
        return self.log_weights.shape[0]

    @property
    def guide(self) -> Program | None:
        """The guide that was asked, if any."""
        return None if self.sites.query is None else self.sites.query.guide

    @property
    def probabilities(self) -> Tensor:
        """Normalised weights (N, *plates). Raises ZeroEvidence where a plate element's weights are all zero."""
        return normalised(self.log_weights)

    @property
    def ess(self) -> Tensor:
        r"""Effective sample size :math:`(\sum w)^2 / \sum w^2`, (*plates); 0 where all weights are zero."""
        return effective_sample_size(self.log_weights)

    @property
    def khat(self) -> Tensor:
        """Pareto k-hat of the weights' upper tail, (*plates): below 0.5 good, up to 0.7 usable, above not.

        NaN with fewer than 50 particles.  What it means: `log_weights.pareto_khat`.
        """
        flat = self.log_weights.reshape(self.num_particles, -1)
        khat = torch.tensor([pareto_khat(w) for w in flat.T], device=flat.device)
        return khat.reshape(self.log_weights.shape[1:])

    def standard_error(self, values: Tensor, index: Index = None) -> Tensor:
        r"""The standard error of the weighted mean of ``values`` (N, ...), a function of the particles, (...).

        .. math:: \sqrt{\sum_n w_n^2 \, (f_n - \bar f)^2}, \qquad \bar f = \sum_n w_n f_n, \qquad \sum_n w_n = 1

        It is that of self-normalised importance sampling, with equal weights that of independent draws.  NaN where the
        particles are copies of others, after `resample`.  Subclasses say how they estimate theirs.

        :param values: one number, or several, of each particle of one element of the kept plates.
        :param index: which element, needed where there is more than one.

        Source: Owen 2013, Monte Carlo theory, methods and examples, eq. 9.9.

        Example::

            long = (text.length(posterior.samples["z"][:, 0]) > 1).double()
            posterior.standard_error(long, index=0)  # of the probability that the first text has more than one token
        """
        deviations = self._deviations(values, index)
        error = deviations.square().sum(0).sqrt()
        return torch.full_like(error, torch.nan) if self.sites.dependent else error

    def _deviations(self, values: Tensor, index: Index) -> Tensor:
        """w_n (f_n - mean f) of ``values`` (N, ...) in one plate element, zero at particles of weight zero."""
        if not isinstance(values, Tensor) or not values.dim() or len(values) != self.num_particles:
            raise ValueError(f"values: expected a tensor of {self.num_particles} particles, got {values!r}")
        element = plate_element(index, self.log_weights.shape[1:])
        weights = normalised(self.log_weights[all_particles(element)]).double().to(values.device)
        weights = weights.view(-1, *[1] * (values.dim() - 1))
        f = torch.where(weights > 0, values.double(), 0.0)
        return weights * (f - (weights * f).sum(0))

    def summary(self, index: Index = None) -> dict[str, float]:
        """What says how good the particles of one plate element are, by name; what is not defined is left out."""
        element = plate_element(index, self.log_weights.shape[1:])
        found = {"log evidence": float(self.log_evidence[element]), "ESS": float(self.ess[element])}
        khat = pareto_khat(self.log_weights[all_particles(element)])
        found |= {"k-hat": khat} if math.isfinite(khat) else {}
        return {name: x for name, x in found.items() if not math.isnan(x)}

    def resample(self, n: int | None = None, scheme: str = "systematic") -> Posterior:
        """``n`` equally weighted particles, each plate element resampled by itself; ``scheme`` as in `resampling`."""
        n = self.num_particles if n is None else n
        at_least(1, n=n)
        one_of(SCHEMES, scheme=scheme)
        return self.take(SCHEMES[scheme](self.probabilities, n))

    def take(self, chosen: Tensor) -> Posterior:
        """Particles ``chosen`` (n, *plates), equally weighted."""
        values = {name: self.sites.plates.take(value, chosen) for name, value in self.values.items()}
        n = len(chosen)
        score, plates = self.sites.score, self.sites.plates
        taken = score and (lambda: {name: plates.take(x, chosen) for name, x in score().items()})
        scale = torch.where(self.log_evidence.isnan(), 0.0, self.log_evidence)  # where undefined, weights just sum to 1
        log_weights = (scale - math.log(n)).expand(n, *self.log_evidence.shape)
        return Posterior(values, log_weights, self.log_evidence, replace(self.sites, score=taken, dependent=True))

    @property
    def text_log_probs(self) -> dict[str, Tensor]:
        """log p of each text under the model, given what it depends on, (N, *plates, ...); the network reads it anew.

        Empty where nothing is known of the model: for a posterior from a file.
        """
        with torch.no_grad():
            found = {} if self.sites.score is None else self.sites.score()
        return {name: self.sites.plates.lead(x, 0) for name, x in found.items()}

    # -- marginals ---------------------------------------------------------------------------------------------------

    @overload
    def table(self, site: str, index: Index = None) -> list[tuple[Any, float]]: ...

    @overload
    def table(self, site: list[str], index: Index = None) -> list[tuple[tuple[Any, ...], float]]: ...

    def table(self, site: str | list[str], index: Index = None) -> Any:
        """Distinct values of a site with their posterior probabilities, most probable first.

        Texts are decoded, numbers are numbers, and what has further axes is a tuple (of texts: joined by " | ").
        ``site`` may be several sites: then their joint values, as tuples.  ``index`` picks an element of the kept
        plates, needed where there is more than one, and behind it, where wanted, one of the site's other plates.

        Example::

            posterior.table("topic", index=3)  # of document 3, in a plate that does not enclose the topics' words
        """
        if not isinstance(site, str | list | tuple) or not site:
            raise ValueError(f"site: expected a latent site or a list of them, got {site!r}")
        names = [site] if isinstance(site, str) else list(site)
        element, columns = self._columns(names, index)
        total: dict[Any, float] = {}
        weights = normalised(self.log_weights[all_particles(element)])
        for key, p in zip(zip(*columns, strict=True), weights.tolist(), strict=True):
            if p > 0:
                total[key] = total.get(key, 0.0) + p
        rows = sorted(total.items(), key=lambda row: -row[1])
        return [(key[0], p) for key, p in rows] if isinstance(site, str) else rows

    def distribution(self, site: str) -> Table:
        """The marginal of one site as a Pyro distribution, for use as a prior in another model.

        ``batch_shape`` has the kept plates at their own axes, so that it belongs under plates of the same sizes; a text
        site gives a `TextTable`, and what the site has along other plates becomes part of the event.  Samples are draws
        in proportion to the weights, ``log_prob`` is the log of the total weight of equal values, -inf elsewhere.  The
        marginals of two sites are independent of each other when sampled: what ties them together is lost.

        Example::

            inner = Enumeration(author).run(x)

            def reader():
                with pyro.plate("stories", len(x)):
                    z = pyro.sample("z", inner.distribution("z"))
        """
        from .nested import marginal

        self._checked(site)
        return marginal(self, site)

    def strings(self, site: str) -> Any:
        """A text site's particles decoded, nested lists (N, *plates, ...)."""
        if self._checked(site) is not None and site not in self.sites.decoders:
            raise ValueError(f"site: {site!r} is no text")
        return self.sites.decoders[site](self.samples[site])

    def _checked(self, site: str) -> Tensor:
        if not isinstance(site, str) or site not in self.samples:
            raise ValueError(f"site: {site!r} is none of the latent sites {list(self.samples)}")
        return self.samples[site]

    def _columns(self, names: list[str], index: Index) -> tuple[tuple[int, ...], list[list[Any]]]:
        """The element of the kept plates that ``index`` picks, and each site's N values there."""
        element, within = self._element(index, names)
        return element, [self._entries(name, self._checked(name)[all_particles(element)], within) for name in names]

    def _element(self, index: Index, names: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """An element of the kept plates, and one of the sites' other plates where ``index`` goes on."""
        kept = self.log_weights.shape[1:]
        given: tuple[Any, ...] = tuple(index) if isinstance(index, tuple | list) else (index,)
        beyond = len(given) - len(kept)
        if index is None or beyond <= 0:
            return plate_element(index, kept), ()
        others = {sizes for sizes in map(self._other_plates, names) if sizes.numel() > 1}
        if len(others) > 1:
            raise ValueError(f"index: the sites {list(names)} lie in plates of different sizes; ask for one of them")
        axes = others.pop() if others else self._other_plates(names[0])
        large = torch.Size(n for n in axes if n > 1)
        sizes = large if beyond <= len(large) else axes[-beyond:]
        element = plate_element(index, kept + sizes)[len(kept) :]
        return given[: len(kept)], tuple(i for i, n in zip(element, sizes, strict=True) if n > 1)

    def _other_plates(self, site: str) -> torch.Size:
        """The sizes of the axes of a site that belong to plates and are not kept, 1 where the site is in none."""
        self._checked(site)
        plates, axes = self.sites.plates, self.values[site].shape[1:]
        return torch.Size(axes[plates.nesting + d] for d in range(-plates.nesting, 0) if d not in plates.dims)

    def _entries(self, site: str, value: Tensor, within: tuple[int, ...]) -> list[Any]:
        """A site's values (N, *other plates, *event) for a table: strings, numbers, tuples of numbers."""
        if self._other_plates(site).numel() > 1:
            at: tuple[Any, ...] = (slice(None), *within)
            value = value[at]
        if site not in self.sites.decoders:
            return [_hashable(v) for v in value.tolist()]
        strings = self.sites.decoders[site](value)
        return [s if isinstance(s, str) else " | ".join(_leaves(s)) for s in strings]

    # -- prediction --------------------------------------------------------------------------------------------------

    def predictive(
        self,
        model: Program,
        *args: Any,
        sampler: str | None = None,
        num_particles: int | None = None,
        keep: Collection[str] | None = None,
        **kwargs: Any,
    ) -> Predictive:
        """What the model says of its other sites when its latents come from ``sampler``.

        ``None``: this posterior's particles, with their weights, or ``num_particles`` resampled from them where that is
        given; "prior": the model's own latent sites, p(z | x); "guide": the guide.  The guide of training saw the
        observation, q(z | x, y); prediction has none, so the two differ: both can be asked for.  ``args`` go to the
        model (and to the guide).  Observed sites keep their log-probability under every particle.

        Of this posterior's latents those are kept that the new call shares with the run, the others are drawn anew:

        - A *global* latent, beside which no plate has observations, is kept.
        - A *local* one, in a plate that also encloses an observation or factor of the run, belongs to that plate's
          elements.  It is kept if the elements are the run's own: an argument of the plate's size is as it was in the
          run, or the latent's distributions tell the elements apart, or the whole call is the run's (the observations
          may be others, or None).  Else it is drawn anew.
        - Either kind is drawn anew where its distribution is no longer what it was in the run: it depends on an
          argument that has changed, or on a latent that is drawn anew.

        Where nothing is kept, particles have equal weights.  ``keep`` names the latents to keep instead, ``[]`` for
        none.  Raises ValueError where the default is not clear: some arguments of the plate's size are as they were
        and others are not, or the posterior does not know its run.

        Example::

            posterior = Importance(model).run(questions, answers)
            posterior.predictive(model, other_questions, None)  # an instruction is kept, reasonings are new
        """
        from .predictive import predictive

        return predictive(self, Query(model, None, args, kwargs), sampler, num_particles, keep)

    def predict(
        self,
        model: Program,
        candidates: Tensor | Sequence[str],
        *args: Any,
        site: str = "y",
        sampler: str | None = None,
        num_particles: int | None = None,
        keep: Collection[str] | None = None,
        **kwargs: Any,
    ) -> Prediction:
        r"""The probabilities of candidate values of one site, averaged over latents, and the vote of the particles.

        .. math:: p(y_c \mid x) = \sum_n w_n \, p(y_c \mid x, z_n)

        :param candidates: C strings (a text's stop is added), or values (C, ...) whose other axes broadcast with the
            plates and the site's event.
        :param site: the site they are values of, observed in the model or not; what it was given there is replaced.

        ``sampler``, ``num_particles`` and ``keep`` as in `predictive`: a new question's latents are drawn anew.
        """
        from .predictive import predict

        query = Query(model, None, args, kwargs)
        return predict(self, query, candidates, site, sampler, num_particles, keep)

    # -- shown -------------------------------------------------------------------------------------------------------

    def _repr_html_(self) -> str:
        from .html import html

        return html(self)

    def plot(self, site: str | None = None, index: Index = None, ax: Axes | None = None) -> Axes:
        """Draw what is probable of one site, and return the matplotlib axes.

        Texts and whole numbers: bars, the most probable first, with `standard_error` where it is known.  Other numbers:
        a weighted histogram; several of them, as of a Dirichlet: means, with standard deviations.

        :param site: None: the first text, or the first site where there is none.
        :param index: as in `table`.
        :param ax: where to draw; None: a new figure.

        Example::

            posterior.plot("z", index=0)
        """
        from .plot import draw

        return draw(self, site, index, ax)

    def to_pandas(self) -> DataFrame:
        """A ``pandas.DataFrame`` with a row for each particle of each element of the kept plates.

        Its columns: one for each kept plate, with the number of the element; ``particle`` (of Markov chains ``chain``
        and ``draw``); one for each site, texts as strings, numbers as numbers, of a site with further axes one for each
        entry: ``w[0]``, ``w[1, 2]``; ``weight``, normalised in each plate element (NaN where all are zero), and
        ``log_weight``.  A site or plate of one of these names gets ``_site`` or ``_plate`` behind its own.

        Example::

            table = posterior.to_pandas()
            table.groupby(["stories", "z"]).weight.sum()  # the posterior probability of each text
        """
        from .export import to_pandas

        return to_pandas(self)

    # -- elsewhere ---------------------------------------------------------------------------------------------------

    def to_arviz(self) -> Any:
        """An ``arviz.InferenceData`` of equally weighted draws: numbers, and numbers about texts; `export.to_arviz`."""
        from .export import to_arviz

        return to_arviz(self)

    def save(self, path: str | Path) -> None:
        """Write a directory, whole or not at all: tensors as safetensors, the rest and all decoded texts as JSON.

        The guide is a program and is not saved, nor a particle ancestry.
        """
        from .files import save

        is_path(path=path)
        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, lm: Any = None) -> Self:
        """A saved posterior of this class or a subclass of it.

        ``lm`` decodes its texts; without one they are looked up among those that were saved.  Raises ValueError where
        ``path`` holds no saved posterior, or a damaged one.
        """
        from .files import load

        is_path(path=path)
        return load(cls, Path(path), lm)


def scorer(trace: Trace, names: list[str]) -> Callable[[], dict[str, Tensor]]:
    """What scores a trace's text sites when it is asked to, (N, *plate axes) each."""
    nodes = {name: trace.nodes[name] for name in names if name in trace.nodes}

    def log_probs() -> dict[str, Tensor]:
        known = text_log_probs(nodes)
        return {n: known[n] if n in known else node["fn"].log_prob(node["value"]) for n, node in nodes.items()}

    return log_probs


def _leaves(nested: Any) -> list[str]:
    return [nested] if isinstance(nested, str) else [leaf for part in nested for leaf in _leaves(part)]


def _hashable(nested: Any) -> Any:
    return tuple(map(_hashable, nested)) if isinstance(nested, list) else nested
