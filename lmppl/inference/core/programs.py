"""Runs a Pyro program with axes on its left: particles, and left of them the prefixes of one text.

A vectorised run gives every site the shape (prefix, particle, *plates).  The program's own plates keep their axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ... import randomness, text
from ...stop_strings import Ending
from .arguments import at_least
from .explained import PARTICLES, PREFIXES, check_shapes, explained, refuse_own_names
from .python_values import no_python_values
from .sites import Site, innermost, lm_of, text_of, unmasked

Program = Callable[..., Any]
Node = dict[str, Any]
Values = dict[str, Tensor]
Temper = Callable[[Site], TorchDistribution]
MOST_AXES = 60


class SiteMismatch(ValueError):
    """Raised where model and guide do not fit together: a site is missing, observed, or comes in another order.

    It is a ValueError.  The message names the site and says what is wrong with it.

    Example::

        def other(x, y=None):
            with pyro.plate("stories", len(x)):
                pyro.sample("w", Completion(q, x, max_tokens=1))

        try:
            Importance(model, other).run(x, y)
        except SiteMismatch as error:
            print(error)  # guide: it samples 'w', but the model has no such site; ...
    """


class Substitute(Messenger):
    """Gives latent sites and subsamples the values of a dict; the rest of their messages is unchanged.

    ``drawn`` is the trace that the values are from, if there is one: its sites must have as many event axes.
    """

    def __init__(self, values: Mapping[str, Tensor], drawn: Trace | None = None):
        super().__init__()
        self.values, self.drawn = values, Trace() if drawn is None else drawn

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            if msg["name"] in self.drawn.nodes and not site_is_subsample(msg):
                _same_event(msg["name"], msg["fn"], self.drawn.nodes[msg["name"]]["fn"])
            msg["value"], msg["done"] = self.values[msg["name"]], True


def _same_event(name: str, model: Any, guide: Any) -> None:
    """Raises SiteMismatch if a value of the guide's distribution has other axes than one of the model's."""
    if model.event_dim != guide.event_dim:
        kinds = [f"{type(innermost(fn)).__name__} with {fn.event_dim} event axes" for fn in (guide, model)]
        raise SiteMismatch(
            f"guide: the site {name!r} is a {kinds[0]}, the model's a {kinds[1]}; give both the same form"
        )


class Draw(Messenger):
    """Draws latent sites, and keeps in ``log_probs`` the log-probabilities that drawing a text computes anyway.

    ``explore`` may replace a text site's distribution by a broader one; then ``log_probs`` stays empty.
    """

    def __init__(self, explore: Temper | None = None):
        super().__init__()
        self.explore = explore
        self.log_probs: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or site_is_subsample(msg):
            return
        site = text_of(msg["fn"])
        if site is None:
            if randomness.part() is None:
                return
            with randomness.apart():
                msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
        elif self.explore is None:
            msg["value"], log_prob = site.draw()
            self.log_probs[msg["name"]] = site.lift(log_prob)
        else:
            msg["value"] = site.draw_from(self.explore(site))
        msg["done"] = True


class Sketch(Messenger):
    """Gives every text site a placeholder of the right shape, to find a program's shapes without a network."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["done"] and not msg["is_observed"] and (site := text_of(msg["fn"])) is not None:
            msg["value"], msg["done"] = site.placeholder(), True


class Unmasked(Messenger):
    """Turns the masks around a site's distribution into masks of the site, like those of `pyro.poutine.mask`."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"], mask = unmasked(msg["fn"])
        if mask is not None:
            msg["mask"] = mask if msg["mask"] is None else mask & msg["mask"]


def trace(
    program: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *handlers: Messenger,
    nesting: int,
    particles: int,
    prefixes: int | None = None,
) -> Trace:
    """One run of ``program`` with ``particles`` (and ``prefixes``) on the left of its ``nesting`` plate axes.

    The sites are hidden from handlers outside, such as another program's plates or traces; parameters are not hidden.

    :raises ValueError: for a program whose shapes show that it is not written for these axes.
    """
    with ExitStack() as stack:
        stack.enter_context(explained())
        stack.enter_context(_apart())
        for handler in handlers:
            stack.enter_context(handler)
        stack.enter_context(Unmasked())
        if prefixes is not None:
            stack.enter_context(pyro.plate(PREFIXES, prefixes, dim=-2 - nesting))
        stack.enter_context(pyro.plate(PARTICLES, particles, dim=-1 - nesting))
        stack.enter_context(no_python_values())
        found: Trace = poutine.trace(program).get_trace(*args, **kwargs)
    refuse_own_names(found)
    check_shapes(found, nesting, particles, prefixes)
    return found


@contextmanager
def _apart() -> Iterator[None]:
    """Hides sites from the handlers outside, and the plates outside from the choice of axes; not parameters."""
    occupied = list(_DIM_ALLOCATOR._stack)
    _DIM_ALLOCATOR._stack.clear()
    try:
        with poutine.block(hide_fn=lambda msg: msg["type"] == "sample"):
            yield
    finally:
        _DIM_ALLOCATOR._stack[:] = occupied


def latents(trace: Trace) -> dict[str, Node]:
    """The unobserved sample sites in program order, without subsamples."""
    return {n: s for n, s in _samples(trace) if not s["is_observed"] and not site_is_subsample(s)}


def scored(trace: Trace) -> dict[str, Node]:
    """Every site with a density: latents, observations and factors, without subsamples and deterministic values."""
    return {
        n: s for n, s in _samples(trace) if not site_is_subsample(s) and not s["infer"].get("_deterministic", False)
    }


def values(trace: Trace) -> Values:
    """The values that a replay needs: those of latents and subsamples."""
    return {n: s["value"] for n, s in _samples(trace) if not s["is_observed"]}


def _samples(trace: Trace) -> list[tuple[str, Node]]:
    own = (PARTICLES, PREFIXES)
    return [(n, s) for n, s in trace.nodes.items() if s["type"] == "sample" and n not in own]


def match(model: Trace, guide: Trace) -> None:
    """Raises SiteMismatch unless model and guide have the same latent sites, apart from the guide's auxiliary ones."""
    in_model, in_guide = latents(model), latents(guide)
    for name, node in in_guide.items():
        if node["infer"].get("is_auxiliary") or name in in_model:
            continue
        observed = name in model.nodes and model.nodes[name]["is_observed"]
        why = "observes that site" if observed else f"has no such site; its latent sites are {list(in_model)}"
        raise SiteMismatch(f"guide: it samples {name!r}, but the model {why}")
    for name, node in in_model.items():
        if name not in in_guide:
            raise SiteMismatch(f"guide: it does not sample {name!r}, a latent site of the model")
        around = {f.dim for f in in_guide[name]["cond_indep_stack"]}
        for f in node["cond_indep_stack"]:
            if f.vectorized and f.dim not in around and f.size > 1:
                raise SiteMismatch(
                    f"guide: it samples {name!r} outside any plate at axis {f.dim}, where the model has the plate "
                    f"{f.name!r} around it; put the site into the same plate"
                )


def sketches(programs: list[Program], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Trace]:
    """One run of each program with placeholders for texts, each with the values drawn by the programs before it.

    No network runs, and the random state is unchanged.
    """
    found, known, drawn = [], dict[str, Tensor](), Trace()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for program in programs:
            with (
                explained(),
                _apart(),
                Sketch(),
                Substitute(known, drawn),
                Unmasked(),
                no_python_values(),
            ):
                found.append(poutine.trace(program).get_trace(*args, **kwargs))
            refuse_own_names(found[-1])
            known |= values(found[-1])
            drawn = found[-1]
    return found


def language_models(trace: Trace) -> dict[str, Any]:
    """The language models of a trace's latent and observed sites, by site."""
    lms = {name: lm_of(node["fn"]) for name, node in scored(trace).items()}
    return {name: lm for name, lm in lms.items() if lm is not None}


def parameters_of(model: Trace) -> list[Tensor]:
    """The parameters of a model's density: those of its language models, and those in Pyro's store."""
    found: list[Tensor] = []
    for node in model.nodes.values():
        if node["type"] == "param":
            value = node["value"]
            found.append(value.unconstrained() if hasattr(value, "unconstrained") else value)
        elif node["type"] == "sample" and (lm := lm_of(node["fn"])) is not None:
            found += [*lm.network.base_parameters, *lm.trainable_parameters()]
    return list({id(p): p for p in found}.values())


def stored() -> list[Tensor]:
    """The unconstrained parameters in Pyro's store: the tensors that an optimiser holds."""
    return [p for _, p in pyro.get_param_store().named_parameters()]


def register(name: str, parameters: Iterable[nn.Parameter]) -> None:
    """Registers parameters with Pyro as ``name.0``, ``name.1``, ..., for `pyro.infer.SVI`.

    Parameters of the same names in Pyro's store are replaced.
    """
    store = pyro.get_param_store()
    for i, p in enumerate(parameters):
        key = f"{name}.{i}"
        if key in store and store[key].unconstrained() is not p:
            store[key] = p
        pyro.param(key, p)


def nesting_of(sketches: list[Trace]) -> int:
    """How many axes the plates of these traces take."""
    frames = [f for sketch in sketches for _, node in _samples(sketch) for f in node["cond_indep_stack"]]
    return max([0, *(-f.dim for f in frames if f.vectorized)])


def plate_nesting(
    programs: list[Program], args: tuple[Any, ...], kwargs: dict[str, Any], given: int | float | None = None
) -> int:
    """How many axes the programs' own plates take: ``given``, or found from one run without a network."""
    given = given_nesting(given)
    return nesting_of(sketches(programs, args, kwargs)) if given is None else given


def given_nesting(max_plate_nesting: int | float | None) -> int | None:
    """The given number of plate axes, checked; None if it has to be found, which None and Pyro's infinity ask for."""
    if max_plate_nesting is None or (isinstance(max_plate_nesting, float) and max_plate_nesting == float("inf")):
        return None
    at_least(0, max_plate_nesting=max_plate_nesting)
    if max_plate_nesting > MOST_AXES:
        raise ValueError(f"max_plate_nesting: a tensor has at most {MOST_AXES} axes, got {max_plate_nesting}")
    return int(max_plate_nesting)


def cat_particles(draws: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The latent values of several runs, (n_i, *plate axes, *event) each, as those of one run: (sum n_i, ...)."""
    if len(draws) == 1:
        return dict(draws[0])
    result = {}
    for name in draws[0]:
        values = [draw[name] for draw in draws]
        width = max(v.shape[-1] for v in values) if values[0].dim() > 1 else 0
        if any(v.dim() > 1 and v.shape[-1] != width for v in values):  # texts of programs with different max_tokens
            values = [text.pad(v, width) for v in values]
        result[name] = torch.cat(values)
    return result


def cut(value: Tensor, ending: Ending, at: Tensor) -> Tensor:
    """The texts cut after ``at`` tokens and ended there by their stop token; the whole text where it is not longer.

    ``value`` (..., L), ``ending`` (...), ``at`` (P, ...) -> (P, ..., L).
    """
    whole = at >= ending.at
    own = ending.stop.masked_fill(whole & (ending.by_string | ~ending.ended), text.PAD)[..., None]
    at = torch.minimum(at, ending.at)[..., None]
    column = torch.arange(value.shape[-1], device=value.device)
    return torch.where(column < at, value, torch.where(column == at, own, text.PAD))
