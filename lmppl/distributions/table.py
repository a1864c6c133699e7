"""`Table` and `TextTable`: distributions over finitely many values, each written down with its log-probability."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints as torch_constraints
from torch.nn.functional import pad

from .. import randomness, text
from ..encoding import Stop
from ..rows import distinct_rows
from ..shapes import broadcast_shapes
from ..stop_strings import Stops
from .protocols import PrefixScores
from .support import Texts


class Listed(torch_constraints.Constraint):
    """The support of a table: the values that it lists."""

    is_discrete = True

    def __init__(self, table: Table):
        self.table = table

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        return len(self.table.event_shape)

    def check(self, value: Tensor) -> Tensor:
        return self.table.row(value) < len(self.table.values)


class Table(TorchDistribution):
    r"""A distribution over K distinct values.

    .. math:: p(v_k) = \mathrm{softmax}(logits)_k, \qquad p(v) = 0 \text{ elsewhere}

    :param values: (K, *event), distinct.
    :param logits: (*batch, K), -inf for a value that is impossible in that element of the batch; gradients flow to it.

    Shapes: ``batch_shape = logits.shape[:-1]``, ``event_shape = values.shape[1:]``.

    :raises ValueError: for shapes that do not fit, values that occur twice, and logits that leave no value possible.

    Example::

        k = pyro.sample("k", Table(torch.tensor([1.0, 2.5]), torch.tensor([0.3, 0.7]).log()))
    """

    arg_constraints: dict[str, torch_constraints.Constraint] = {}
    has_enumerate_support = True

    def __init__(self, values: Tensor, logits: Tensor):
        if not values.dim() or not logits.dim() or len(values) != logits.shape[-1]:
            raise ValueError(
                "values, logits: expected (K, *event) and (*batch, K), got shapes "
                f"{tuple(values.shape)} and {tuple(logits.shape)}"
            )
        if len(torch.unique(values.reshape(len(values), -1), dim=0)) < len(values):
            raise ValueError("values: some value occurs twice")
        if not bool((logits > -torch.inf).any(-1).all()):
            raise ValueError("logits: every value is impossible")
        self.values, self.logits = values, logits.log_softmax(-1)
        super().__init__(logits.shape[:-1], values.shape[1:], validate_args=False)

    @property
    def support(self) -> torch_constraints.Constraint:
        return Listed(self)

    def expand(self, batch_shape: torch.Size, _instance: Table | None = None) -> Table:
        """The same table on a larger batch; nothing is copied."""
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        shape = broadcast_shapes(self.batch_shape, torch.Size(batch_shape))
        TorchDistribution.__init__(new, shape, self.event_shape, validate_args=False)
        return new

    def row(self, value: Tensor) -> Tensor:
        """Which of the values each is, (...); K where it is none."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        known, asked = self.values.reshape(len(self.values), -1), value.reshape(batch.numel(), -1)
        _, kind = distinct_rows(torch.cat([known, asked.to(known.dtype)]))
        rows = torch.full_like(kind, len(known))
        rows[kind[: len(known)]] = torch.arange(len(known), device=kind.device)
        return rows[kind[len(known) :]].view(batch)

    def _at(self, row: Tensor) -> Tensor:
        """log p of the values in ``row`` (...), broadcast with the batch; -inf for none."""
        batch = broadcast_shapes(self.batch_shape, row.shape)
        padded = pad(self.logits, (0, 1), value=-torch.inf)  # (*batch, K + 1)
        return padded.expand(*batch, -1).gather(-1, row.expand(batch)[..., None])[..., 0]

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), (*batch); -inf for a value that is not listed."""
        return self._at(self.row(value))

    @torch.no_grad()
    def sample_and_log_prob(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """A sample and its log-probability."""
        shape = torch.Size(sample_shape) + self.batch_shape
        probabilities = self.logits.exp().expand(*shape, -1)
        with randomness.apart():
            row = torch.multinomial(probabilities.reshape(shape.numel(), -1), 1).view(shape)
        return self.values[row], self._at(row)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        return self.sample_and_log_prob(sample_shape)[0]

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All values, (K, *batch, *event), of size 1 along the batch unless ``expand``."""
        values = self.values.view(-1, *[1] * len(self.batch_shape), *self.event_shape)
        return values.expand(-1, *self.batch_shape, *self.event_shape) if expand else values


class TextTable(Table):
    r"""A table of texts, with what inference asks of a distribution over texts: the scores of all prefixes.

    :param lm: the language model whose tokens these are; it decodes them, and is never asked to score.
    :param texts: (K, L), distinct, each ended by one of ``stop``.
    :param logits: (*batch, K).
    :param stop: token ids (S,), or what `Completion` takes; empty: texts without a stop, none of whose prefixes is
        terminable.

    Example::

        z = pyro.sample("z", TextTable(lm, lm.encode(["yes", "no"], stop="eos"), logits, lm.stop_ids("eos")))
    """

    def __init__(self, lm: Any, texts: Tensor, logits: Tensor, stop: Stop):
        text.validate(texts, "texts")
        self.lm = lm
        stops: Stops = Stops(stop, None) if isinstance(stop, Tensor) else lm.stops(stop)
        self.stop, self.stop_strings = stops
        at = stops.ending(texts).at
        self.min_tokens = at.min()
        room = int(at.max()) + int(self.stop.numel() > 0)  # a column for every prefix
        super().__init__(text.pad(texts, max(texts.shape[-1], room)), logits)

    @property
    def support(self) -> Texts:
        return Texts(self.lm.vocab_size)

    def row(self, value: Tensor) -> Tensor:
        width = self.event_shape[0]
        beyond = (value[..., width:] != text.PAD).any(-1)
        row = super().row(pad(value[..., :width], (0, max(0, width - value.shape[-1])), value=text.PAD))
        return row.masked_fill(beyond, len(self.values))

    def decode(self, value: Tensor) -> Any:
        """Texts (..., L) as strings, nested lists of the leading axes."""
        return self.lm.decode(value)

    def placeholder(self) -> Tensor:
        """Some text of the right shape (*batch, *event)."""
        return self.values[0].expand(self.shape())

    def prefix_log_probs(self, value: Tensor) -> Tensor:
        """log p(z_1..z_t stop) for t = 0..L - 1, (*batch, L); -inf where the text cannot stop and past its end."""
        return self.prefix_scores(value).log_probs

    def prefix_scores(self, value: Tensor) -> PrefixScores:
        r"""`prefix_log_probs` with log p(stop | z_1..z_t) = log p(z_1..z_t stop) - log p(texts that begin z_1..z_t)."""
        width = self.event_shape[0]
        value = text.pad(value, width)
        ending = Stops(self.stop, self.stop_strings).ending(value)
        column = torch.arange(width, device=value.device)
        begins = torch.ones(*value.shape[:-1], len(self.values), dtype=torch.bool, device=value.device)
        log_probs, stops = [], []
        for t in range(width if self.stop.numel() else 0):
            own = ending.stop.masked_fill(ending.by_string & (ending.at <= t), text.PAD)[..., None]
            stopped = torch.where(column < t, value, torch.where(column == t, own, text.PAD))
            log_p = self.log_prob(stopped).masked_fill(t > ending.at, -torch.inf)
            reach = self.logits.masked_fill(~begins, -torch.inf)  # (*batch, K)
            possible = (reach > -torch.inf).any(-1)
            log_reach = torch.where(possible[..., None], reach, 0.0).logsumexp(-1)
            log_probs.append(log_p)
            stops.append((log_p - log_reach).masked_fill(~possible, -torch.inf))
            begins = begins & (value[..., None, t] == self.values[:, t])
        if not log_probs:
            never = torch.full((*broadcast_shapes(ending.at.shape, self.batch_shape), width + 1), -torch.inf)
            return PrefixScores(never, never)
        return PrefixScores(*(torch.stack(torch.broadcast_tensors(*x), -1) for x in (log_probs, stops)))
