"""Runs a program up to the next site that has to be drawn, for SMC."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ... import text
from .explained import check_shapes
from .programs import Node, Program, Substitute
from .query import Query
from .sites import is_stepwise, is_text

Pause = Callable[[str, Trace], bool]


class _Reached(BaseException):
    """Leaves a program at the site that it has reached.  It is no Exception, so that the program does not catch it."""


class _Halt(Messenger):
    """Records sites, and leaves the program at the first latent site without a value, or at the first such text.

    ``pause(site, trace so far)`` is called before every other latent site; the program is left if it returns true.
    """

    def __init__(self, *, texts_only: bool, retained: Mapping[str, Tensor] | None = None, pause: Pause | None = None):
        super().__init__()
        self.texts_only, self.retained, self.pause = texts_only, retained, pause
        self.trace, self.site = Trace(), None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        if not msg["done"] and (not self.texts_only or is_grown(msg)):
            self.site = msg.copy()
            raise _Reached
        if self.pause is not None and self.pause(msg["name"], self.trace):
            raise _Reached

    def _pyro_post_sample(self, msg: Any) -> None:
        if not (msg["is_observed"] or site_is_subsample(msg)):
            msg["value"] = keep_first(self.retained, msg["name"], msg["fn"], msg["value"])
        self.trace.add_node(msg["name"], **msg.copy())


def is_grown(node: Node) -> bool:
    """Whether a site is drawn token by token."""
    return is_stepwise(node["fn"]) and not node["infer"].get("is_auxiliary")


def advance(
    query: Query,
    program: Program,
    values: dict[str, Tensor],
    *,
    particles: int,
    texts_only: bool,
    retained: Mapping[str, Tensor] | None = None,
    pause: Pause | None = None,
) -> tuple[Trace, Node | None]:
    """Runs a program with ``values``; returns the sites that it met, and the latent site without a value that ended it.

    The latter is None if the program ran to its end, or if ``pause(site, trace so far)`` returned true.  Its ``fn`` has
    the batch shape (particle, *plate axes).  With ``texts_only`` the program draws latent sites that are no texts, and
    goes on.  ``retained``: values that particle 0 takes in place of what is drawn.
    """
    halt = _Halt(texts_only=texts_only, retained=retained, pause=pause)
    with suppress(_Reached):
        query.trace(program, halt, Substitute(values), particles=particles)
    check_shapes(halt.trace, query.nesting, particles, None)
    return halt.trace, halt.site


def keep_first(retained: Mapping[str, Tensor] | None, name: str, fn: Any, value: Tensor) -> Tensor:
    """A site's value (particle, *plate axes, *event) with the retained value, (1, ...), in particle 0.

    A text that is longer than the site's texts is cut off; see `too_long`.

    :raises ValueError: if there is no retained value for this site.
    """
    if retained is None:
        return value
    if name not in retained:
        raise ValueError(f"exact_sample: it has no value for the site {name!r}, only for {list(retained)}")
    first = retained[name]
    if is_text(fn):
        width = fn.event_shape[-1]
        first = text.pad(first[..., :width], width)
    first = first.reshape((1,) * (value.dim() - first.dim()) + first.shape)
    return torch.cat([first.expand_as(value[:1]), value[1:]])


def too_long(retained: Mapping[str, Tensor] | None, name: str, fn: Any) -> Tensor | None:
    """Where the retained text is longer than any text of this site, (..., *plate axes); None if it is nowhere."""
    if retained is None or name not in retained or not is_text(fn):
        return None
    longer = text.length(retained[name]) > fn.event_shape[-1]
    return longer if bool(longer.any()) else None


def only(trace: Trace, names: set[str]) -> Trace:
    """A trace of the nodes with these names."""
    part = Trace()
    for name, node in trace.nodes.items():
        if name in names:
            part.add_node(name, **node)
    return part
