"""`NextToken`: the categorical distribution over the token that comes next."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints as torch_constraints

from .. import randomness, text
from ..engine.scoring import score, with_bos
from ..language_model import LanguageModel
from ..shapes import broadcast_shapes
from .arguments import as_lm, as_text, refuse_nan
from .token_steps import draw


class NextToken(TorchDistribution):
    r"""The token that follows ``context``, for programs that write token by token.

    .. math:: p(v \mid context) = \mathrm{softmax}(logits)_v

    :param lm: the language model.
    :param context: text (*batch, L), or a string or nested list of strings, encoded by `LanguageModel.encode`. An empty
        context starts from bos.
    :param validate_args: whether values are checked; None: as ``pyro.enable_validation`` set it.
    :raises ValueError: naming the argument, for a malformed text or one longer than the model's context.

    Shapes: ``batch_shape = context.shape[:-1]``, ``event_shape = ()``; values are token ids. Gradients flow through
    `log_prob` to the language model's trainable parameters.

    Example::

        token = pyro.sample("t", NextToken(lm, context))
        context = text.cat(context, token[..., None])
    """

    arg_constraints: dict[str, torch_constraints.Constraint] = {}
    has_enumerate_support = True

    def __init__(self, lm: LanguageModel, context: Tensor | str | list[Any], *, validate_args: bool | None = None):
        self.lm = as_lm(lm)
        self.prompt = as_text(lm, context, "context")
        if lm.max_length is not None and self.prompt.shape[:-1].numel():
            longest = int(text.length(with_bos(lm, self.prompt)).max())
            if longest > lm.max_length:
                raise ValueError(f"context: it has {longest} tokens, but this model's context holds {lm.max_length}")
        super().__init__(self.prompt.shape[:-1], torch.Size(), validate_args=validate_args)

    @property
    def support(self) -> torch_constraints.Constraint:
        """The constraint on values: integers from 0 to V - 1."""
        return torch_constraints.integer_interval(0, self.lm.vocab_size - 1)

    def expand(self, batch_shape: torch.Size, _instance: NextToken | None = None) -> NextToken:
        """Returns the same distribution with a larger batch; the network runs once.

        :param batch_shape: the new shape, with which the batch broadcasts.
        :returns: a `NextToken`.

        >>> NextToken(lm, "once").expand((4,)).sample().shape
        torch.Size([4])
        """
        new = self._get_checked_instance(NextToken, _instance)
        new.__dict__.update(self.__dict__)
        super(NextToken, new).__init__(
            broadcast_shapes(self.batch_shape, torch.Size(batch_shape)), torch.Size(), validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    @property
    def logits(self) -> Tensor:
        """Normalised log-probabilities of all tokens, (*context batch, V).

        They are computed once with gradient and once without.

        >>> NextToken(lm, x).logits.exp().sum(-1).shape
        torch.Size([2])
        """
        cache = self.__dict__.setdefault("_logits", {})
        if torch.is_grad_enabled() not in cache:
            cache[torch.is_grad_enabled()] = self._compute()
        return cache[torch.is_grad_enabled()]

    def _compute(self) -> Tensor:
        start = self.prompt.new_zeros(1)  # stands for the token to come; its value does not matter

        def head(logits: Tensor, rows: Tensor) -> Tensor:
            return logits[:, 0].log_softmax(-1)

        log_probs = score(self.lm, self.prompt, start, head)
        refuse_nan(log_probs)
        return log_probs

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Returns token ids, drawn without gradient.

        :param sample_shape: leading axes of the sample.
        :returns: LongTensor (*sample_shape, *batch_shape).

        >>> NextToken(lm, x).sample((3,)).shape
        torch.Size([3, 2])
        """
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            log_probs = self.logits.expand(*shape, -1).reshape(-1, self.lm.vocab_size)
            return draw(log_probs, randomness.uniform(shape, device=log_probs.device).flatten()).view(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value), with gradient.

        :param value: LongTensor (...) of token ids; it broadcasts with the batch.
        :returns: log-probabilities (..., *batch_shape).
        :raises ValueError: for an id outside the vocabulary, or a shape that does not broadcast.

        >>> lm = LanguageModel.embedded("stories")
        >>> d = NextToken(lm, "Tom went to the")
        >>> round(d.log_prob(lm.encode(" kitchen")[0]).exp().item(), 2)
        0.12
        """
        value = value.to(self.prompt.device)
        if self._validate_args:
            if value.dtype != torch.long:
                raise ValueError(f"value: expected a LongTensor of token ids, got {value.dtype}")
            if bool(((value < 0) | (value >= self.lm.vocab_size)).any()):
                raise ValueError(f"value: token ids must lie in 0..{self.lm.vocab_size - 1}")
        try:
            shape = broadcast_shapes(value.shape, self.batch_shape)
        except RuntimeError as error:
            raise ValueError(
                f"value: shape {tuple(value.shape)} does not broadcast with the batch {tuple(self.batch_shape)}"
            ) from error
        logits = self.logits.expand(*broadcast_shapes(value.shape, self.logits.shape[:-1]), -1)
        return logits.gather(-1, value.expand(logits.shape[:-1])[..., None])[..., 0].expand(shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Returns every token id.

        :param expand: whether the batch axes have the batch's sizes; False: size 1.
        :returns: LongTensor (V, *batch_shape), or with batch axes of size 1.

        >>> len(NextToken(lm, x).enumerate_support()) == lm.vocab_size
        True
        """
        values = torch.arange(self.lm.vocab_size, device=self.prompt.device)
        values = values.view(-1, *[1] * len(self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values
