"""The texts of a sample site.  Only this module asks what a distribution of texts can do.

`text_of` removes what is wrapped around a text distribution: masks, expansions, and `.to_event`, which makes batch axes
part of the event.  A `Site` handles its texts one by one; `Site.lift` turns their log-probabilities into the site's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Independent

from ... import randomness, text
from ...distributions.protocols import PrefixScores, Steps, Stepwise, Terminable, Text
from ...engine.asking import Asking, asking, asks, asks_others
from ...shapes import broadcast_shapes
from ...stop_strings import Ending, Stops


@dataclass(frozen=True)
class Site:
    """The texts of a site: their distribution, and how they are arranged in the site.

    ``shape`` is (*the site's batch, *stacked axes), the batch shape of the texts.
    """

    fn: Any  # a Text
    shape: torch.Size
    stacked: int  # how many axes of texts are part of the site's event
    mask: Tensor | None  # which texts count according to the distribution's masks; broadcasts with ``shape``

    @property
    def event_dim(self) -> int:
        return self.stacked + 1

    @property
    def width(self) -> int:
        return int(self.fn.event_shape[0])

    @property
    def stops(self) -> Stops:
        """What ends the texts."""
        return Stops(self.fn.stop, getattr(self.fn, "stop_strings", None))

    @property
    def stop_argument(self) -> list[int | str]:
        """What ends the texts, in the form of a ``stop=`` argument; empty for None."""
        ids, strings = self.stops
        return [*ids.tolist(), *(strings.strings if strings is not None else ())]

    @property
    def terminable(self) -> bool:
        """Whether the distribution has stop tokens and scores all stopped prefixes in one pass."""
        return isinstance(self.fn, Terminable) and self.fn.stop.numel() > 0

    @property
    def stepwise(self) -> bool:
        return isinstance(self.fn, Stepwise)

    @property
    def regrowable(self) -> bool:
        """Whether the end of a text can be drawn again."""
        return self.stepwise or (hasattr(self.fn, "regrow") and hasattr(self.fn, "token_log_probs"))

    @property
    def broadens(self) -> bool:
        """Whether the texts can be drawn from a broader distribution, ``fn.broadened(temperature, epsilon)``."""
        return hasattr(self.fn, "broadened")

    @property
    def min_tokens(self) -> Tensor:
        """The fewest tokens before a stop, 0 if the distribution does not say; broadcasts with ``shape``."""
        least = getattr(self.fn, "min_tokens", None)
        return torch.zeros((), dtype=torch.long, device=self.fn.stop.device) if least is None else least

    @property
    def max_tokens(self) -> Tensor:
        """The most tokens before a stop; broadcasts with ``shape``."""
        most = getattr(self.fn, "max_tokens", None)
        room = self.width - (1 if self.fn.stop.numel() else 0)
        return torch.tensor(room, device=self.fn.stop.device) if most is None else most

    def lift(self, x: Tensor) -> Tensor:
        """The site's log-probabilities (..., *its batch) from those of its texts, (..., *shape)."""
        return self.total(x if self.mask is None else scale_and_mask(x, 1.0, self.mask))

    def total(self, x: Tensor) -> Tensor:
        """The sum over the texts of each element of the batch: (..., *shape) -> (..., *its batch)."""
        return x.sum(tuple(range(-self.stacked, 0))) if self.stacked else x

    def there(self, mask: Any) -> Any:
        """Which texts count under both masks, the node's ``mask`` and the distribution's; None means all.

        The result broadcasts with ``shape``.
        """
        if mask is None:
            return self.mask
        mask = torch.as_tensor(mask)
        mask = mask.reshape(*mask.shape, *[1] * self.stacked) if mask.dim() else mask
        return mask if self.mask is None else mask & self.mask

    # -- what the distribution does ----------------------------------------------------------------------------------

    def ending(self, value: Tensor) -> Ending:
        return self.stops.ending(value)

    @asks
    def prefix_scores(self, value: Tensor) -> Asking[PrefixScores]:
        log_probs, stops = yield from asking(self.fn.prefix_scores, value)
        shape = broadcast_shapes(self.shape, log_probs.shape[:-1])
        return PrefixScores(log_probs.expand(*shape, -1), stops.expand(*shape, -1))

    @asks
    def log_prob(self, value: Tensor) -> Asking[Tensor]:
        """log p of each text, (..., *shape)."""
        log_prob = yield from asking(self.fn.log_prob, value)
        return log_prob.expand(broadcast_shapes(self.shape, log_prob.shape))

    def steps(self, share: Steps | None = None) -> Steps:
        """Empty texts to grow token by token, one row each."""
        steps: Steps = self.fn.token_steps(self.shape, share=share)
        return steps

    def placeholder(self) -> Tensor:
        """A text of the right shape, (*shape, L), made without a network."""
        if hasattr(self.fn, "placeholder"):
            found: Tensor = self.fn.placeholder()
            return found.expand(*self.shape, -1)
        stop = self.fn.stop
        value = torch.full((*self.shape, self.width), text.PAD if stop.numel() else 0, device=stop.device)
        value[..., :1] = stop[0] if stop.numel() else 0
        return value

    def draw(self) -> tuple[Tensor, Tensor]:
        """Draws texts (*shape, L); returns them and the log-probability of each, (*shape)."""
        if hasattr(self.fn, "sample_and_log_prob") and self.fn.batch_shape == self.shape:
            found: tuple[Tensor, Tensor] = self.fn.sample_and_log_prob()
            return found
        if self.stepwise:
            nothing = torch.full((*self.shape, self.width), text.PAD, device=self.fn.stop.device)
            return self.regrow(nothing, torch.zeros(self.shape, dtype=torch.long, device=nothing.device))
        value = ExpandedDistribution(self.fn, self.shape).sample()
        return value, self.fn.log_prob(value).expand(self.shape)

    def draw_from(self, broader: Any) -> Tensor:
        """Draws texts (*shape, L) from another distribution; a dead end is not an error, unlike in ``sample``."""
        if broader is self.fn:
            return self.draw()[0]
        value: Tensor = (
            broader.sample_and_log_prob()[0] if hasattr(broader, "sample_and_log_prob") else broader.sample()
        )
        return value

    @torch.no_grad()
    def regrow(self, value: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Texts (*shape, L) with the tokens after the first ``keep`` (*shape) drawn again, and log p of these."""
        if hasattr(self.fn, "regrow"):
            found: tuple[Tensor, Tensor] = self.fn.regrow(value, keep)
            return found
        steps = self.steps()
        kept, keep = text.pad(value, self.width).expand(*self.shape, -1).flatten(0, -2), keep.flatten()
        uniform = randomness.uniform((*self.shape, self.width), right=1, device=kept.device).flatten(0, -2)
        log_prob = torch.zeros(len(kept), dtype=torch.float64, device=kept.device)
        for t in range(self.width):
            token, gain = steps.draw(uniform[:, t])
            held = keep > t
            steps.append(torch.where(held, kept[:, t].masked_fill(steps.ended, text.PAD), token))
            log_prob = log_prob + gain.masked_fill(held, 0.0)
            if bool(steps.ended.all()):
                break
        return text.pad(steps.prefix.view(*self.shape, -1), self.width), log_prob.view(self.shape)

    @torch.no_grad()
    def token_log_probs(self, value: Tensor) -> Tensor:
        """log p of each token of texts (*shape, L) given the tokens before it; 0 at padding."""
        if hasattr(self.fn, "token_log_probs"):
            found: Tensor = self.fn.token_log_probs(value)
            return found
        steps, rows = self.steps(), value.expand(*self.shape, -1).flatten(0, -2)
        columns = []
        for token in rows.unbind(1):
            log_p = steps.score(token).masked_fill((token == text.PAD) & ~steps.ended, -torch.inf)
            columns.append(
                log_p.masked_fill(steps.ended, 0.0).masked_fill(steps.ended & (token != text.PAD), -torch.inf)
            )
            steps.append(token.masked_fill(steps.ended, text.PAD))
        return torch.stack(columns, 1).view(*self.shape, -1)

    def complete(self, strings: Any) -> Tensor:
        """Encodes strings as texts of this site; its first stop is added to those that have none.

        :raises ValueError: if the distribution has no language model to encode them.
        """
        lm, ends = lm_of(self.fn), self.stop_argument
        if lm is None:
            raise ValueError(f"{type(self.fn).__name__} cannot encode strings; give texts, LongTensors of token ids")
        value = lm.encode(strings)
        if not ends:
            return value
        value = text.pad(value, max(1, value.shape[-1]))
        last = (text.length(value) - 1).clamp(min=0)[..., None]
        ended = self.stops.ends(value).gather(-1, last)
        stop = torch.tensor(lm.vocabulary.ending_ids(ends[0]), device=value.device)
        return text.cat(value, torch.where(ended, text.PAD, stop))


def text_of(fn: Any) -> Site | None:
    """The texts of a site's distribution; None if it is not a distribution of texts."""
    if not isinstance(innermost(fn), Text):
        return None
    shape, stacked, masks = fn.batch_shape, 0, []
    while True:
        if isinstance(fn, Independent):
            stacked += fn.reinterpreted_batch_ndims
            fn = fn.base_dist
            shape = torch.Size((*shape, *fn.batch_shape[len(shape) :]))
        elif isinstance(fn, MaskedDistribution):
            masks.append((torch.as_tensor(fn._mask), stacked))
            fn = fn.base_dist
        elif isinstance(fn, ExpandedDistribution):
            fn = fn.base_dist
        else:
            break
    mask: Tensor | None = None
    for m, seen in masks:
        m = m.reshape(*m.shape, *[1] * (stacked - seen)) if m.dim() else m
        mask = m if mask is None else mask & m
    return Site(fn, torch.Size(shape), stacked, mask)


def texts_of(node: Any) -> Site:
    """The texts of a trace node that is known to be a text site."""
    site = text_of(node["fn"])
    assert site is not None, f"site {node['name']!r} is no text"
    return site


def is_text(fn: Any) -> bool:
    return text_of(fn) is not None


def is_terminable(fn: Any) -> bool:
    site = text_of(fn)
    return site is not None and site.terminable


def is_stepwise(fn: Any) -> bool:
    site = text_of(fn)
    return site is not None and site.stepwise


def asks_network(fn: Any) -> bool:
    """Whether the texts are scored by a language model that can score other sites in the same pass."""
    site = text_of(fn)
    return site is not None and asks_others(site.fn.log_prob)


def lm_of(fn: Any) -> Any:
    """The language model of a site's distribution, of a text or of one token; None if there is none."""
    return getattr(innermost(fn), "lm", None)


def lms_of(fn: Any) -> list[Any]:
    """All language models of a site's distribution and of its components."""
    inner = innermost(fn)
    found = [lm for c in getattr(inner, "components", ()) for lm in lms_of(c)] or [lm_of(inner)]
    return [lm for lm in found if lm is not None]


def prompt_of(fn: Any) -> Tensor | None:
    """The prompt of a site's text or token, (*batch, L); None if there is none."""
    return getattr(innermost(fn), "prompt", None)


def unmasked(fn: Any) -> tuple[Any, Any]:
    """A distribution without the masks around it, and the product of these masks; None if there is none."""
    mask: Any = None
    while isinstance(fn, MaskedDistribution):
        mask = fn._mask if mask is None else mask & fn._mask
        fn = fn.base_dist
    return fn, mask


def propose(steps: Steps, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A weighted draw; see `Steps`."""
    found: tuple[Tensor, Tensor] = (steps.propose if hasattr(steps, "propose") else steps.draw)(uniform)
    return found


def inserting(steps: Steps) -> Tensor:
    """BoolTensor (R,): whether a tool writes the next token."""
    found: Tensor = steps.inserting if hasattr(steps, "inserting") else torch.zeros_like(steps.ended)
    return found


def innermost(fn: Any) -> Any:
    """A distribution without the masks, expansions and `.to_event` around it."""
    while isinstance(fn, MaskedDistribution | ExpandedDistribution | Independent):
        fn = fn.base_dist
    return fn


def around(fn: Any, other: Any) -> Any:
    """``other`` with the same masks, expansions and `.to_event` around it as ``fn``."""
    if isinstance(fn, MaskedDistribution):
        return around(fn.base_dist, other).mask(fn._mask)
    if isinstance(fn, Independent):
        return around(fn.base_dist, other).to_event(fn.reinterpreted_batch_ndims)
    return around(fn.base_dist, other).expand(fn.batch_shape) if isinstance(fn, ExpandedDistribution) else other
