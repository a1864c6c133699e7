"""A posterior as an ``arviz.InferenceData``, and as a ``pandas.DataFrame``."""

from __future__ import annotations

import warnings
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ... import text
from ..core.resampling import systematic

if TYPE_CHECKING:
    from pandas import DataFrame

    from .posterior import Posterior

OWN = ("chain", "draw")  # names of arviz's dimensions
TEXTS = 10  # how many are named


def to_arviz(posterior: Posterior) -> Any:
    """N equally weighted draws with plates as named dimensions, for `arviz.summary`, `arviz.plot_trace` and the like.

    - ``posterior``: the sites that are numbers; for a text z its ``length(z)``, in tokens with its stop;
      ``log_prob(z)``, the log-probability under the model (missing for a posterior from a file); and ``one_hot(z)``,
      whose coordinate ``z_text`` names the 10 most frequent texts: 1 in the draws that are that text, so that its mean
      is the text's probability.
    - ``texts``: the texts as strings.
    - ``sample_stats``: ``log_weight``, the log weight of the particle that a draw copies; ``lp``, the log joint of
      Markov chains.
    - ``constant_data``: ``log_evidence``.

    Dimensions are (chain, draw, *plates, ...); a plate of the name "chain" or "draw" becomes "chain_plate" or
    "draw_plate"; a number whose site has the name of another variable or dimension gets the ending "_site".  The chains
    of `MarkovChains` stay separate, with their draws unchanged.  Every other posterior is one chain; its particles are
    first resampled (systematically) if their weights differ.  Draws copied from one particle are not independent: use
    `Posterior.ess`, not arviz's ESS of them.
    """
    import arviz

    n, log_weights, chains = posterior.num_particles, posterior.log_weights, getattr(posterior, "num_chains", None)
    if chains is None and not torch.allclose(weights := posterior.probabilities, torch.full_like(weights, 1 / n), 1e-4):
        chosen = systematic(weights)
        posterior, log_weights = posterior.take(chosen), log_weights.gather(0, chosen)
    chains = chains or 1
    plates = [f"{name}_plate" if name in OWN else name for name in posterior.sites.plates.names]

    def by_chain(x: Tensor) -> Any:
        return x.detach().cpu().unflatten(0, (chains, n // chains)).numpy()

    numbers: dict[str, Tensor] = {}
    texts, named, one_hot = {}, {}, {}
    own = ("length({})", "log_prob({})", "one_hot({})", "{}_text")
    taken = {*OWN, *(name.format(site) for site in posterior.sites.decoders for name in own)}
    for site, value in posterior.samples.items():
        if site not in posterior.sites.decoders:
            numbers[_free(site, taken, "site")] = value
            continue
        numbers[f"length({site})"] = text.length(value)
        strings = np.array(posterior.strings(site), dtype=object)  # numpy's own strings lose a NUL at the end
        texts[site] = strings.reshape(chains, n // chains, *strings.shape[1:])
        distinct, counts = np.unique(strings, return_counts=True)
        named[f"{site}_text"] = distinct[np.argsort(-counts, kind="stable")[:TEXTS]]
        one_hot[f"one_hot({site})"] = (texts[site][..., None] == named[f"{site}_text"]).astype(np.int64)
    shape, scores = log_weights.shape, posterior.text_log_probs  # each of several processes has only its own part
    numbers |= {f"log_prob({site})": x for site, x in scores.items() if x.shape[: log_weights.dim()] == shape}
    statistics = {"log_weight": log_weights}
    if (log_joint := getattr(posterior, "log_joint", None)) is not None:
        statistics["lp"] = log_joint.flatten(0, 1)
    groups = {
        "posterior": {name: by_chain(x) for name, x in numbers.items()} | one_hot,
        "sample_stats": {name: by_chain(x) for name, x in statistics.items()},
        "constant_data": {"log_evidence": posterior.log_evidence.cpu().numpy()},
    }
    dims = {name: plates for variables in (*groups.values(), texts) for name in variables}
    for site, strings in texts.items():
        others = [f"{site}_dim_{i}" for i in range(strings.ndim - 2 - len(plates))]
        dims[site] = [*plates, *others]
        dims[f"one_hot({site})"] = [*plates, *others, f"{site}_text"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about more chains than draws, and the group "texts"
        data = arviz.from_dict(**groups, dims=dims, coords=named)
        if texts:
            data.add_groups({"texts": texts}, dims=dims)
    return data


def to_pandas(posterior: Posterior) -> DataFrame:
    """See `Posterior.to_pandas`."""
    import pandas  # slow to import, and only needed here

    sizes, chains = posterior.log_weights.shape, getattr(posterior, "num_chains", None)
    number = torch.arange(sizes[0])
    if chains is None:
        own = {"particle": number}
    else:
        own = {"chain": number // (sizes[0] // chains), "draw": number % (sizes[0] // chains)}
    taken = {*own, "weight", "log_weight"}
    plates = posterior.sites.plates.names
    axes = dict(zip((_free(name or "plate", taken, "plate") for name in plates), range(1, len(sizes)), strict=True))
    columns = {
        name: torch.arange(sizes[axis]).view(-1, *[1] * (len(sizes) - 1 - axis)).expand(sizes)
        for name, axis in axes.items()
    }
    columns |= {name: x.view(-1, *[1] * (len(sizes) - 1)).expand(sizes) for name, x in own.items()}
    found = {name: _flat(x, sizes) for name, x in columns.items()}
    taken |= set(axes)
    for site, value in posterior.samples.items():
        x: Any = np.array(posterior.strings(site), dtype=object) if site in posterior.sites.decoders else _numpy(value)
        name = _free(site, taken, "site")
        for entry in product(*map(range, x.shape[len(sizes) :])):
            label = f"{name}[{', '.join(map(str, entry))}]" if entry else name
            found[label] = _flat(x[..., *entry], sizes)
    found["weight"] = _flat(posterior.log_weights.double().softmax(0), sizes)
    found["log_weight"] = _flat(posterior.log_weights, sizes)
    frame = pandas.DataFrame(found)
    log_prior = getattr(posterior, "log_prior", None)  # only of an enumeration; -inf at padding
    return frame if log_prior is None else frame[_flat(log_prior, sizes) > -np.inf].reset_index(drop=True)


def _free(name: str, taken: set[str], kind: str) -> str:
    return f"{name}_{kind}" if name in taken else name


def _numpy(x: Any) -> Any:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else x


def _flat(x: Any, sizes: torch.Size) -> Any:
    """(N, *plates) as one column, ordered by plate element, then by particle."""
    return np.moveaxis(_numpy(x).reshape(sizes), 0, -1).reshape(-1)
