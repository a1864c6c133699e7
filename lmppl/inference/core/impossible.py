"""Why an observed text has probability zero whatever the latents are: found from its tokens, without a network."""

from __future__ import annotations

from collections.abc import Mapping

from pyro.poutine import Trace
from torch import Tensor

from ... import text
from . import programs
from .programs import Node
from .sites import Site, lm_of, text_of


def observed_texts(model: Trace) -> dict[str, Node]:
    """The observed sites of a trace that are texts."""
    return {n: s for n, s in programs.scored(model).items() if s["is_observed"] and text_of(s["fn"]) is not None}


def impossible_texts(observed: Mapping[str, Node], where: Tensor | None = None) -> list[str]:
    """A sentence for each of these sites with a text that is impossible whatever the latents are.

    ``where`` (*plate axes) says which elements are looked at; None means all.
    """
    return [f"site {name!r}: {why}" for name, node in observed.items() if (why := why_impossible(node, where))]


def why_impossible(node: Node, where: Tensor | None = None) -> str | None:
    """What is wrong with the lengths or the stops of a site's texts, and what to do; None if nothing is found."""
    site, value = text_of(node["fn"]), node["value"]
    if site is None or not isinstance(value, Tensor):
        return None
    ending, length, most, least = site.ending(value), text.length(value), site.max_tokens, site.min_tokens
    mask = node["mask"]
    if where is not None:
        mask = where.to(value.device) if mask is None else where.to(value.device) & mask
    counts = site.there(mask)

    def any_of(wrong: Tensor) -> bool:
        return bool((wrong if counts is None else wrong & counts).any())

    unfinished = ~ending.ended & (length != most)
    if not site.stop_argument:
        if any_of(length != most):
            return "without a stop, a text has exactly max_tokens tokens; pass max_tokens=length(y)"
    elif not site.fn.stop.numel():
        if any_of(unfinished):
            return (
                f"a text ends with its stop string{_shown(site)} or has max_tokens tokens; encode it with "
                "lm.encode(..., stop=...)"
            )
    elif any_of(~ending.ended):
        string = " or a stop string" if site.stops.strings is not None else ""
        return (
            f"the observed text does not end with its stop token{string}{_shown(site)}, so the evidence is zero; "
            "encode it with lm.encode(..., stop=...), or observe how the text begins with stop=None, "
            "max_tokens=length(y)"
        )
    if any_of(ending.ended & (ending.width < length)):
        return f"the observed text goes on after its first stop{_shown(site)}; observe what comes before, with the stop"
    if any_of(ending.at > most):
        return (
            f"the observed text has up to {int(ending.at.max())} tokens before its stop, more than "
            f"max_tokens={int(most.max())}; raise max_tokens"
        )
    if any_of(~ending.by_string & (ending.at < least)):
        return (
            f"the observed text has only {int(ending.at.min())} token(s) before its stop, fewer than "
            f"min_tokens={int(least.max())}; lower min_tokens"
        )
    return None


def _shown(site: Site) -> str:
    """What ends the texts, in brackets; empty if nothing decodes it."""
    lm = lm_of(site.fn)
    if lm is None:
        return ""
    stops = [s if isinstance(s, str) else lm.tokenizer.decode([s]) for s in site.stop_argument]
    return f" ({' or '.join(map(repr, stops))})"
