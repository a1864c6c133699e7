r"""`Unmasking`: a masked language model as a distribution over paths, which fill the gaps of a text one by one.

A *canvas* is a text of L tokens, n of which are masks: its *holes* 0..n-1, from left to right. A *path* fills them in
some order: step t chooses an open hole :math:`i_t` and a word :math:`w_t` for it.

.. math:: p(i_1 w_1 \dots i_n w_n)
          = \prod_{t=1}^{n} \pi(i_t \mid x_t) \, p_\theta(w_t \mid x_t, i_t), \qquad x_{t+1} = x_t[i_t \leftarrow w_t]

Here :math:`x_t` is the partly filled canvas, :math:`p_\theta` the network's softmax over all tokens except the mask,
and :math:`\pi` the *order*. The probability of a path is a product of n conditionals, exact and differentiable. The
probability of the text that it writes is a sum over n! paths,

.. math:: p(w) = \sum_\sigma \prod_t \pi(\sigma_t \mid x_t) \, p_\theta(w_{\sigma_t} \mid x_t, \sigma_t)

because neural denoisers give a text different probabilities in different orders. A program whose latent is the path
needs no such sum: u = log p - log q of a path is exact, where q is another `Unmasking` of the same holes.

A path is written as a text of n *symbols* :math:`i_t V + w_t`, each of which is a hole and a word. There are n V of
them. Holes are numbered among the holes and not by position, so a guide may fill the same holes of another canvas.
Whatever inference does with texts token by token, it does with paths step by step: `SMC` resamples between denoising
steps, `Enumeration` searches the tree of all paths, `MetropolisHastings` regrows the ends of paths.

The probability of the text itself is the sum of `subsets` if there are few holes; with more it is bounded from both
sides, see `docs/diffusion.md`.

Sources: Austin et al. 2021, "Structured denoising diffusion models in discrete state-spaces"; Hoogeboom et al. 2022,
"Autoregressive diffusion models" (random orders); Sahoo et al. 2024, "Simple and effective masked diffusion language
models"; Venkatraman et al. 2024, "Amortizing intractable inference in diffusion models" (arXiv 2405.20971).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import text
from ..engine.denoising import ask
from ..masked_language_model import MaskedLanguageModel
from ..rows import distinct_rows
from ..shapes import broadcast_shapes
from ..text import PAD
from .arguments import as_text, as_view, refuse_nan
from .stepped import SteppedText
from .subsets import summed
from .unmasking_steps import UnmaskingSteps, after

Order = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``order(log_words (k, n, V), stay (k, n), open (k, n)) -> (k, n)``: a score for each hole; pi is the softmax over the
open ones. ``stay``: the log-odds that the network gives to the mask itself; words do not depend on it.
"""
LEFT_TO_RIGHT = "left-to-right"
MOST_HOLES = 16  # with more, the sum over all subsets is refused
SUMMED = 2**20  # states of that sum that are computed at once


def _random(log_words: Tensor, stay: Tensor, open: Tensor) -> Tensor:
    return torch.zeros_like(stay)


def _left_to_right(log_words: Tensor, stay: Tensor, open: Tensor) -> Tensor:
    first = open & (open.cumsum(-1) == 1)
    return torch.zeros_like(stay).masked_fill(~first, -torch.inf)


def _confidence(log_words: Tensor, stay: Tensor, open: Tensor) -> Tensor:
    return log_words.amax(-1)


def _learned(log_words: Tensor, stay: Tensor, open: Tensor) -> Tensor:
    return -stay


ORDERS: dict[str, Order] = {
    "random": _random,
    LEFT_TO_RIGHT: _left_to_right,
    "confidence": _confidence,
    "learned": _learned,
}


class Unmasking(SteppedText):
    r"""The paths by which a masked language model fills the masked positions, the *holes*, of a text.

    .. math:: p(i_1 w_1 \dots i_n w_n) = \prod_{t=1}^{n} \pi(i_t \mid x_t) \, p_\theta(w_t \mid x_t, i_t)

    Step t chooses an open hole :math:`i_t` of the n holes and then its word :math:`w_t`; :math:`x_t` is the canvas
    filled so far. A value is a path: a text of n symbols :math:`i_t V + w_t`. `fill` returns the text that a path
    writes, `words` the words in the holes, `decode` these as a string; all accept unfinished paths.

    :param lm: the masked language model.
    :param canvas: texts (*batch, L), or strings, whose masks are the holes; all other tokens stay.
    :param order: :math:`\pi`, how the next hole is chosen among the open ones. "random": with equal probabilities.
        "left-to-right": the first. "confidence": in proportion to the probability of its most probable word. "learned":
        in proportion to the odds that the network gives to a word against the mask; this costs nothing, and an adapter
        learns it as it learns words. Or a function, see `Order`.
    :param allowed: BoolTensor (V,), (n, V) or (*batch, n, V): the words that each hole may get; their probabilities are
        renormalised. None: every word.
    :param temperature: divides the logits of words; a positive number, or a tensor (*batch).
    :raises ValueError: naming the argument, e.g. for a canvas without a mask, or a hole for which no word is allowed.

    Shapes: ``batch_shape`` is ``canvas.shape[:-1]``, broadcast with tensor parameters; ``event_shape = (n,)``, where n
    is the largest number of holes of any canvas. Canvases with fewer holes have shorter paths, padded; ``max_tokens``
    (*batch) is the number of holes of each.

    `log_prob` of R paths reads R n texts, equal ones once. Its gradient reaches ``lm``'s trainable parameters.

    Sources: Austin et al. 2021 (arXiv 2107.03006); Hoogeboom et al. 2022 (random orders); Sahoo et al. 2024.

    Example::

        x, y = lm.encode("Tom went to the attic."), lm.encode(" He oiled it.")
        d = Unmasking(lm, lm.join(x, lm.gap(6), y))
        path = d.sample()
        lm.decode(d.fill(path)), d.log_prob(path)
    """

    def __init__(
        self,
        lm: MaskedLanguageModel,
        canvas: Tensor | str | list[Any],
        *,
        order: str | Order = "random",
        allowed: Tensor | None = None,
        temperature: float | Tensor = 1.0,
    ):
        as_view(lm, MaskedLanguageModel)
        if not callable(order) and order not in ORDERS:
            raise ValueError(f"order: expected one of {', '.join(map(repr, ORDERS))} or a function, got {order!r}")
        self.lm, self.order = lm, order
        self.stop = torch.empty(0, dtype=torch.long, device=lm.device)
        self.prompt = as_text(lm, canvas, "canvas")  # (*canvas batch, L)
        self.holes_each = (self.prompt == lm.mask_id).sum(-1)
        holes = int(self.holes_each.max()) if self.holes_each.numel() else 0
        if not holes:
            raise ValueError("canvas: it has no mask token; join texts with lm.gap(tokens)")
        self.allowed = self._checked(allowed, holes)
        self.temperature = torch.as_tensor(temperature, device=lm.device)
        if not bool((self.temperature > 0).all()):
            raise ValueError(f"temperature: must be positive, got {temperature!r}")
        self._epsilon = torch.zeros((), device=lm.device)
        self._set(torch.Size([holes]))

    def _checked(self, allowed: Tensor | None, holes: int) -> Tensor:
        """Returns which words each hole may get, BoolTensor (*batch or none, n or 1, V).

        The mask is never one of them.
        """
        V = self.lm.vocab_size
        words = torch.arange(V, device=self.lm.device) != self.lm.mask_id
        if allowed is None:
            return words[None]
        fits = isinstance(allowed, Tensor) and allowed.dtype == torch.bool and allowed.dim() and allowed.shape[-1] == V
        if not fits or (allowed.dim() > 1 and allowed.shape[-2] not in (1, holes)):
            what = f"{allowed.dtype} of shape {tuple(allowed.shape)}" if isinstance(allowed, Tensor) else repr(allowed)
            raise ValueError(f"allowed: expected a BoolTensor (V,) or (..., {holes}, V), V = {V}; got {what}")
        allowed = (allowed[None] if allowed.dim() == 1 else allowed).to(words.device) & words
        if not bool(allowed.any(-1).all()):
            raise ValueError("allowed: it allows no word for some hole")
        return allowed

    def _set(self, event_shape: torch.Size) -> None:
        """Numbers the elements of the batch by what makes them differ: ``kind`` (element,), K kinds in all."""
        shapes = [self.temperature.shape, self._epsilon.shape, self.allowed.shape[:-2]]
        batch = broadcast_shapes(self.prompt.shape[:-1], *shapes)
        rows = self.prompt.expand(*batch, -1).reshape(batch.numel(), -1)
        self._ruled = any(shape.numel() > 1 for shape in shapes)  # whether elements have different rules
        if self._ruled:
            self.canvases, self.kind = rows, torch.arange(len(rows), device=rows.device)
        else:
            self.canvases, self.kind = distinct_rows(rows)
        masked = self.canvases == self.lm.mask_id
        self.count = masked.sum(1)  # (K,)
        self.holes = (~masked).int().argsort(dim=1, stable=True)[:, : event_shape[0]]  # (K, n): their positions
        self.max_tokens = self.holes_each.expand(batch)
        super().__init__(batch, event_shape, validate_args=False)

    # -- what a path is ----------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """The number n V of symbols."""
        return self.event_shape[0] * self.lm.vocab_size

    def symbols(self, holes: Tensor, words: Tensor) -> Tensor:
        """Returns paths as symbols, from the holes in the order in which they are filled, and their words.

        :param holes: LongTensor (..., n), numbers from 0 to n - 1; PAD at the end of an unfinished path.
        :param words: LongTensor (..., n), token ids; PAD likewise.
        :returns: LongTensor (..., n).

        >>> path = d.symbols(torch.arange(6), words)  # from left to right
        >>> bool((d.words(path) == words).all())
        True
        """
        holes, words = torch.broadcast_tensors(holes, words)
        return torch.where((holes == PAD) | (words == PAD), PAD, holes * self.lm.vocab_size + words)

    def words(self, path: Tensor) -> Tensor:
        """Returns the word in each hole, in the order of the holes.

        :param path: paths (..., n), which may be unfinished.
        :returns: LongTensor (..., n); PAD in an open hole.

        >>> d.words(path).shape
        torch.Size([6])
        """
        n, V = self.event_shape[0], self.lm.vocab_size
        out = path.new_full((*path.shape[:-1], n + 1), PAD)
        at = torch.where(path == PAD, n, path.clamp(min=0) // V)
        return out.scatter(-1, at, torch.where(path == PAD, PAD, path.clamp(min=0) % V))[..., :n]

    def fill(self, path: Tensor) -> Tensor:
        """Returns the canvas, filled as far as the path goes.

        :param path: paths (..., n), which may be unfinished.
        :returns: texts (..., *batch_shape, L); masks in open holes.

        >>> d.lm.decode(d.fill(path)).startswith("Tom went to the attic.")
        True
        """
        words = self.words(path)
        batch = broadcast_shapes(words.shape[:-1], self.batch_shape)
        canvas = self.prompt.expand(*batch, -1)
        hole = ((canvas == self.lm.mask_id).cumsum(-1) - 1).clamp(0, words.shape[-1] - 1)
        own = words.expand(*batch, -1).gather(-1, hole)
        return torch.where((canvas == self.lm.mask_id) & (own != PAD), own, canvas)

    def decode(self, value: Tensor) -> Any:
        """Returns the words that paths write into the holes as strings, from the first hole to the last.

        :param value: paths (..., n), which may be unfinished.
        :returns: a string, or nested lists of strings with the shape of the leading axes.

        >>> isinstance(d.decode(path), str)
        True
        """
        return self.lm.decode(text.cat(self.words(value)))

    def placeholder(self) -> Tensor:
        """Returns some path of the right shape without running the network.

        It fills the holes from left to right with the first allowed words.

        :returns: LongTensor (*batch_shape, n).

        >>> d.placeholder().shape
        torch.Size([6])
        """
        first = self.allowed.int().argmax(-1).expand(*self.batch_shape, self.event_shape[0])
        hole = torch.arange(self.event_shape[0], device=first.device)
        return self.symbols(torch.where(hole < self.max_tokens[..., None], hole, PAD), first)

    def broadened(self, temperature: float | Tensor = 1.0, epsilon: float | Tensor = 0.0) -> Unmasking:
        r"""Returns a flatter distribution of words, for exploration: a higher temperature, mixed with an even draw.

        .. math:: p'(w) = (1 - \epsilon) \, \mathrm{softmax}(logits / (T' T))_w + \epsilon / \#\text{allowed}

        for every allowed word w, with T this distribution's temperature.

        :param temperature: T', a number or a tensor that broadcasts to the batch.
        :param epsilon: the probability with which each word is drawn evenly from those allowed, likewise.
        :returns: an `Unmasking`.

        >>> path = d.broadened(temperature=1.5, epsilon=0.01).sample()
        """
        new = self._get_checked_instance(Unmasking)
        new.__dict__.update(self.__dict__)
        new.temperature = self.temperature * torch.as_tensor(temperature, device=self.prompt.device)
        new._epsilon = torch.as_tensor(epsilon, device=self.prompt.device)
        new._set(self.event_shape)
        return new

    # -- its law -----------------------------------------------------------------------------------------------------

    def law(self, states: Tensor, kind: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the distributions of the next hole and of its word, for k states of canvases.

        .. math:: \log \pi(i \mid x), \qquad \log p_\theta(w \mid x, i)

        :param states: LongTensor (k, L), canvases filled so far.
        :param kind: LongTensor (k,), the kind of each canvas, in the numbering of this distribution.
        :param logits: (k, L, V), the network's logits for the states.
        :returns: log pi (k, n), -inf for a filled hole and unspecified in a state without an open hole; log p of words
            (k, n, V).
        :raises ValueError: if logits are NaN, or ``order`` gives no open hole a finite score.
        """
        at = self.holes[kind]  # (k, n)
        own = logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))  # (k, n, V)
        refuse_nan(own.detach())
        allowed, temperature, epsilon = self._rules(kind)
        mask = self.lm.mask_id
        is_mask = torch.arange(own.shape[-1], device=own.device) == mask
        stay = own[..., mask] - own.masked_fill(is_mask, -torch.inf).logsumexp(-1)
        log_words = (own / temperature).masked_fill(~allowed, -torch.inf).log_softmax(-1)
        if bool((epsilon > 0).any()):
            even = allowed.to(own.dtype) / allowed.sum(-1, keepdim=True)
            log_words = ((1 - epsilon) * log_words.exp() + epsilon * even).log()
        there = torch.arange(at.shape[1], device=at.device) < self.count[kind][:, None]
        open = there & (states.gather(1, at) == mask)
        order = self.order if callable(self.order) else ORDERS[self.order]
        scores = order(log_words, stay, open).masked_fill(~open, -torch.inf)
        stuck = (scores == -torch.inf).all(1, keepdim=True)
        if bool((stuck & open.any(1, keepdim=True)).any()):
            raise ValueError("order: it gives no open hole a finite score")
        return scores.masked_fill(stuck, 0.0).log_softmax(1), log_words

    def _rules(self, kind: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns allowed (k or 1, n or 1, V), temperature and epsilon (k or 1, 1, 1) of each kind."""
        if not self._ruled:
            return self.allowed.reshape(1, *self.allowed.shape[-2:]), self.temperature.view(1), self._epsilon.view(1)
        allowed = self.allowed.expand(*self.batch_shape, *self.allowed.shape[-2:]).flatten(0, -3)[kind]
        numbers = (x.expand(self.batch_shape).flatten()[kind, None, None] for x in (self.temperature, self._epsilon))
        temperature, epsilon = numbers
        return allowed, temperature, epsilon

    def _kinds(self, shape: torch.Size) -> Tensor:
        """Returns the kind of each row of the flattened ``shape``, with which the batch broadcasts."""
        return self.kind.view(self.batch_shape).expand(shape).reshape(-1)

    def token_steps(self, shape: torch.Size | None = None, share: Any = None) -> UnmaskingSteps:
        """Returns unfinished paths that grow step by step; see `protocols.Steps`.

        :param shape: the shape of the paths, with which the batch broadcasts; None: the batch.
        :param share: ignored.
        :returns: `lmppl.distributions.unmasking_steps.UnmaskingSteps`.

        >>> steps = d.token_steps()
        >>> symbol, log_p = steps.draw(torch.rand(1))  # the first hole and its word
        """
        return UnmaskingSteps(self, self._kinds(self.batch_shape if shape is None else torch.Size(shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p of paths, with gradient.

        :param value: paths (..., n); leading axes broadcast with the batch.
        :returns: log-probabilities (..., *batch_shape); -inf for a path that fills a hole twice, or not all holes.
        :raises ValueError: for a malformed path.

        >>> d.log_prob(path).shape
        torch.Size([])
        """
        text.validate(value, "value", self.vocab_size)
        (n,), V = self.event_shape, self.lm.vocab_size
        shape = broadcast_shapes(value.shape[:-1], self.batch_shape)
        too_long = (value[..., n:] != PAD).any(-1).expand(shape).flatten()
        path = text.pad(value[..., :n], n).expand(*shape, n).reshape(-1, n)  # (R, n)
        kind = self._kinds(shape)
        step, count = torch.arange(n, device=path.device), self.count[kind]
        there = step < count[:, None]
        hole, word = path.clamp(min=0) // V, path % V
        in_order = torch.where(there, hole, n + step).sort(1).values
        fits = ((path != PAD) == there).all(1) & (in_order.masked_fill(~there, 0) == step.where(there, step * 0)).all(1)
        row = (fits & ~too_long).nonzero()[:, 0]
        states = self._states(path[row], kind[row])  # (r, n, L): before each step
        at = there[row].nonzero()  # (r n', 2)
        h, w = hole[row][tuple(at.T)], word[row][tuple(at.T)]

        def chosen(states: Tensor, kind: Tensor, logits: Tensor, which: Tensor, rows: Tensor) -> Tensor:
            log_order, log_words = self.law(states, kind, logits)
            return log_order[which, h[rows]] + log_words[which, h[rows], w[rows]]

        if not len(at):
            return torch.where(fits & ~too_long, 0.0, -torch.inf).view(shape)
        each = ask(self.lm, states[tuple(at.T)], kind[row[at[:, 0]]], chosen)
        total = each.new_zeros(len(row)).index_add(0, at[:, 0], each)
        return each.new_full((len(path),), -torch.inf).index_copy(0, row, total).view(shape)

    def _states(self, path: Tensor, kind: Tensor) -> Tensor:
        """Returns the texts (R, n, L) before each step of paths (R, n)."""
        state, found = self.canvases[kind], []
        for symbol in path.unbind(1):
            found.append(state)
            state = after(self, state, kind, symbol)
        return torch.stack(found, 1)

    def text_log_prob(self, words: Tensor) -> Tensor:
        r"""Returns log p of the text itself, summed over all paths that write it, with gradient.

        .. math:: p(w) = \sum_\sigma \prod_t \pi(\sigma_t \mid x_t) \, p_\theta(w_{\sigma_t} \mid x_t, \sigma_t)

        The sum takes :math:`2^n` texts to read, one for each subset of the n holes (`subsets`). From left to right
        there is one path only.

        :param words: LongTensor (..., n), the words in the holes.
        :returns: log-probabilities (..., *batch_shape).
        :raises ValueError: for more than 16 holes in other orders; `lmppl.inference.Sandwich` gives bounds there.

        >>> bool(d.text_log_prob(d.words(path)) > d.log_prob(path))
        True
        """
        (n,), text_shape = self.event_shape, words.shape[:-1]
        text.validate(words, "words", self.lm.vocab_size)
        only = self.order == LEFT_TO_RIGHT
        if n > MOST_HOLES and not only:
            raise ValueError(f"words: {n} holes, at most {MOST_HOLES} are summed over; use lmppl.inference.Sandwich")
        shape = broadcast_shapes(text_shape, self.batch_shape)
        too_long = (words[..., n:] != PAD).any(-1).expand(shape).flatten()
        words = text.pad(words[..., :n], n).expand(*shape, n).reshape(-1, n)
        if only:
            path = self.symbols(torch.arange(n, device=words.device), words).view(*shape, n)
            return self.log_prob(path).masked_fill(too_long.view(shape), -torch.inf)
        kind = self._kinds(shape)
        parts = zip(*(x.split(max(1, SUMMED // 2**n)) for x in (words, kind)), strict=True)
        log_p = torch.cat([summed(self, w, k) for w, k in parts])
        right = (words != PAD).sum(1) == self.count[kind]
        return log_p.masked_fill(~right | too_long, -torch.inf).view(shape)
