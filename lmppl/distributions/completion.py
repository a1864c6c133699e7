"""`Completion`: the distribution of the text that follows a prompt, under a language model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints as torch_constraints

from .. import randomness, text
from ..constraints import Check, Constraint, checked, reaches
from ..constraints.arguments import as_list
from ..engine.asking import Asking, asking, asks
from ..engine.decoding import rows_at_once
from ..engine.scoring import Request, with_bos
from ..language_model import LanguageModel
from ..rows import distinct_rows
from ..shapes import broadcast_shapes
from ..tools import Tool
from . import shown
from .arguments import as_count, as_lm, as_text, no_text, refuse_nan
from .insertions import Insertions
from .protocols import PrefixScores
from .rejection import RejectionSteps
from .rules import Rules, Selection
from .support import Texts, every_text
from .token_steps import DeadEnd, TokenSteps


class Completion(TorchDistribution):
    r"""The text that follows ``prompt``: at most ``max_tokens`` tokens, then a stop token, then PAD (-1).

    .. math:: \log p(z) = \sum_{t=1}^{n} \log p(z_t \mid prompt, z_{<t}) + \log p(stop \mid prompt, z_{1..n})

    The distribution is normalised. A stop is impossible before ``min_tokens`` and certain after ``max_tokens``; what is
    forbidden is masked, and the rest is renormalised.

    :param lm: the language model.
    :param prompt: text (*batch, Lp), or a string or nested list of strings, encoded by `LanguageModel.encode`. An empty
        prompt starts from bos.
    :param max_tokens: the largest number of tokens before the stop: an int, or a LongTensor that broadcasts to the
        batch.
    :param min_tokens: the smallest number of tokens before the stop, likewise.
    :param stop: what ends the text: "eos", a string, a token id, or several of these, any of which ends the text. None:
        the text has exactly ``max_tokens`` tokens and no stop; then p(z) is the probability that a text begins with z.
    :param allowed: which token may come next: a BoolTensor (V,), a list of token ids, or a function of the prefix; see
        `lmppl.constraints`. None: every token.
    :param temperature: divides the logits of every token; a positive number, or a tensor that broadcasts to the batch.
        To temper the whole text instead, scale the site (``poutine.scale(scale=1 / T)``): that is a different
        distribution.
    :param tools: functions that insert tokens, see `lmppl.tools`. An inserted token has probability 1. If several tools
        return a string, the first one is used.
    :param validate_args: whether values are checked; None: as ``pyro.enable_validation`` set it.
    :raises ValueError: naming the argument: for a stop that no tokens spell, shapes that do not broadcast, a constraint
        that allows no text, or a prompt and text longer than the model's context.

    Shapes: ``batch_shape`` is ``prompt.shape[:-1]``, broadcast with tensor parameters. ``event_shape`` is
    ``(max_tokens + 1,)``, or ``(max_tokens,)`` if there is no stop token. V is the size of the vocabulary.

    Gradients flow through `log_prob` to the language model's trainable parameters and to ``temperature``. Sampling runs
    without gradient.

    A stop that is one token means that token only, even if other tokens can spell it too. A string of several tokens is
    a *stop string*: the text ends after the first token at whose end the decoded text ends with the string, whatever
    tokens spell it. The string is part of the text. A token that begins before the string may complete it; a token that
    runs over its end does not end the text. A token that would complete the string after fewer than ``min_tokens``
    other tokens is impossible. A stop string cannot be made certain at the limit:

    - If there is a stop token too: a text that has not ended after ``max_tokens`` tokens gets a stop token. A text that
      a stop string ends has at most ``max_tokens`` tokens, including those of the string, and no stop token.
    - If there are stop strings only: a text that has not ended after ``max_tokens`` tokens is cut off. Then no prefix
      is terminable, as without a stop.

    >>> lm = LanguageModel.embedded("stories")
    >>> d = Completion(lm, "Tom went to the kitchen.", max_tokens=9, stop=".")
    >>> d.batch_shape, d.event_shape
    (torch.Size([]), torch.Size([10]))
    >>> round(d.log_prob(lm.encode(" He took the small loaf.")).item(), 1)
    -7.1
    >>> lm.decode(d.sample((3,)))  # three texts, such as ' He took the small loaf.'

    Example::

        def model(x, y):  # a latent text z between x and the observed y
            with pyro.plate("stories", len(x)):
                z = pyro.sample("z", Completion(lm, x, max_tokens=7, stop="."))
                pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=y.shape[-1], stop=None), obs=y)
    """

    arg_constraints: dict[str, torch_constraints.Constraint] = {}
    has_enumerate_support = True

    def __init__(
        self,
        lm: LanguageModel,
        prompt: Tensor | str | list[Any],
        *,
        max_tokens: int | Tensor,
        min_tokens: int | Tensor = 0,
        stop: str | int | Iterable[str | int] | Tensor | None = "eos",
        allowed: Constraint | Iterable[int] | None = None,
        temperature: float | Tensor = 1.0,
        tools: Sequence[Tool] = (),
        validate_args: bool | None = None,
    ):
        self.lm = as_lm(lm)
        self.prompt = as_text(lm, prompt, "prompt")
        device = self.prompt.device
        self.stop, self.stop_strings = lm.stops(stop)
        self.max_tokens = as_count(max_tokens, "max_tokens", device)
        self.min_tokens = as_count(min_tokens, "min_tokens", device)
        if not isinstance(temperature, float | int | Tensor) or isinstance(temperature, bool):
            raise ValueError(f"temperature: expected a positive number or a tensor of them, got {temperature!r}")
        self.temperature = torch.as_tensor(temperature, device=device)
        self._epsilon = torch.zeros((), device=device)
        if not bool((self.temperature > 0).all()):
            raise ValueError(f"temperature: must be positive, got {temperature}")
        if bool((self.stop >= lm.vocab_size).any()):
            raise ValueError(f"stop: {stop!r} lies outside the vocabulary of {lm.vocab_size} tokens")
        self.allowed = checked(allowed, lm.vocab_size, device)
        self.tools = tuple(as_list(tools, "tools", "a list of tools, as (Calculator(),)"))
        self._insertions = Insertions(lm, self.tools, self.stop, self.stop_strings) if self.tools else None
        self._limit = int(self.max_tokens.max())
        parts = (self.prompt.shape[:-1], self.max_tokens.shape, self.min_tokens.shape, self.temperature.shape)
        try:
            self._native = broadcast_shapes(*parts)
        except RuntimeError as error:
            raise ValueError(
                "prompt, max_tokens, min_tokens, temperature: shapes do not broadcast: "
                + ", ".join(str(tuple(p)) for p in parts)
            ) from error
        if bool((self.min_tokens > self.max_tokens).any()):
            raise ValueError(f"min_tokens: {min_tokens} exceeds max_tokens {max_tokens}")
        least = int(self.min_tokens.max()) if self.stop.numel() or self.stop_strings is not None else self._limit
        if self.allowed is not None and not tools and not reaches(self.allowed, least, self.stop):
            raise ValueError(f"allowed: the constraint permits no text of {least} tokens before its stop")
        most = self.prompt.shape[-1] + 1 + self._limit  # with a bos, and no padding
        if lm.max_length is not None and most > lm.max_length and self._native.numel():
            longest = int((text.length(with_bos(lm, self.prompt)) + self.max_tokens).max())
            if longest > lm.max_length:
                raise ValueError(
                    f"prompt: prompt and max_tokens need {longest} tokens, but this model's context holds "
                    f"{lm.max_length}; shorten the prompt or max_tokens"
                )
        event_shape = torch.Size([self._limit + (1 if self.stop.numel() else 0)])
        super().__init__(self._native, event_shape, validate_args=validate_args)

    # -- shown ---------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        """One line: the first prompts, and what may follow."""
        return shown.plain(self)

    def _repr_html_(self) -> str:
        return shown.html(self)

    # -- the distribution's shape --------------------------------------------------------------------------------

    @property
    def support(self) -> Texts:
        """The constraint on values: ids of the vocabulary, padded on the right."""
        return Texts(self.lm.vocab_size)

    @property
    def vocab_size(self) -> int:
        """The number V of token ids."""
        return self.lm.vocab_size

    def decode(self, value: Tensor) -> Any:
        """Returns texts as strings, without special tokens.

        :param value: texts (..., L).
        :returns: a string, or nested lists of strings with the shape of the leading axes.

        >>> Completion(lm, x, max_tokens=5).decode(lm.encode(["abc", "d"], stop="eos"))
        ['abc', 'd']
        """
        return self.lm.decode(value)

    def expand(self, batch_shape: torch.Size, _instance: Completion | None = None) -> Completion:
        """Returns the same distribution with a larger batch; the prompt is not copied, and nothing is computed twice.

        :param batch_shape: the new shape, with which the batch broadcasts.
        :returns: a `Completion`.

        >>> Completion(lm, "once", max_tokens=5).expand((4, 2)).batch_shape
        torch.Size([4, 2])
        """
        new = self._get_checked_instance(Completion, _instance)
        new.__dict__.update(self.__dict__)
        shape = broadcast_shapes(self.batch_shape, torch.Size(batch_shape))
        super(Completion, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def broadened(self, temperature: float | Tensor = 1.0, epsilon: float | Tensor = 0.0) -> Completion:
        r"""Returns a flatter distribution, for exploration: a higher temperature, mixed with an even draw.

        .. math:: p'(v) = (1 - \epsilon) \, \mathrm{softmax}(logits / (T' T))_v + \epsilon / \#\text{allowed}

        for every allowed token v, with T this distribution's temperature.

        :param temperature: T', a number or a tensor that broadcasts to the batch.
        :param epsilon: the probability with which each token is drawn evenly from those allowed, likewise.
        :returns: a `Completion`.

        >>> z = Completion(lm, x, max_tokens=5).broadened(temperature=1.5, epsilon=0.01).sample()
        """
        new = Completion.__new__(Completion)
        new.__dict__.update(self.__dict__)
        new.temperature = self.temperature * torch.as_tensor(temperature, device=self.prompt.device)
        new._epsilon = torch.as_tensor(epsilon, device=self.prompt.device)
        new._native = broadcast_shapes(self._native, new.temperature.shape, new._epsilon.shape)
        shape = broadcast_shapes(self.batch_shape, new._native)
        super(Completion, new).__init__(shape, self.event_shape, validate_args=False)
        return new

    def after(self, prompt: Tensor, lm: LanguageModel | None = None) -> Completion:
        """Returns the same distribution with another prompt, and with another language model if one is given.

        :param prompt: text (*batch, Lp).
        :param lm: the language model; None: the same one.
        :returns: a `Completion` with the same limits, stops, constraint, temperature and tools.

        >>> Completion(lm, x, max_tokens=5).after(lm.join(x, z), lm=q).lm is q
        True
        """
        new = Completion(
            self.lm if lm is None else lm,
            prompt,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            stop=[*self.stop.tolist(), *(self.stop_strings.strings if self.stop_strings is not None else ())] or None,
            allowed=self.allowed,
            temperature=self.temperature,
            tools=self.tools,
            validate_args=self._validate_args,
        )
        return new.broadened(epsilon=self._epsilon)

    def rows(self, rows: Tensor) -> Completion:
        """Returns some elements of the flattened batch as a distribution.

        :param rows: LongTensor (R,), numbers of elements; they may repeat.
        :returns: a `Completion` with ``batch_shape`` (R,).

        >>> Completion(lm, x, max_tokens=5).rows(torch.tensor([1, 1, 0])).batch_shape
        torch.Size([3])
        """
        new = self.expand(self.batch_shape)
        new.prompt = self.prompt.expand(*self.batch_shape, -1).flatten(0, -2)[rows]
        for name in ("max_tokens", "min_tokens", "temperature", "_epsilon"):
            number = getattr(self, name)
            setattr(new, name, number.expand(self.batch_shape).flatten()[rows] if number.dim() else number)
        new._native = rows.shape
        super(Completion, new).__init__(rows.shape, self.event_shape, validate_args=False)
        return new

    def rules(self, shape: torch.Size) -> Rules:
        """Returns the rules for each text of a flattened shape: its stops, limits, constraint and tools.

        :param shape: a shape with which the batch broadcasts.
        :returns: `lmppl.distributions.rules.Rules`, which turns logits into log-probabilities.

        >>> d = Completion(lm, x, max_tokens=5)
        >>> rules = d.rules(d.batch_shape)
        >>> rules.max_tokens
        tensor(5)
        """

        def per_row(x: Tensor) -> Tensor:
            return x.expand(shape).flatten() if x.dim() else x

        return Rules(
            self.stop,
            per_row(self.max_tokens),
            per_row(self.min_tokens),
            per_row(self.temperature),
            self.allowed,
            self.lm.vocab_size,
            per_row(self._epsilon),
            self._insertions,
            self.stop_strings,
        )

    # -- sampling ------------------------------------------------------------------------------------------------

    def token_steps(self, shape: torch.Size | None = None, share: Any = None) -> TokenSteps:
        """Returns unfinished texts that grow token by token, as SMC and sampling use them; see `protocols.Steps`.

        :param shape: the shape of the texts, with which the batch broadcasts; None: the batch. Rows of the result are
            the flattened shape.
        :param share: steps of another distribution that receive the same tokens; if they have the same language model
            and the same prompts, logits are computed once for both.
        :returns: `lmppl.distributions.token_steps.TokenSteps`.

        >>> steps = Completion(lm, x, max_tokens=5).token_steps()
        >>> token, log_p = steps.draw(torch.rand(2))  # the first token of both texts
        >>> steps.append(token)
        >>> steps.prefix.shape
        torch.Size([2, 1])
        """
        shape = self.batch_shape if shape is None else shape
        index = self._prompt_index(shape)
        if share is not None:
            prompt = self.prompt.flatten(0, -2)[index] if self.prompt.dim() > 1 else self.prompt.expand(len(index), -1)
            parts = (s for s in getattr(share, "parts", (share,)) if isinstance(s, TokenSteps) and s.lm is self.lm)
            same = (s for s in parts if len(s.prompt) == len(prompt) and bool(text.equal(s.prompt, prompt).all()))
            share = next(same, None)
        return self._steps(self.rules(shape), index, share)

    def _prompt_index(self, shape: torch.Size) -> Tensor:
        """Returns which prompt each row of the flattened ``shape`` continues."""
        batch = self.prompt.shape[:-1]
        return torch.arange(batch.numel(), device=self.prompt.device).view(batch).expand(shape).flatten()

    def _prompts(self) -> Tensor:
        """Returns the prompts, (U, Lp), with at least one column."""
        prompts = self.prompt.reshape(self.prompt.shape[:-1].numel(), self.prompt.shape[-1])
        return text.pad(prompts, max(1, prompts.shape[-1]))  # distinct_rows needs at least one column

    def _steps(self, rules: Rules, index: Tensor, share: TokenSteps | None = None) -> TokenSteps:
        prompts = self._prompts()
        used, index = torch.unique(index, return_inverse=True)
        distinct, merged = distinct_rows(prompts[used])
        kind = RejectionSteps if isinstance(rules.allowed, Check) else TokenSteps
        return kind(self.lm, distinct, merged[index], rules, share)

    @torch.no_grad()
    def sample_and_log_prob(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Returns a sample and its log-probability, both from the same KV-cached pass, without gradient.

        If a constraint allows no token after some prefix, the text ends there without a stop, and its log-probability
        is -inf.

        :param sample_shape: leading axes of the sample.
        :returns: texts (*sample_shape, *batch_shape, *event_shape), and log p (*sample_shape, *batch_shape).

        >>> z, log_p = Completion(lm, x, max_tokens=5).sample_and_log_prob((3,))
        >>> z.shape, log_p.shape
        (torch.Size([3, 2, 6]), torch.Size([3, 2]))
        """
        return self._draw(sample_shape, exact=True)

    def _draw(self, sample_shape: torch.Size | tuple[int, ...], exact: bool) -> tuple[Tensor, Tensor]:
        shape = torch.Size(sample_shape) + self.batch_shape
        nothing = torch.full((shape.numel(), self.event_shape[0]), text.PAD, device=self.prompt.device)
        return self._grow(shape, nothing, exact)

    @torch.no_grad()
    def regrow(self, value: Tensor, keep: Tensor | int) -> tuple[Tensor, Tensor]:
        r"""Draws texts anew after their first ``keep`` tokens; returns them with the log-probability of what was drawn.

        .. math:: z'_{1..k} = z_{1..k}, \qquad z'_{>k} \sim p(\cdot \mid prompt, z_{1..k})

        ``keep = 0`` is a fresh draw. A text whose stop is kept is returned unchanged, with log-probability 0. If a
        constraint allows no token after some prefix, the text ends there without a stop, with -inf. The log-probability
        of the old ending is ``token_log_probs(value)``, summed over the tokens from ``keep`` on. No more tokens go
        through the network than in drawing the result afresh.

        :param value: texts (..., L); leading axes broadcast with the batch.
        :param keep: the number of tokens to keep, an int or LongTensor (...).
        :returns: texts (..., *event_shape), and log p of the new tokens (...).
        :raises ValueError: if ``keep`` is negative, or keeps more tokens than a text can have.

        >>> d = Completion(lm, x, max_tokens=5)
        >>> new, log_p = d.regrow(d.sample(), keep=2)  # the first two tokens stay
        """
        keep, value = torch.as_tensor(keep, device=self.prompt.device), value.to(self.prompt.device)
        if keep.is_floating_point() or keep.dtype == torch.bool or bool((keep < 0).any()):
            raise ValueError(f"keep: expected non-negative integers, got {keep}")
        if self._validate_args:
            text.validate(value, "value", self.lm.vocab_size)
        shape = broadcast_shapes(value.shape[:-1], keep.shape, self.batch_shape)
        kept = torch.where(torch.arange(value.shape[-1], device=value.device) < keep[..., None], value, text.PAD)
        try:
            kept = text.pad(kept, self.event_shape[0])
        except ValueError as error:
            raise ValueError(f"keep: it exceeds the {self.event_shape[0]} tokens that a text can have") from error
        return self._grow(shape, kept.expand(*shape, -1).reshape(shape.numel(), -1))

    def _grow(self, shape: torch.Size, kept: Tensor, exact: bool = True) -> tuple[Tensor, Tensor]:
        """Returns texts (*shape, *event) that begin with ``kept`` (rows, event), and log p of the rest, (*shape).

        With ``exact=False`` that log-probability may be an estimate: a `Check` estimates it.
        """
        rows, width = kept.shape
        # Drawn first, so that a seed gives the same texts however the rows are split into chunks.
        uniform = randomness.uniform((*shape, width), right=1, device=kept.device).reshape(rows, width)
        index, rules = self._prompt_index(shape), self.rules(shape)
        value, length = kept.clone(), text.length(kept)
        log_prob = torch.zeros(rows, device=kept.device, dtype=_score_dtype(self.lm))
        whole = rules.stops.ends(kept).any(-1)
        if not self.stop.numel():
            whole = whole | (length >= rules.max_tokens)
        at_once = rows_at_once(self.lm, self._prompts(), width + 1)
        unfinished = (~whole).nonzero()[:, 0]
        unfinished = unfinished[index[unfinished].argsort(stable=True)]  # rows with one prompt go into few chunks
        for chunk in unfinished.split(at_once) if len(unfinished) else ():
            steps = self._steps(rules.select(chunk), index[chunk])
            draw = steps.draw if exact else steps.propose
            first, last = int(length[chunk].min()), int(length[chunk].max())
            if first:  # the tokens that all rows keep, in one pass
                steps.append(kept[chunk, :first])
            gained = log_prob[chunk]
            for t in range(first, width):
                token, gain = draw(uniform[chunk, t])
                if t < last:  # some rows still keep their own token
                    keeps = t < length[chunk]
                    token, gain = torch.where(keeps, kept[chunk, t], token), gain.masked_fill(keeps, 0.0)
                steps.append(token)
                gained = gained + gain
                if steps.alive < 0.5 * len(chunk) or t == width - 1:  # rows that have ended need no more steps
                    value[chunk, : t + 1], log_prob[chunk] = steps.prefix, gained.to(log_prob.dtype)
                    if not steps.alive:
                        break
                    left = (~steps.ended).nonzero()[:, 0]
                    steps.select(left)
                    chunk, gained = chunk[left], gained[left]
        refuse_nan(log_prob)
        return value.view(*shape, width), log_prob.view(shape)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Returns texts, drawn by KV-cached decoding without gradient.

        :param sample_shape: leading axes of the sample.
        :returns: LongTensor (*sample_shape, *batch_shape, *event_shape).
        :raises DeadEnd: if a constraint allows no token after a prefix that was drawn; the message shows the prefix.

        >>> Completion(lm, x, max_tokens=5).sample((3,)).shape
        torch.Size([3, 2, 6])
        """
        value, log_prob = self._draw(sample_shape, exact=False)
        dead = value[log_prob == -torch.inf]
        if len(dead):
            raise DeadEnd.after(self.lm, dead[0])
        return value

    def placeholder(self) -> Tensor:
        """Returns some text of the right shape without running the network.

        :returns: LongTensor (*batch_shape, *event_shape).

        >>> Completion(lm, x, max_tokens=5).placeholder().shape
        torch.Size([2, 6])
        """
        filler = self._filler()
        column = torch.arange(self.event_shape[0], device=self.prompt.device)
        if not self.stop.numel():
            return torch.where(column < self.max_tokens[..., None], filler, text.PAD).expand(self.shape())
        short = self.min_tokens[..., None]
        return torch.where(column < short, filler, torch.where(column == short, self.stop[0], text.PAD)).expand(
            self.shape()
        )

    def _filler(self) -> int:
        """Returns a token that does not end a text, and repeats of which do not either if there is one."""
        ids = torch.arange(self.lm.vocab_size, device=self.stop.device)
        content = ~torch.isin(ids, self.stop)
        if self.stop_strings is not None:
            alike = ids[:, None].expand(-1, self.stop_strings.longest)
            harmless = content & ~self.stop_strings.ends(alike).any(-1)
            content = harmless if bool(harmless.any()) else content
        return int(content.long().argmax())

    # -- scoring -------------------------------------------------------------------------------------------------

    @asks
    def log_prob(self, value: Tensor) -> Asking[Tensor]:
        """Returns log p(value), with gradient.

        A value narrower than the event is padded, so ``lm.encode(...)`` works as a value. Extra columns must be
        padding.

        :param value: texts (..., L); leading axes broadcast with the batch.
        :returns: log-probabilities (..., *batch_shape); -inf for a text that cannot be drawn.
        :raises ValueError: for a malformed text: an id outside the vocabulary, or padding before a token.

        >>> lm = LanguageModel.embedded("stories")
        >>> d = Completion(lm, "Tom went to the kitchen.", max_tokens=9, stop=".")
        >>> d.log_prob(lm.encode([" He sliced it.", " He sliced"])).tolist()[1]  # a text without its stop
        -inf
        """
        scores = yield from asking(self._scores, value)
        return self._expanded(scores.token.sum(-1).masked_fill(~scores.possible, -torch.inf))

    def token_log_probs(self, value: Tensor) -> Tensor:
        r"""Returns the log-probability of every token of a value.

        .. math:: \log p(z_t \mid prompt, z_{<t}), \quad t = 1, \dots, L

        :param value: texts (..., L); leading axes broadcast with the batch.
        :returns: (..., *batch_shape, L), 0 at padding; -inf for tokens that cannot come there.
        :raises ValueError: for a malformed text.

        >>> d = Completion(lm, x, max_tokens=5)
        >>> torch.allclose(d.token_log_probs(z).sum(-1), d.log_prob(z))
        True
        """
        scores = self._scores(value)
        width = value.shape[-1]
        token = torch.nn.functional.pad(scores.token, (0, max(0, width - scores.token.shape[-1])))[..., :width]
        beyond = (value[..., self.event_shape[0] :] != text.PAD).any(-1)
        return self._expanded(token.masked_fill(beyond[..., None], -torch.inf), 1)

    def prefix_log_probs(self, value: Tensor) -> Tensor:
        r"""Returns the log-probability of every prefix of a value, followed by a stop, from one pass.

        .. math:: \log p(z_1 \dots z_t \, stop), \quad t = 0, \dots, max\_tokens

        The stop is the value's own stop token. If a stop string ends the text after n tokens, column n is log p(z), and
        the prefixes before it end with the first stop token.

        :param value: texts (..., L); leading axes broadcast with the batch.
        :returns: (..., *batch_shape, max_tokens + 1); -inf where the text cannot stop, and past the value's end.
            Without stop tokens every entry is -inf.
        :raises ValueError: for a malformed text.

        >>> d = Completion(lm, x, max_tokens=5)
        >>> d.prefix_log_probs(z).shape
        torch.Size([2, 6])
        """
        return self.prefix_scores(value).log_probs

    @asks
    def prefix_scores(self, value: Tensor) -> Asking[PrefixScores]:
        """Returns `prefix_log_probs` and the log-probabilities of stopping after each prefix, from one pass.

        :param value: texts (..., L); leading axes broadcast with the batch.
        :returns: a named tuple of ``log_probs``, log p(z_1..z_t stop), and ``stop_log_probs``, log p(stop | z_1..z_t);
            both (..., *batch_shape, max_tokens + 1).
        :raises ValueError: for a malformed text.

        >>> scores = Completion(lm, x, max_tokens=5).prefix_scores(z)
        >>> scores.stop_log_probs.shape
        torch.Size([2, 6])
        """
        scores = yield from asking(self._scores, value)
        before = torch.nn.functional.pad(scores.token, (1, 0)).cumsum(-1)  # (..., E + 1): log p(z_1..z_t)
        if not self.stop.numel():
            never = torch.full_like(before, -torch.inf)  # (..., max_tokens + 1)
            return PrefixScores(self._expanded(never, 1), self._expanded(never, 1))
        stop = scores.stop
        log_probs = (before[..., :-1].masked_fill(stop == -torch.inf, 0.0) + stop).masked_fill(
            stop == -torch.inf, -torch.inf
        )
        return PrefixScores(self._expanded(log_probs, 1), self._expanded(stop, 1))

    @asks
    def _scores(self, value: Tensor) -> Asking[_Scores]:
        if not isinstance(value, Tensor):
            raise ValueError(f"value: {no_text(self, value)}")
        value = value.to(self.prompt.device)
        if self._validate_args:
            text.validate(value, "value", self.lm.vocab_size)
            try:
                broadcast_shapes(value.shape[:-1], self.batch_shape)
            except RuntimeError as error:
                raise ValueError(
                    f"value: leading axes {tuple(value.shape[:-1])} do not broadcast with the batch "
                    f"{tuple(self.batch_shape)}"
                ) from error
        width = self.event_shape[0]
        too_long = (value[..., width:] != text.PAD).any(-1)
        value = torch.nn.functional.pad(value[..., :width], (0, max(0, width - value.shape[-1])), value=text.PAD)
        batch = broadcast_shapes(self._native, value.shape[:-1])
        length = text.length(value)
        rules = self.rules(batch)
        at = torch.arange(width, device=value.device)
        ending = rules.stops.ending(value)
        end, complete = ending.at, ending.ended
        if not self.stop.numel():
            complete = complete & (length <= self.max_tokens) | (length == self.max_tokens)
        possible = complete & (length == ending.width) & ~too_long
        # The token that ends the text predicts nothing; neither does the last token if there is no stop token.
        read = end - (ending.by_string.long() if self.stop.numel() else 1)
        # The network reads no further than the longest value.
        reach = min(max(1, int(read.max()) + 1) if value.numel() else 0, width, self._uncertain)
        flat = value.expand(*batch, width)[..., :reach].reshape(batch.numel(), reach)
        flat_own = ending.stop.expand(batch).flatten()

        asked = torch.stack([flat.clamp(min=0), flat_own[:, None].expand(-1, reach)], -1)  # (R, T, 2)
        if reach:
            needed = value.masked_fill(at >= read[..., None], text.PAD)
            own = rules.columns()
            key = None if own is None else torch.cat([flat, flat_own[:, None], own.expand(len(flat), -1)], 1)
            needed = needed.expand(*batch, width)[..., :reach]  # rules may differ between equal prompts and values
            both = yield Request(self.lm, self.prompt, needed, Selection(rules, asked, flat), key)
            token, stop = torch.nn.functional.pad(both, (0, 0, 0, width - reach)).unbind(-1)
        else:
            token = stop = torch.zeros(*batch, width, device=value.device, dtype=_score_dtype(self.lm))
        refuse_nan(token)
        token = token.masked_fill((at >= self._uncertain) & ~rules.is_stop(value), -torch.inf)
        token = token.masked_fill(at >= length[..., None], 0.0)
        token = token.masked_fill((at >= ending.width[..., None]) & (at < length[..., None]), -torch.inf)
        stop = stop.masked_fill(at > end[..., None], -torch.inf)
        stop = stop.masked_fill(ending.by_string[..., None] & (at == end[..., None]), 0.0)
        return _Scores(token, stop, possible.expand(batch))

    @property
    def _uncertain(self) -> int:
        """The number of tokens of a text that are not certain: a single stop is certain at the limit."""
        shared = self.stop.numel() == 1 and not self.max_tokens.dim()
        return int(self.max_tokens) if shared else int(self.event_shape[0])

    def _expanded(self, x: Tensor, event_dim: int = 0) -> Tensor:
        batch, event = x.shape[: x.dim() - event_dim], x.shape[x.dim() - event_dim :]
        return x.expand(broadcast_shapes(batch, self.batch_shape) + event)

    # -- enumeration ---------------------------------------------------------------------------------------------

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Returns every text that can be drawn.

        :param expand: whether the batch axes have the batch's sizes; False: size 1.
        :returns: LongTensor (K, *batch_shape, *event_shape), or with batch axes of size 1.
        :raises ValueError: if there are more than a million texts. `lmppl.inference.Enumeration` searches larger
            spaces.

        >>> d = Completion(lm, x, max_tokens=1, allowed=only(lm, ["a", "b", "eos"]))
        >>> d.decode(d.enumerate_support(expand=False)[:, 0])
        ['', 'a', 'b']
        """
        support = every_text(self.rules(self._native))
        support = support.view(len(support), *[1] * len(self.batch_shape), self.event_shape[0])
        return support.expand(-1, *self.batch_shape, -1) if expand else support


class _Scores(NamedTuple):
    token: Tensor  # (*batch, E): log p(z_t | z_<t), 0 at padding, -inf past a stop
    stop: Tensor  # (*batch, E): log p(own stop | z_1..z_t), -inf past the end
    possible: Tensor  # (*batch): the value is a complete text of this distribution's form


def _score_dtype(lm: LanguageModel) -> torch.dtype:
    return lm.dtype if lm.dtype in (torch.float32, torch.float64) else torch.float32
