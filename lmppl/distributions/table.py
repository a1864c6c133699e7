"""`Table` and `TextTable`: distributions over finitely many values, each listed with its log-probability."""

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
    r"""A distribution over K distinct values, which it lists.

    .. math:: p(v_k) = \mathrm{softmax}(logits)_k, \qquad p(v) = 0 \text{ for any other value}

    :param values: (K, *event), distinct.
    :param logits: (*batch, K), unnormalised log-probabilities; -inf for a value that is impossible in that element.
    :raises ValueError: if shapes do not fit, a value occurs twice, or no value is possible.

    Shapes: ``batch_shape = logits.shape[:-1]``, ``event_shape = values.shape[1:]``. Gradients flow through `log_prob`
    to ``logits``.

    >>> d = Table(torch.tensor([1.0, 2.5]), torch.tensor([0.25, 0.75]).log())
    >>> d.log_prob(torch.tensor([2.5, 3.0])).exp()
    tensor([0.7500, 0.0000])
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
        """The constraint on values: the values listed."""
        return Listed(self)

    def expand(self, batch_shape: torch.Size, _instance: Table | None = None) -> Table:
        """Returns the same table with a larger batch; nothing is copied.

        :param batch_shape: the new shape, with which the batch broadcasts.
        :returns: a distribution of the same class.

        >>> Table(torch.tensor([1.0, 2.5]), torch.zeros(2)).expand((4,)).batch_shape
        torch.Size([4])
        """
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        shape = broadcast_shapes(self.batch_shape, torch.Size(batch_shape))
        TorchDistribution.__init__(new, shape, self.event_shape, validate_args=False)
        return new

    def row(self, value: Tensor) -> Tensor:
        """Returns which of the listed values each value is.

        :param value: (..., *event).
        :returns: LongTensor (...), numbers from 0 to K - 1; K for a value that is not listed.

        >>> Table(torch.tensor([1.0, 2.5]), torch.zeros(2)).row(torch.tensor([2.5, 3.0]))
        tensor([1, 2])
        """
        batch = value.shape[: value.dim() - len(self.event_shape)]
        known, asked = self.values.reshape(len(self.values), -1), value.reshape(batch.numel(), -1)
        _, kind = distinct_rows(torch.cat([known, asked.to(known.dtype)]))
        rows = torch.full_like(kind, len(known))
        rows[kind[: len(known)]] = torch.arange(len(known), device=kind.device)
        return rows[kind[len(known) :]].view(batch)

    def _at(self, row: Tensor) -> Tensor:
        """Returns log p of the values with these numbers (...), broadcast with the batch; -inf for the number K."""
        batch = broadcast_shapes(self.batch_shape, row.shape)
        padded = pad(self.logits, (0, 1), value=-torch.inf)  # (*batch, K + 1)
        return padded.expand(*batch, -1).gather(-1, row.expand(batch)[..., None])[..., 0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value), with gradient.

        :param value: (..., *event); leading axes broadcast with the batch.
        :returns: log-probabilities (..., *batch_shape); -inf for a value that is not listed.

        >>> Table(torch.tensor([1.0, 2.5]), torch.zeros(2)).log_prob(torch.tensor(1.0)).exp()
        tensor(0.5000)
        """
        return self._at(self.row(value))

    @torch.no_grad()
    def sample_and_log_prob(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Returns a sample and its log-probability, without gradient.

        :param sample_shape: leading axes of the sample.
        :returns: values (*sample_shape, *batch_shape, *event_shape), and log p (*sample_shape, *batch_shape).

        >>> value, log_p = Table(torch.tensor([1.0, 2.5]), torch.zeros(2)).sample_and_log_prob((3,))
        """
        shape = torch.Size(sample_shape) + self.batch_shape
        probabilities = self.logits.exp().expand(*shape, -1)
        with randomness.apart():
            row = torch.multinomial(probabilities.reshape(shape.numel(), -1), 1).view(shape)
        return self.values[row], self._at(row)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Returns a sample.

        :param sample_shape: leading axes of the sample.
        :returns: values (*sample_shape, *batch_shape, *event_shape).

        >>> Table(torch.tensor([1.0, 2.5]), torch.zeros(2)).sample((3,)).shape
        torch.Size([3])
        """
        return self.sample_and_log_prob(sample_shape)[0]

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Returns every value that is listed.

        :param expand: whether the batch axes have the batch's sizes; False: size 1.
        :returns: (K, *batch_shape, *event_shape), or with batch axes of size 1.

        >>> Table(torch.tensor([1.0, 2.5]), torch.zeros(2)).enumerate_support()
        tensor([1.0000, 2.5000])
        """
        values = self.values.view(-1, *[1] * len(self.batch_shape), *self.event_shape)
        return values.expand(-1, *self.batch_shape, *self.event_shape) if expand else values


class TextTable(Table):
    r"""A distribution over K texts, which it lists.

    .. math:: p(z_k) = \mathrm{softmax}(logits)_k, \qquad p(z) = 0 \text{ for any other text}

    It scores all prefixes of a text (`prefix_scores`), but is not drawn token by token.

    :param lm: the language model whose tokens these are. It decodes texts; it never scores them.
    :param texts: (K, L), distinct, each ended by one of ``stop``.
    :param logits: (*batch, K), unnormalised log-probabilities.
    :param stop: as of `Completion`, or a LongTensor (S,) of token ids. If empty, texts have no stop, and no prefix is
        terminable.
    :raises ValueError: as of `Table`, and if a text is malformed.

    Shapes: ``batch_shape = logits.shape[:-1]``; ``event_shape`` has room for the longest text.

    >>> answers = lm.encode(["yes", "no"], stop="eos")
    >>> d = TextTable(lm, answers, torch.tensor([0.25, 0.75]).log(), stop="eos")
    >>> d.log_prob(lm.encode("no", stop="eos")).exp()
    tensor(0.7500)
    """

    def __init__(self, lm: Any, texts: Tensor, logits: Tensor, stop: Stop):
        text.validate(texts, "texts")
        self.lm = lm
        stops: Stops = Stops(stop, None) if isinstance(stop, Tensor) else lm.stops(stop)
        self.stop, self.stop_strings = stops
        at = stops.ending(texts).at
        self.min_tokens = at.min()
        room = int(at.max()) + int(self.stop.numel() > 0)  # one column for every prefix
        super().__init__(text.pad(texts, max(texts.shape[-1], room)), logits)

    @property
    def support(self) -> Texts:
        """The constraint on values: ids of the vocabulary, padded on the right."""
        return Texts(self.lm.vocab_size)

    def row(self, value: Tensor) -> Tensor:
        """Returns which of the listed texts each text is.

        :param value: texts (..., L); padding does not matter.
        :returns: LongTensor (...), numbers from 0 to K - 1; K for a text that is not listed.

        >>> d = TextTable(lm, lm.encode(["yes", "no"], stop="eos"), torch.zeros(2), stop="eos")
        >>> d.row(lm.encode(["no", "maybe"], stop="eos"))
        tensor([1, 2])
        """
        width = self.event_shape[0]
        beyond = (value[..., width:] != text.PAD).any(-1)
        row = super().row(pad(value[..., :width], (0, max(0, width - value.shape[-1])), value=text.PAD))
        return row.masked_fill(beyond, len(self.values))

    def decode(self, value: Tensor) -> Any:
        """Returns texts as strings, without special tokens.

        :param value: texts (..., L).
        :returns: a string, or nested lists of strings with the shape of the leading axes.

        >>> d = TextTable(lm, lm.encode(["yes", "no"], stop="eos"), torch.zeros(2), stop="eos")
        >>> d.decode(d.enumerate_support())
        ['yes', 'no']
        """
        return self.lm.decode(value)

    def placeholder(self) -> Tensor:
        """Returns some text of the right shape.

        :returns: LongTensor (*batch_shape, *event_shape).

        >>> d = TextTable(lm, lm.encode(["yes", "no"], stop="eos"), torch.zeros(2), stop="eos")
        >>> d.decode(d.placeholder())
        'yes'
        """
        return self.values[0].expand(self.shape())

    def prefix_log_probs(self, value: Tensor) -> Tensor:
        r"""Returns the log-probability of every prefix of a value, followed by its stop.

        .. math:: \log p(z_1 \dots z_t \, stop), \quad t = 0, \dots, L - 1

        :param value: texts (..., L); leading axes broadcast with the batch.
        :returns: (..., *batch_shape, L); -inf where no listed text ends so, and past the value's end.

        >>> d = TextTable(lm, lm.encode(["a", "ab"], stop="eos"), torch.zeros(2), stop="eos")
        >>> d.prefix_log_probs(lm.encode("ab", stop="eos")).exp()
        tensor([0.0000, 0.5000, 0.5000])
        """
        return self.prefix_scores(value).log_probs

    def prefix_scores(self, value: Tensor) -> PrefixScores:
        r"""Returns `prefix_log_probs` and the log-probabilities of stopping after each prefix.

        .. math:: \log p(stop \mid z_1 \dots z_t) = \log p(z_1 \dots z_t \, stop)
                  - \log p(\text{texts that begin with } z_1 \dots z_t)

        :param value: texts (..., L); leading axes broadcast with the batch.
        :returns: a named tuple of ``log_probs`` and ``stop_log_probs``, both (..., *batch_shape, L).

        >>> d = TextTable(lm, lm.encode(["a", "ab"], stop="eos"), torch.zeros(2), stop="eos")
        >>> d.prefix_scores(lm.encode("ab", stop="eos")).stop_log_probs.exp()
        tensor([0.0000, 0.5000, 1.0000])
        """
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
