"""`Completion`: the distribution of the text that follows a prompt under a language model."""

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
    r"""The text that follows ``prompt``: at most ``max_tokens`` tokens, then a stop token, then PAD.

    .. math:: \log p(z) = \sum_{t=1}^{n} \log p(z_t \mid prompt, z_{<t}) + \log p(stop \mid prompt, z_{1..n})

    It normalises: a stop is impossible before ``min_tokens`` and certain after ``max_tokens``, by masking and
    renormalising.  ``temperature`` divides the logits of every token; to temper the *sequence*, scale the site
    (``poutine.scale(scale=1 / T)``): a different distribution.

    :param lm: the language model.
    :param prompt: text (*batch, Lp), or strings as `LanguageModel.encode` takes them; an empty prompt starts from bos.
    :param max_tokens: the most tokens before the stop, an int or LongTensor broadcasting to the batch.
    :param min_tokens: the fewest, likewise.
    :param stop: "eos", a string, a token id, or several of these (any of them ends the text); None: exactly
        ``max_tokens`` tokens and no stop, so that the value says "the text begins with these tokens".
    :param allowed: a constraint on the next token, see `lmppl.constraints`.
    :param temperature: per token; a number, or a tensor broadcasting to the batch.
    :param tools: what inserts tokens, see `lmppl.tools`; an inserted token has probability 1.  The first tool that
        answers is heard.

    A stop that is one token is that token, however else its string may be spelled.  A string of several tokens, a *stop
    string*, ends the text right after the first token at whose end the completion, decoded, ends with it: spelled in
    any way, by tokens that begin before it too, but not by one that runs over its end.  It is part of the text.  A
    token that would complete it after fewer than ``min_tokens`` others is impossible.  It can not be made certain at
    the limit:

    - beside a stop token, such a text has at most ``max_tokens`` tokens, the stop string's among them, and no stop
      token; a text that has not ended after ``max_tokens`` tokens gets one, as ever.
    - with stop strings alone, a text that has not ended after ``max_tokens`` tokens is cut off there.  No prefix is
      terminable then, as without a stop.

    Shapes: ``batch_shape = prompt.shape[:-1]`` (broadcast with tensor parameters); ``event_shape = (max_tokens + 1,)``,
    ``(max_tokens,)`` without a stop token.

    Gradients flow to the language model's trainable parameters through `log_prob`; sampling runs without gradient.

    :raises ValueError: naming the argument, for a stop that no tokens spell, shapes that do not broadcast, or a text
        longer than the model's context.

    Example::

        lm = LanguageModel.embedded("stories")
        z = pyro.sample("z", Completion(lm, lm.encode("Tom went to the kitchen."), max_tokens=9, stop="."))
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
        return Texts(self.lm.vocab_size)

    @property
    def vocab_size(self) -> int:
        return self.lm.vocab_size

    def decode(self, value: Tensor) -> Any:
        """Texts (..., L) as strings, nested lists of the leading axes."""
        return self.lm.decode(value)

    def expand(self, batch_shape: torch.Size, _instance: Completion | None = None) -> Completion:
        """The same distribution on a larger batch; the prompt is not copied, so nothing is computed twice."""
        new = self._get_checked_instance(Completion, _instance)
        new.__dict__.update(self.__dict__)
        shape = broadcast_shapes(self.batch_shape, torch.Size(batch_shape))
        super(Completion, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def broadened(self, temperature: float | Tensor = 1.0, epsilon: float | Tensor = 0.0) -> Completion:
        """The same distribution with every token's temperature multiplied by ``temperature`` and then, with
        probability ``epsilon``, each token drawn evenly from those allowed; both broadcast.
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
        """The same distribution after another prompt (*batch, Lp), written by ``lm`` where given."""
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
        """Elements ``rows`` (R,) of the flattened batch, as a distribution of batch (R,)."""
        new = self.expand(self.batch_shape)
        new.prompt = self.prompt.expand(*self.batch_shape, -1).flatten(0, -2)[rows]
        for name in ("max_tokens", "min_tokens", "temperature", "_epsilon"):
            number = getattr(self, name)
            setattr(new, name, number.expand(self.batch_shape).flatten()[rows] if number.dim() else number)
        new._native = rows.shape
        super(Completion, new).__init__(rows.shape, self.event_shape, validate_args=False)
        return new

    def rules(self, shape: torch.Size) -> Rules:
        """What the arguments say of each text of the flattened ``shape``, with which the batch broadcasts."""

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
        """Grow texts of shape ``shape`` (default: the batch) token by token; rows are the flattened ``shape``."""
        shape = self.batch_shape if shape is None else shape
        index = self._prompt_index(shape)
        if share is not None:
            prompt = self.prompt.flatten(0, -2)[index] if self.prompt.dim() > 1 else self.prompt.expand(len(index), -1)
            parts = (s for s in getattr(share, "parts", (share,)) if isinstance(s, TokenSteps) and s.lm is self.lm)
            same = (s for s in parts if len(s.prompt) == len(prompt) and bool(text.equal(s.prompt, prompt).all()))
            share = next(same, None)
        return self._steps(self.rules(shape), index, share)

    def _prompt_index(self, shape: torch.Size) -> Tensor:
        """Which prompt each row of the flattened ``shape`` continues."""
        batch = self.prompt.shape[:-1]
        return torch.arange(batch.numel(), device=self.prompt.device).view(batch).expand(shape).flatten()

    def _prompts(self) -> Tensor:
        """(U, Lp)."""
        prompts = self.prompt.reshape(self.prompt.shape[:-1].numel(), self.prompt.shape[-1])
        return text.pad(prompts, max(1, prompts.shape[-1]))  # an empty prompt has a row too

    def _steps(self, rules: Rules, index: Tensor, share: TokenSteps | None = None) -> TokenSteps:
        prompts = self._prompts()
        used, index = torch.unique(index, return_inverse=True)
        distinct, merged = distinct_rows(prompts[used])
        kind = RejectionSteps if isinstance(rules.allowed, Check) else TokenSteps
        return kind(self.lm, distinct, merged[index], rules, share)

    @torch.no_grad()
    def sample_and_log_prob(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """A sample and its log-probability, both from the same KV-cached pass.

        Where a constraint permits nothing, the text ends without a stop, and its log-probability is -inf.
        """
        return self._draw(sample_shape, exact=True)

    def _draw(self, sample_shape: torch.Size | tuple[int, ...], exact: bool) -> tuple[Tensor, Tensor]:
        shape = torch.Size(sample_shape) + self.batch_shape
        nothing = torch.full((shape.numel(), self.event_shape[0]), text.PAD, device=self.prompt.device)
        return self._grow(shape, nothing, exact)

    @torch.no_grad()
    def regrow(self, value: Tensor, keep: Tensor | int) -> tuple[Tensor, Tensor]:
        r"""The texts with all but their first ``keep`` tokens drawn anew, and the log-probability of what was drawn.

        .. math:: z'_{1..k} = z_{1..k}, \qquad z'_{>k} \sim p(\cdot \mid prompt, z_{1..k})

        ``value`` (..., L), ``keep`` (...), leading axes broadcasting with the batch -> (..., *event), (...).  No token
        more goes through the network than in drawing the result afresh; ``keep = 0`` is a fresh draw, and a text whose
        stop is kept comes back as it was, with 0.  A text that a constraint lets go no further ends there without a
        stop, with -inf.  The log-probability of the old ending is ``token_log_probs(value)``,
        summed over the tokens from ``keep`` on.

        :raises ValueError: for a negative ``keep``, and for one that keeps more tokens than a text can have.
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
            raise ValueError(f"keep: it keeps more tokens than the {self.event_shape[0]} of this text") from error
        return self._grow(shape, kept.expand(*shape, -1).reshape(shape.numel(), -1))

    def _grow(self, shape: torch.Size, kept: Tensor, exact: bool = True) -> tuple[Tensor, Tensor]:
        """Texts (*shape, *event) that begin with ``kept`` (rows, event), and log p of the rest, (*shape); unless it
        need not be ``exact``, where a `Check` estimates it.
        """
        rows, width = kept.shape
        # Drawn up front, so that the same seed gives the same texts however the rows are chunked.
        uniform = randomness.uniform((*shape, width), right=1, device=kept.device).reshape(rows, width)
        index, rules = self._prompt_index(shape), self.rules(shape)
        value, length = kept.clone(), text.length(kept)
        log_prob = torch.zeros(rows, device=kept.device, dtype=_score_dtype(self.lm))
        whole = rules.stops.ends(kept).any(-1)
        if not self.stop.numel():
            whole = whole | (length >= rules.max_tokens)
        at_once = rows_at_once(self.lm, self._prompts(), width + 1)
        unfinished = (~whole).nonzero()[:, 0]
        unfinished = unfinished[index[unfinished].argsort(stable=True)]  # a prompt's rows in as few chunks as can be
        for chunk in unfinished.split(at_once) if len(unfinished) else ():
            steps = self._steps(rules.select(chunk), index[chunk])
            draw = steps.draw if exact else steps.propose
            first, last = int(length[chunk].min()), int(length[chunk].max())
            if first:  # what all rows keep, in one pass
                steps.append(kept[chunk, :first])
            gained = log_prob[chunk]
            for t in range(first, width):
                token, gain = draw(uniform[chunk, t])
                if t < last:  # some rows keep a token more
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
        """Texts (*sample_shape, *batch_shape, *event_shape), by KV-cached decoding without gradient.

        :raises DeadEnd: where a constraint permits nothing after a text that was drawn, which it names.
        """
        value, log_prob = self._draw(sample_shape, exact=False)
        dead = value[log_prob == -torch.inf]
        if len(dead):
            raise DeadEnd.after(self.lm, dead[0])
        return value

    def placeholder(self) -> Tensor:
        """Some text of the right shape (*batch, *event), got without asking the network."""
        filler = self._filler()
        column = torch.arange(self.event_shape[0], device=self.prompt.device)
        if not self.stop.numel():
            return torch.where(column < self.max_tokens[..., None], filler, text.PAD).expand(self.shape())
        short = self.min_tokens[..., None]
        return torch.where(column < short, filler, torch.where(column == short, self.stop[0], text.PAD)).expand(
            self.shape()
        )

    def _filler(self) -> int:
        """A token that ends no text, nor do several of it where there is such a one."""
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
        """log p(value), (*batch); -inf for a text that cannot be drawn; ValueError for a malformed one."""
        scores = yield from asking(self._scores, value)
        return self._expanded(scores.token.sum(-1).masked_fill(~scores.possible, -torch.inf))

    def token_log_probs(self, value: Tensor) -> Tensor:
        """log p(z_t | prompt, z_<t) at every token of ``value``, 0 at padding; (*batch, L)."""
        scores = self._scores(value)
        width = value.shape[-1]
        token = torch.nn.functional.pad(scores.token, (0, max(0, width - scores.token.shape[-1])))[..., :width]
        beyond = (value[..., self.event_shape[0] :] != text.PAD).any(-1)
        return self._expanded(token.masked_fill(beyond[..., None], -torch.inf), 1)

    def prefix_log_probs(self, value: Tensor) -> Tensor:
        """log p(z_1..z_t stop) for t = 0..max_tokens, (*batch, max_tokens + 1), from one pass over the value.

        -inf where the text cannot stop and past the value's end; the stop is the value's own.  Of a text that a stop
        string ends after n tokens, column n is log p(z), and the prefixes before are stopped by the first stop token.
        Where there are no stop tokens, all is -inf.
        """
        return self.prefix_scores(value).log_probs

    @asks
    def prefix_scores(self, value: Tensor) -> Asking[PrefixScores]:
        """`prefix_log_probs` together with the log-probability of stopping at each prefix, from the same pass."""
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
        # A token that ends the text predicts nothing, nor does the last one where there is no stop token.
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
            needed = needed.expand(*batch, width)[..., :reach]  # rules may differ where neither prompt nor value does
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
        """How many tokens of a text are not certain: the only stop is, at the limit."""
        shared = self.stop.numel() == 1 and not self.max_tokens.dim()
        return int(self.max_tokens) if shared else int(self.event_shape[0])

    def _expanded(self, x: Tensor, event_dim: int = 0) -> Tensor:
        batch, event = x.shape[: x.dim() - event_dim], x.shape[x.dim() - event_dim :]
        return x.expand(broadcast_shapes(batch, self.batch_shape) + event)

    # -- enumeration ---------------------------------------------------------------------------------------------

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Every text that can be drawn, (K, *batch, *event) (``expand=False``: batch axes of size 1).

        :raises ValueError: where there are more than a million.
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
