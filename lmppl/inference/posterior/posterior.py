"""`Posterior`: weighted particles, the result of every algorithm."""

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
from ..core.impossible import impossible_texts, observed_texts
from ..core.plates import Plates
from ..core.programs import Node, Program
from ..core.query import Query
from ..core.resampling import SCHEMES
from ..core.sites import lm_of, text_of
from ..core.weights import text_log_probs
from .log_weights import ZeroEvidence, effective_sample_size, no_particle, normalised, pareto_khat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

    from .predictive import Prediction, Predictive

__all__ = ["Posterior", "Sites", "ZeroEvidence", "effective_sample_size", "normalised", "pareto_khat"]

Index = int | tuple[int, ...] | None


@dataclass(frozen=True)
class Sites:
    """What a posterior keeps of its program: plates, event dimensions, decoders of texts, and its query."""

    plates: Plates
    event_dims: dict[str, int]
    decoders: dict[str, Callable[[Tensor], Any]] = field(repr=False)
    lms: dict[str, Any] = field(default_factory=dict, repr=False)
    stops: dict[str, list[int | str]] = field(default_factory=dict, repr=False)  # what ends the texts; may be empty
    query: Query | None = field(default=None, repr=False)
    score: Callable[[], dict[str, Tensor]] | None = field(default=None, repr=False)  # see `Posterior.text_log_probs`
    observed: dict[str, Node] = field(default_factory=dict, repr=False)  # texts; kept where all weights are zero
    dependent: bool = False  # particles may be copies of, or descend from, the same one: weights give no error


@dataclass(frozen=True)
class Posterior:
    r"""The result of an algorithm: N particles with unnormalised log weights, which sum to the evidence.

    .. math:: p(z \mid observed) \approx \sum_n w_n \, \delta_{z_n} / \hat Z, \qquad \hat Z = \sum_n w_n

    ``samples[site]`` has the shape (N, *plates, ...) and ``log_weights`` (N, *plates), where the plates are those that
    enclose every latent, observation and factor of the program.  Their elements never mix: evidence, ESS, k-hat and
    resampling are separate for each.  ``log_evidence`` equals ``log_weights.logsumexp(0)`` for an algorithm that
    estimates it, and is NaN for one that does not.  Log-probabilities are natural logarithms.  If all weights are zero,
    ``log_evidence`` is -inf, and `table`, `resample` and `predictive` raise ZeroEvidence.

    Algorithms build it; to build one in an algorithm of your own, use `Posterior.of`.

    :param values: the latent values by site, with the axes of the program: (N, *plate axes, *event).
    :param log_weights: unnormalised log weights, (N, *plates).
    :param log_evidence: the log evidence, (*plates); NaN where it is unknown.
    :param sites: the plates, event dimensions, decoders and query of the program.

    Example::

        posterior = Importance(model, guide, num_particles=256).run(x, y)
        posterior.table("z", index=0)[:5]  # the most probable texts of the first plate element, with probabilities
        posterior.samples["z"]  # token ids, (N, *plates, tokens); posterior.strings("z") decodes them
        posterior.log_evidence, posterior.ess, posterior.khat  # (*plates) each
        posterior.resample(10).strings("z")  # ten equally weighted draws of each plate element
        posterior.save("posterior")
    """

    values: dict[str, Tensor]
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
        """Builds the posterior over the latent sites of a vectorised trace.

        Auxiliary sites of a guide are left out.

        :param trace: a trace with particles on the left of its plates, for instance ``weigh(query, n).guide``.
        :param plates: the kept plates, for instance ``weigh(query, n).plates``.
        :param log_weights: unnormalised log weights, (N, *plates).
        :param query: the model, the guide and their arguments; None: predictions cannot tell which latents to keep.
        :param model: the model's trace, if ``trace`` is that of a guide.
        """
        nodes = {n: node for n, node in programs.latents(trace).items() if not node["infer"].get("is_auxiliary")}
        texts = {name: site for name, node in nodes.items() if (site := text_of(node["fn"])) is not None}
        lms = {name: lm for name, site in texts.items() if (lm := lm_of(site.fn)) is not None}
        log_evidence = log_weights.logsumexp(0)
        sites = Sites(
            plates,
            {name: node["fn"].event_dim for name, node in nodes.items()},
            {name: site.fn.decode for name, site in texts.items()},
            lms,
            {name: site.stop_argument for name, site in texts.items()},
            query,
            None if model is None and query and query.guide else scorer(model or trace, list(texts)),
            observed_texts(model or trace) if bool((log_evidence == -torch.inf).any()) else {},
        )
        return cls({n: node["value"] for n, node in nodes.items()}, log_weights, log_evidence, sites)

    def __repr__(self) -> str:
        """One line: the sites, the number of particles, and the plates."""
        plates = self.sites.plates
        kept = "".join(f", {name or 'plate'} {size}" for name, size in zip(plates.names, plates.sizes, strict=True))
        return f"{type(self).__name__}({', '.join(self.values) or 'no site'}: {self.num_particles} particles{kept})"

    @cached_property
    def samples(self) -> dict[str, Tensor]:
        """The values of each latent site, (N, *plates, ...): token ids padded with -1 for texts."""
        event_dims, plates = self.sites.event_dims, self.sites.plates
        return {name: plates.lead(v, event_dims[name]) for name, v in self.values.items() if name in event_dims}

    @property
    def num_particles(self) -> int:
        """N, the number of particles per plate element."""
        return self.log_weights.shape[0]

    @property
    def guide(self) -> Program | None:
        """The guide that proposed the particles; None if there was none."""
        return None if self.sites.query is None else self.sites.query.guide

    @property
    def probabilities(self) -> Tensor:
        """Normalised weights, (N, *plates).

        :raises ZeroEvidence: if all weights of a plate element are zero.
        """
        return self._normalised()

    def _normalised(self, element: tuple[int, ...] = (), dtype: torch.dtype | None = None) -> Tensor:
        """Normalised weights of one element of the kept plates, (N,); of all elements if it is ()."""
        try:
            return normalised(self.log_weights[all_particles(element)].to(dtype or self.log_weights.dtype))
        except ZeroEvidence:
            plates, zero = self.sites.plates, self.log_weights.amax(0) == -torch.inf
            if element:
                zero = torch.zeros_like(zero)
                zero[element] = True
            names = [name or "plate" for name in plates.names]
            elements = zero.nonzero().tolist()
            where = [" ".join(f"{name} {i}" for name, i in zip(names, at, strict=True)) for at in elements]
            why = impossible_texts(self.sites.observed, plates.spread(zero[None])[0])
            raise ZeroEvidence(no_particle(where, why)) from None

    @property
    def ess(self) -> Tensor:
        r"""The effective sample size :math:`(\sum w)^2 / \sum w^2`, (*plates), between 1 and N.

        It is 0 where all weights are zero.
        """
        return effective_sample_size(self.log_weights)

    @property
    def khat(self) -> Tensor:
        """The Pareto k-hat of the weights' upper tail, (*plates): good below 0.5, usable up to 0.7, unusable above.

        It is NaN for fewer than 50 particles or few distinct weights, and -inf where all weights are equal.  Above 0.7
        the proposal misses mass of the posterior: use a better guide.  Source: Vehtari et al. 2024.
        """
        flat = self.log_weights.reshape(self.num_particles, -1)
        khat = torch.tensor([pareto_khat(w) for w in flat.T], device=flat.device)
        return khat.reshape(self.log_weights.shape[1:])

    def standard_error(self, values: Tensor, index: Index = None) -> Tensor:
        r"""The standard error of the weighted mean of ``values`` (N, ...), a function of the particles, (...).

        .. math:: \sqrt{\sum_n w_n^2 \, (f_n - \bar f)^2}, \qquad \bar f = \sum_n w_n f_n, \qquad \sum_n w_n = 1

        This is the error of self-normalised importance sampling; with equal weights it is that of independent draws.
        It is NaN after `resample`, because particles are then copies of others, and for predictions from such
        particles.  Subclasses have their own estimates.

        :param values: one number, or several, for each particle of one element of the kept plates.
        :param index: the element; None: there is only one.
        :raises ValueError: for values that are not a tensor of N particles.
        :raises ZeroEvidence: if all weights of this element are zero.

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
        weights = self._normalised(element, torch.float64).to(values.device)
        weights = weights.view(-1, *[1] * (values.dim() - 1))
        f = torch.where(weights > 0, values.double(), 0.0)
        return weights * (f - (weights * f).sum(0))

    def summary(self, index: Index = None) -> dict[str, float]:
        """Log evidence, ESS and k-hat of one plate element, by name; figures that are not defined are left out.

        :param index: the element; None: there is only one.
        """
        element = plate_element(index, self.log_weights.shape[1:])
        found = {"log evidence": float(self.log_evidence[element]), "ESS": float(self.ess[element])}
        khat = pareto_khat(self.log_weights[all_particles(element)])
        found |= {"k-hat": khat} if math.isfinite(khat) else {}
        return {name: x for name, x in found.items() if not math.isnan(x)}

    def resample(self, n: int | None = None, scheme: str = "systematic") -> Posterior:
        """Equally weighted particles, drawn in proportion to the weights; each plate element is resampled separately.

        :param n: how many; None: as many as there are.
        :param scheme: "systematic", "stratified", "multinomial" or "residual".
        :raises ZeroEvidence: if all weights of a plate element are zero.
        """
        n = self.num_particles if n is None else n
        at_least(1, n=n)
        one_of(SCHEMES, scheme=scheme)
        return self.take(SCHEMES[scheme](self.probabilities, n))

    def take(self, chosen: Tensor) -> Posterior:
        """The particles of these indices, equally weighted.

        :param chosen: particle indices (n, *plates).
        """
        values = {name: self.sites.plates.take(value, chosen) for name, value in self.values.items()}
        n = len(chosen)
        score, plates = self.sites.score, self.sites.plates
        taken = score and (lambda: {name: plates.take(x, chosen) for name, x in score().items()})
        scale = torch.where(self.log_evidence.isnan(), 0.0, self.log_evidence)  # if undefined, weights sum to 1
        log_weights = (scale - math.log(n)).expand(n, *self.log_evidence.shape)
        return Posterior(values, log_weights, self.log_evidence, replace(self.sites, score=taken, dependent=True))

    @property
    def text_log_probs(self) -> dict[str, Tensor]:
        """The log-probability of each text under the model, given what it depends on, (N, *plates, ...).

        Each call runs the network.  Empty for a posterior from a file, whose model is unknown.
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
        """The distinct values of a site with their posterior probabilities, most probable first.

        Texts are decoded, and texts that decode to the same string are merged.  Numbers are Python numbers.  A value
        with further axes is a tuple of numbers, or of texts joined by " | ".

        :param site: a latent site, or a list of sites: then their joint values, as tuples.
        :param index: an element of the kept plates, an integer or a tuple of one for each; None: there is only one.
            Further integers choose an element of the site's other plates.
        :returns: a list of (value, probability).
        :raises ValueError: for an unknown site, and for an index that names no element of the plates.
        :raises ZeroEvidence: if all weights of this element are zero.

        Example::

            posterior.table("topic", index=3)  # document 3, in a plate that does not enclose the topics' words
        """
        if not isinstance(site, str | list | tuple) or not site:
            raise ValueError(f"site: expected a latent site or a list of them, got {site!r}")
        names = [site] if isinstance(site, str) else list(site)
        element, columns = self._columns(names, index)
        total: dict[Any, float] = {}
        weights = self._normalised(element)
        for key, p in zip(zip(*columns, strict=True), weights.tolist(), strict=True):
            if p > 0:
                total[key] = total.get(key, 0.0) + p
        rows = sorted(total.items(), key=lambda row: -row[1])
        return [(key[0], p) for key, p in rows] if isinstance(site, str) else rows

    def distribution(self, site: str) -> Table:
        """The marginal of one site as a Pyro distribution, for use as a prior in another model.

        Its ``batch_shape`` has the kept plates at their own axes, so use it inside plates of the same sizes.  The
        site's axes along other plates become part of the event.  Samples are drawn in proportion to the weights;
        ``log_prob`` is the log of the total normalised weight of equal values, and -inf for all other values.  The
        marginals of two sites are sampled independently: their dependence is lost.

        :param site: a latent site.
        :returns: a `TextTable` for a text, else a `Table`.
        :raises ZeroEvidence: if all weights of a plate element are zero.

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
        """The decoded texts of all particles, nested lists (N, *plates, ...).

        :param site: a latent text.
        :raises ValueError: for a site that is no text.
        """
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
        """An element of the kept plates, and one of the sites' other plates if ``index`` is longer."""
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
        """The sizes of a site's axes along plates that are not kept; 1 where the site is in no plate."""
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
        """Draws the model's unobserved sites, and scores its observed ones, given latents of this posterior.

        Latents that the new call shares with the run are kept; all others are drawn from the model:

        - A *global* latent, which is in no plate with observations or factors, is kept.
        - A *local* latent is in a plate that also encloses an observation or factor of the run, and belongs to that
          plate's elements.  It is kept if the elements are those of the run: if an argument of the plate's size is
          unchanged, or if the latent's distributions differ between elements, or if the whole call is that of the run
          (apart from the observations, which may be others, or None).  Otherwise it is drawn.
        - Either kind is drawn if its distribution has changed since the run, because it depends on an argument that has
          changed, or on a latent that is drawn.

        If no latent is kept, particles have equal weights.

        :param model: the Pyro program that predicts, usually the posterior's own.
        :param args: the arguments of the model (and of the guide), and ``kwargs``.
        :param sampler: where latents come from.  None: this posterior's particles, as above.  "prior": the model's own
            latent sites, p(z | x).  "guide": the guide, which in training also saw the observation, q(z | x, y).
        :param num_particles: how many particles; with ``sampler=None`` they are resampled from the posterior.  None: as
            many as the posterior has.
        :param keep: the latents to keep in place of the rules above, ``[]`` for none.
        :returns: a `Predictive`: the drawn sites, and the log-probability of each observed site in each particle.
        :raises ValueError: if it is not clear which latents to keep, because some arguments of the plate's size have
            changed and others have not, or because the posterior does not know its run: give ``keep``.
        :raises ZeroEvidence: if all weights are zero.

        Example::

            posterior = Importance(model).run(questions, answers)
            drawn = posterior.predictive(model, other_questions, None)  # new questions, so new latent texts
            drawn.table("y", index=0)  # the answers to the first of them
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
        r"""The probabilities of candidate values of one site, averaged over latents.

        .. math:: p(y_c \mid x) = \sum_n w_n \, p(y_c \mid x, z_n)

        :param model: the Pyro program that predicts, usually the posterior's own.
        :param candidates: C strings (a text's stop token is added), or values (C, ...) whose other axes broadcast with
            the plates and the site's event.
        :param args: the arguments of the model (and of the guide), and ``kwargs``.
        :param site: the site of the candidates.  It may be observed or latent in the model; its value is replaced.
        :param sampler: where latents come from, as in `predictive`.
        :param num_particles: how many particles, as in `predictive`.
        :param keep: the latents to keep, as in `predictive`.  By default the latents of a new question are drawn.
        :returns: a `Prediction` with probabilities, votes and entropies.
        :raises ValueError: for an unknown site, and for candidates that are no values of it.

        Example::

            posterior = Importance(model, num_particles=64).run(x, None)
            posterior.predict(model, ["ab", "c"], x, None, site="y").probabilities  # (candidates, stories)
        """
        from .predictive import predict

        query = Query(model, None, args, kwargs)
        return predict(self, query, candidates, site, sampler, num_particles, keep)

    # -- shown -------------------------------------------------------------------------------------------------------

    def _repr_html_(self) -> str:
        from .html import html

        return html(self)

    def plot(self, site: str | None = None, index: Index = None, ax: Axes | None = None) -> Axes:
        """Plots the posterior of one site, and returns the matplotlib axes.

        Texts and whole numbers are bars, the most probable first, with their `standard_error` if it is known.  Another
        number is a weighted histogram.  Several numbers, as of a Dirichlet, are means with standard deviations.

        :param site: a latent site; None: the first text, or the first site if there is no text.
        :param index: an element of the plates, as in `table`.
        :param ax: the axes to draw into; None: a new figure.

        Example::

            posterior.plot("z", index=0)
        """
        from .plot import draw

        return draw(self, site, index, ax)

    def to_pandas(self) -> DataFrame:
        """A ``pandas.DataFrame`` with a row for each particle of each element of the kept plates.

        The columns are:

        - one for each kept plate, with the number of the element;
        - ``particle``, or ``chain`` and ``draw`` for Markov chains;
        - one for each site, with strings for texts; a site with further axes has a column for each entry, such as
          ``w[0]`` or ``w[1, 2]``;
        - ``weight``, normalised in each plate element (NaN if all are zero), and ``log_weight``.

        A plate or site with the name of another column gets the ending ``_plate`` or ``_site``.

        Example::

            table = posterior.to_pandas()
            table.groupby(["stories", "z"]).weight.sum()  # the posterior probability of each text
        """
        from .export import to_pandas

        return to_pandas(self)

    # -- elsewhere ---------------------------------------------------------------------------------------------------

    def to_arviz(self) -> Any:
        """An ``arviz.InferenceData`` of equally weighted draws, with the plates as dimensions.

        Numbers are as they are in the posterior.  A text z has the variables ``length(z)``, in tokens with its stop,
        and ``log_prob(z)``; its strings are in the group ``texts``.  ``sample_stats`` has the log weights.
        """
        from .export import to_arviz

        return to_arviz(self)

    def save(self, path: str | Path) -> None:
        """Writes the posterior into a directory: tensors as safetensors, the rest and all decoded texts as JSON.

        The directory is written completely or not at all.  Programs (model and guide) are not saved, and neither is the
        ancestry of SMC particles.

        :param path: the directory.
        """
        from .files import save

        is_path(path=path)
        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, lm: Any = None) -> Self:
        """Reads a saved posterior of this class or of a subclass.

        :param path: the directory that `save` wrote.
        :param lm: the language model that decodes texts; None: they are looked up among the decoded texts in the file.
        :raises ValueError: if there is no saved posterior at ``path``, or a damaged one.
        """
        from .files import load

        is_path(path=path)
        return load(cls, Path(path), lm)


def scorer(trace: Trace, names: list[str]) -> Callable[[], dict[str, Tensor]]:
    """A function that computes log p of a trace's text sites, (N, *plate axes) each."""
    nodes = {name: trace.nodes[name] for name in names if name in trace.nodes}

    def log_probs() -> dict[str, Tensor]:
        known = text_log_probs(nodes)
        return {n: known[n] if n in known else node["fn"].log_prob(node["value"]) for n, node in nodes.items()}

    return log_probs


def _leaves(nested: Any) -> list[str]:
    return [nested] if isinstance(nested, str) else [leaf for part in nested for leaf in _leaves(part)]


def _hashable(nested: Any) -> Any:
    return tuple(map(_hashable, nested)) if isinstance(nested, list) else nested
