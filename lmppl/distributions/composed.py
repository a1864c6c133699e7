r"""Distributions over texts made of other ones: a mixture of texts, and a product of next-token distributions.

    mixture    q(z) = sum_k w_k q_k(z)
    product    q(z) = prod_t 1 / Z(z_<t) prod_k q_k(z_t | z_<t)^(a_k),    Z(z_<t) = sum_v prod_k q_k(v | z_<t)^(a_k)

A mixture can be drawn token by token: the weights at each token are :math:`w_k q_k(z_{<t})`, normalised.

A product combines conditions. If :math:`q_1 \propto p \, c_1` and :math:`q_2 \propto p \, c_2` are posteriors with the
same prior p, the posterior under both conditions is :math:`p \, c_1 c_2 \propto q_1 q_2 / p`: powers 1, 1, -1 of q_1,
q_2 and p. The product of next-token distributions is not the normalised product of texts: they differ by the factor
:math:`\prod_t Z(z_{<t})`. Importance weights correct for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import text
from ..shapes import broadcast_shapes
from .arguments import refuse_nan
from .protocols import Steps, Stepwise
from .stepped import SteppedText
from .token_steps import draw, next_log_probs


class Composed(SteppedText):
    """The base of mixture and product: components with the same tokens and stops, and a number for each component."""

    def __init__(self, components: Sequence[Any], numbers: Tensor, name: str):
        components = list(components)
        if not components or not all(isinstance(c, Stepwise) for c in components):
            raise ValueError(
                "components: expected at least one text that is drawn token by token, such as a Completion"
            )
        if not numbers.dim() or numbers.shape[-1] != len(components):
            raise ValueError(
                f"{name}: expected the shape (*batch, {len(components)}), a number for each component, got "
                f"{tuple(numbers.shape)}"
            )
        first = components[0]
        for c in components:
            if not c.stop.numel() or getattr(c, "stop_strings", None) is not None:
                raise ValueError("components: expected texts that end with a stop token, without stop strings")
            if c.vocab_size != first.vocab_size or c.stop.tolist() != first.stop.tolist():
                raise ValueError("components: their tokens or stops differ")
        try:
            shape = broadcast_shapes(numbers.shape[:-1], *(c.batch_shape for c in components))
        except RuntimeError as error:
            raise ValueError(f"components, {name}: their batches do not broadcast") from error
        self.components, self.numbers, self.stop, self.lm = components, numbers, first.stop, getattr(first, "lm", None)
        super().__init__(shape, torch.Size([max(c.event_shape[0] for c in components)]), validate_args=False)

    @property
    def vocab_size(self) -> int:
        """The number V of tokens."""
        return int(self.components[0].vocab_size)

    def decode(self, value: Tensor) -> Any:
        """Returns texts as strings, by the first component's `decode`.

        :param value: texts (..., L).
        :returns: a string, or nested lists of strings with the shape of the leading axes.

        >>> d = TextMixture([Completion(lm, x, max_tokens=5), Completion(q, x, max_tokens=5)], torch.zeros(2))
        >>> d.decode(lm.encode("abc", stop="eos"))
        'abc'
        """
        return self.components[0].decode(value)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Composed:
        """Returns the same distribution with a larger batch; nothing is copied.

        :param batch_shape: the new shape, with which the batch broadcasts.
        :returns: a distribution of the same class.

        >>> d = TextMixture([Completion(lm, x, max_tokens=5), Completion(q, x, max_tokens=5)], torch.zeros(2))
        >>> d.expand((4, 2)).batch_shape
        torch.Size([4, 2])
        """
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        shape = broadcast_shapes(self.batch_shape, torch.Size(batch_shape))
        super(Composed, new).__init__(shape, self.event_shape, validate_args=False)
        return new

    def token_steps(self, shape: torch.Size | None = None, share: Any = None) -> Steps:
        """Returns unfinished texts that grow token by token; see `protocols.Steps`.

        :param shape: the shape of the texts, with which the batch broadcasts; None: the batch.
        :param share: steps of another distribution that receive the same tokens; passed on to the components.
        :returns: steps that advance all components together.

        >>> d = TextMixture([Completion(lm, x, max_tokens=5), Completion(q, x, max_tokens=5)], torch.zeros(2))
        >>> d.token_steps().log_probs().shape == (2, lm.vocab_size)
        True
        """
        shape = self.batch_shape if shape is None else torch.Size(shape)
        numbers = self.numbers.detach().expand(*shape, -1).reshape(-1, len(self.components))
        return self.steps([c.token_steps(shape, share=share) for c in self.components], numbers, self.vocab_size)

    steps: type[ComposedSteps]


class ComposedSteps:
    """Unfinished texts of all components together, one text in each row: `protocols.Steps`.

    ``parts`` are the components' steps, which receive the same tokens; ``numbers`` (R, K) are one number for each row
    and component.
    """

    def __init__(self, parts: list[Steps], numbers: Tensor, vocab_size: int):
        self.parts, self.numbers, self.vocab_size = parts, numbers, vocab_size
        self._moved(None)

    def _moved(self, log_probs: Tensor | None) -> None:
        self._next, self.prefix, self.ended = log_probs, self.parts[0].prefix, self.parts[0].ended

    def together(self) -> Tensor:
        """Returns log p of every next token, (R, V)."""
        raise NotImplementedError

    def log_probs(self) -> Tensor:
        """Returns log p of every next token, (R, V); -inf throughout a row that nothing can follow."""
        if self._next is None:
            self._next = self.together()
            refuse_nan(self._next[~self.ended])
        return self._next

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        log_p = self.log_probs()
        token = draw(log_p, uniform)
        log_prob = log_p.gather(1, token[:, None])[:, 0]
        token = token.masked_fill((log_prob == -torch.inf) | self.ended, text.PAD)
        return token, log_prob.masked_fill(self.ended, 0.0)

    def score(self, tokens: Tensor) -> Tensor:
        return self.log_probs().gather(1, tokens.clamp(min=0)[:, None])[:, 0]

    def append(self, tokens: Tensor) -> None:
        for part in self.parts:
            part.append(tokens)
        self._moved(None)

    def select(self, index: Tensor) -> None:
        for part in self.parts:
            part.select(index)
        self.numbers = self.numbers[index]
        self._moved(None if self._next is None else self._next[index])


class MixtureSteps(ComposedSteps):
    """Steps of a mixture; ``numbers`` are log w_k q_k(z_<t) for the text so far."""

    _each: Tensor | None

    def each(self) -> Tensor:
        """Returns log q_k of every next token, (K, R, V).

        It is computed once for each token, because components may share steps that the next `append` advances.
        """
        if self._each is None:
            self._each = torch.stack([next_log_probs(part, self.vocab_size) for part in self.parts])
        return self._each

    def _moved(self, log_probs: Tensor | None) -> None:
        super()._moved(log_probs)
        self._each = None

    def together(self) -> Tensor:
        return (self.each() + _log_softmax(self.numbers).T[..., None]).logsumexp(0)

    def append(self, tokens: Tensor) -> None:
        gained = self.each().gather(2, tokens.clamp(min=0).expand(len(self.parts), -1)[..., None])[..., 0].T
        self.numbers = self.numbers + gained.masked_fill(self.ended[:, None], 0.0)
        super().append(tokens)

    def select(self, index: Tensor) -> None:
        each = None if self._each is None else self._each[:, index]
        super().select(index)
        self._each = each


class ProductSteps(ComposedSteps):
    """Steps of a product; ``numbers`` are the powers."""

    def together(self) -> Tensor:
        found: Tensor | None = None
        barred: Tensor | None = None
        for part, power in zip(self.parts, self.numbers.unbind(1), strict=True):
            own = next_log_probs(part, self.vocab_size)
            never = own == -torch.inf
            own = own.masked_fill(never, 0.0) * power[:, None]
            found, barred = (own, never) if found is None or barred is None else (found + own, barred | never)
        assert found is not None and barred is not None
        return _log_softmax(found.masked_fill(barred, -torch.inf))


def _log_softmax(x: Tensor) -> Tensor:
    """Returns the log-softmax over the last axis, -inf throughout if every entry is -inf."""
    dead = (x == -torch.inf).all(-1, keepdim=True)
    return x.masked_fill(dead, 0.0).log_softmax(-1).masked_fill(dead, -torch.inf)


class TextMixture(Composed):
    r"""A mixture of distributions over texts: one component is chosen and writes the whole text.

    .. math:: q(z) = \sum_k w_k \, q_k(z), \qquad w = \mathrm{softmax}(logits)

    It is drawn token by token; every component reads along with its own KV cache.

    :param components: K distributions over texts with the same tokens and stop tokens, such as `Completion`; their
        batches broadcast.
    :param logits: (*batch, K), unnormalised log-weights; -inf excludes a component.
    :raises ValueError: naming the argument, if a component is not drawn token by token, has no stop token, has stop
        strings, or has other tokens than the first; or if shapes do not broadcast.

    Shapes: ``batch_shape`` is the common batch; ``event_shape`` is that of the longest component. Gradients flow
    through `log_prob` to ``logits`` and to the components.

    Example::

        mixture = TextMixture([Completion(lm, x, max_tokens=5), Completion(q, x, max_tokens=5)], torch.zeros(2))
        z = pyro.sample("z", mixture)
    """

    steps = MixtureSteps

    def __init__(self, components: Sequence[Any], logits: Tensor):
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise ValueError(f"logits: expected a tensor of floating-point numbers, got {logits!r}")
        super().__init__(components, logits.log_softmax(-1) if logits.dim() else logits, "logits")
        if bool(logits.isnan().any() | (logits == torch.inf).any() | (logits == -torch.inf).all(-1).any()):
            raise ValueError(f"logits: expected finite numbers or -inf, not all -inf, got {logits.tolist()}")

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log q(value), with gradient.

        :param value: texts (..., L); leading axes broadcast with the batch.
        :returns: log-probabilities (..., *batch_shape); -inf for a text that no component can write.

        >>> one = Completion(lm, x, max_tokens=5)
        >>> torch.allclose(TextMixture([one, one], torch.zeros(2)).log_prob(z), one.log_prob(z))
        True
        """
        each = torch.stack(torch.broadcast_tensors(*(c.log_prob(value) for c in self.components)), -1)
        joint = each + self.numbers
        never = (joint == -torch.inf).all(-1, keepdim=True)  # logsumexp there, and its gradient, would be NaN
        found = joint.masked_fill(never, 0.0).logsumexp(-1).masked_fill(never[..., 0], -torch.inf)
        return found.expand(broadcast_shapes(found.shape, self.batch_shape))


class TextProduct(Composed):
    r"""A product of next-token distributions, normalised at every token.

    .. math:: q(z_t \mid z_{<t}) \propto \prod_k q_k(z_t \mid z_{<t})^{a_k}

    It prefers texts that all components with positive powers find probable. With powers 1, 1, -1 of two posteriors and
    their common prior, it is a proposal for the posterior under both conditions. It is not the normalised product of
    texts, :math:`\prod_k q_k(z)^{a_k}`; as a guide of `Importance`, `SMC` or `MetropolisHastings` it is corrected for
    that. A token that some component never writes is impossible, whatever the powers.

    :param components: K distributions over texts, as of `TextMixture`.
    :param powers: (*batch, K), finite numbers a.
    :raises ValueError: as of `TextMixture`, and if a power is not finite.

    Shapes: as of `TextMixture`. `log_prob` is exact and has no gradient.

    Example::

        both = TextProduct([Completion(q, x, max_tokens=5), Completion(lm, x, max_tokens=5)], torch.tensor([2.0, -1.0]))
        z = pyro.sample("z", both)
    """

    steps = ProductSteps

    def __init__(self, components: Sequence[Any], powers: Tensor):
        if not isinstance(powers, Tensor):
            raise ValueError(f"powers: expected a tensor, got {powers!r}")
        if not bool(powers.isfinite().all()):
            raise ValueError(f"powers: expected finite numbers, got {powers.tolist()}")
        super().__init__(components, powers, "powers")
