r"""Exact inference for a Markov prior, by dynamic programming, where there are too many texts to enumerate.

The latent text z has the prior of a `Completion` whose language model reads only the last k tokens, and a factor psi
that a finite automaton computes while it reads z.  With s the last k tokens, a the automaton's state and t the number
of tokens so far,

.. math:: \beta_t(s, a) = \sum_v p_t(v \mid s) \begin{cases} final(a) & v \text{ stops} \\
          step(a, v) \, \beta_{t+1}(s v, a v) & \text{else} \end{cases}

is the expected factor of a text that has reached this state, which is the optimal twist.  Z is beta_0 at the start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ... import text
from ...distributions import Completion
from ...engine.scoring import score, with_bos

STATES = 2**24  # the most (state, automaton state, token) triples for one position


@dataclass(frozen=True)
class Automaton:
    r"""A factor of a text, computed by a deterministic automaton that reads the text's tokens without the stop.

    .. math:: \log \psi(z) = \sum_{t=1}^{n} step[a_{t-1}, z_t] + final[a_n], \qquad a_t = next[a_{t-1}, z_t], \; a_0 = 0

    `Markov` needs it in this form; `log_factor` gives a model's `pyro.factor` the same number.  ``f * g`` is the
    product of two factors.  `counting`, `containing` and `ending` build common ones.

    :param next: the next state by state and token, LongTensor (A, V), for A states and V tokens.
    :param step: the log factor of a token by state and token, (A, V); -inf is allowed.
    :param final: the log factor of the last state, (A,); -inf is allowed.
    :raises ValueError: for shapes that differ, and for states outside 0..A-1.

    Example::

        a, b = lm.token_id("a"), lm.token_id("b")
        factor = Automaton.containing(a, lm.vocab_size) * Automaton.containing(b, lm.vocab_size)  # both tokens
        eos = torch.tensor([lm.token_id("eos")])
        factor.log_factor(lm.encode(["ab", "a"], stop="eos"), eos)  # 0 for the first text, -inf for the second
    """

    next: Tensor
    step: Tensor
    final: Tensor

    def __post_init__(self) -> None:
        A, V = self.next.shape
        if self.step.shape != (A, V) or self.final.shape != (A,):
            raise ValueError(
                f"step, final: expected the shapes {(A, V)} and {(A,)} of next, got {tuple(self.step.shape)} and "
                f"{tuple(self.final.shape)}"
            )
        if bool(((self.next < 0) | (self.next >= A)).any()):
            raise ValueError(f"next: its states must lie in 0..{A - 1}")

    @classmethod
    def counting(cls, log_weights: Tensor) -> Automaton:
        """A product over tokens: each occurrence of token v multiplies the factor by exp log_weights[v].

        :param log_weights: (V,).
        """
        step = log_weights.double()[None]
        return cls(torch.zeros_like(step, dtype=torch.long), step, step.new_zeros(1))

    @classmethod
    def containing(cls, token: int, vocab_size: int, present: float = 0.0, absent: float = -math.inf) -> Automaton:
        """The factor exp(present) for texts that contain a token, exp(absent) for all others.

        :param token: a token id.
        :param vocab_size: the number of tokens, V.
        :param present: a log factor.
        :param absent: a log factor; by default the text must contain the token.
        """
        following = torch.tensor([[0], [1]]).repeat(1, vocab_size)
        following[0, token] = 1
        final = torch.tensor([absent, present], dtype=torch.float64)
        return cls(following, final.new_zeros(2, vocab_size), final)

    @classmethod
    def ending(cls, log_weights: Tensor, empty: float = -math.inf) -> Automaton:
        """The factor exp log_weights[v] for a text whose last token is v, exp(empty) for the empty text.

        :param log_weights: (V,).
        :param empty: a log factor; by default the empty text is impossible.
        """
        V = len(log_weights)
        final = torch.cat([torch.tensor([empty], dtype=torch.float64), log_weights.double()])
        return cls(torch.arange(1, V + 1).expand(V + 1, V), final.new_zeros(V + 1, V), final)

    def __mul__(self, other: Automaton) -> Automaton:
        (A, V), B = self.next.shape, len(other.final)
        return Automaton(
            (self.next[:, None] * B + other.next).reshape(A * B, V),
            (self.step[:, None] + other.step).reshape(A * B, V),
            (self.final[:, None] + other.final).flatten(),
        )

    def read(self, value: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        """The state after the tokens before the first stop, and the sum of the steps' log factors.

        :param value: texts or prefixes, (..., L).
        :param stop: the token ids that end a text, (S,).
        :returns: two tensors of shape (...).
        """
        state = torch.zeros(value.shape[:-1], dtype=torch.long, device=value.device)
        total = torch.zeros(value.shape[:-1], dtype=torch.float64, device=value.device)
        going = torch.ones_like(state, dtype=torch.bool)
        for token in value.unbind(-1):
            going = going & (token != text.PAD) & ~torch.isin(token, stop)
            token = token.clamp(min=0)
            total = torch.where(going, total + self.step[state, token], total)
            state = torch.where(going, self.next[state, token], state)
        return state, total

    def log_factor(self, value: Tensor, stop: Tensor) -> Tensor:
        """log psi of texts, for a model's `pyro.factor`.

        :param value: texts, (..., L).
        :param stop: the token ids that end a text, (S,).
        :returns: log factors, (...).
        """
        state, total = self.read(value, stop)
        return total + self.final[state]


class Markov:
    r"""The exact posterior of one text with a Markov prior and an automaton's factor, by dynamic programming.

    .. math:: p(z \mid \psi) = p(z) \, \psi(z) / Z

    Use it as the truth in tests of other algorithms, for n-gram models such as `lmppl.ngram`, where there are too many
    texts for `Enumeration`.  Everything is in double precision.  The network reads each state once; the cost is then
    max_tokens x states x automaton states x vocabulary.

    :param prior: a `Completion` of one prompt, without batch; ``allowed`` may be a set of tokens, but no function.
    :param factor: psi, an `Automaton` over the same vocabulary.
    :param order: how many tokens the language model reads back; None: the ``order`` of its configuration.
    :raises ValueError: if the language model reads further back than ``order``, if there are too many states, and for a
        prior that is not Markov (a function as constraint, a stop string, tools).

    Example::

        factor = Automaton.containing(lm.token_id("a"), lm.vocab_size)
        exact = Markov(Completion(lm, "b", max_tokens=30), factor)
        exact.log_evidence, exact.sample(100), exact.marginals
    """

    def __init__(self, prior: Completion, factor: Automaton, order: int | None = None):
        order = getattr(prior.lm.model.config, "order", None) if order is None else order
        if not isinstance(order, int) or order < 0:
            raise ValueError(f"order: expected the number of tokens that the language model reads back, got {order}")
        self.order: int = order
        if prior.batch_shape or prior.prompt.dim() != 1:
            raise ValueError(f"prior: expected one prompt, got the batch shape {tuple(prior.batch_shape)}")
        if callable(prior.allowed) and not isinstance(prior.allowed, Tensor):
            raise ValueError("prior: a constraint by a function of the prefix is not Markov; use a factor")
        if prior.stop_strings is not None:
            raise ValueError("prior: a stop string reads several tokens of the text; use Enumeration or SMC")
        if prior.tools:
            raise ValueError("prior: a tool reads the whole text, so it is not Markov; use Enumeration or SMC")
        if factor.next.shape[1] != prior.lm.vocab_size:
            raise ValueError(f"factor: it reads {factor.next.shape[1]} tokens, the model has {prior.lm.vocab_size}")
        self.prior, self.factor = prior, factor
        self.width = prior.event_shape[0]
        self.next, logits = self._states()  # (S, V) each
        (S, V), A = logits.shape, len(factor.final)
        if S * A * V > STATES:
            raise ValueError(f"order, factor: {S} x {A} states are too many")
        rules, none = prior.rules(torch.Size()), torch.empty(S, 0, dtype=torch.long)
        self.stops = torch.isin(torch.arange(V), prior.stop)
        beta = factor.final.expand(S, A) if not len(prior.stop) else factor.final.new_full((S, A), -math.inf)
        steps, betas = [], [beta]
        for t in range(self.width - 1, -1, -1):
            log_p = rules.log_probs(logits[:, None], none, t)[:, 0].double()
            ahead = factor.step + beta[self.next[:, None], factor.next]  # (S, A, V)
            joint = log_p[:, None] + torch.where(self.stops, factor.final[:, None], ahead)
            beta = joint.logsumexp(-1)  # (S, A)
            steps.append(joint)
            betas.append(beta)
        self.log_joint = torch.stack(steps[::-1])  # (width, S, A, V): beta_t split by the next token
        self.log_beta = torch.stack(betas[::-1])  # (width + 1, S, A)

    @property
    def log_evidence(self) -> Tensor:
        """The log evidence, log Z = log E_prior psi, in nats."""
        return self.log_beta[0, 0, 0]

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Exact draws from the posterior, (n, *event), by forward sampling.

        :param n: how many.
        :raises ValueError: if Z = 0.
        """
        law = self._next_token
        state = automaton = torch.zeros(n, dtype=torch.long)
        going = torch.ones(n, dtype=torch.bool)
        columns = []
        for t in range(self.width):
            token = torch.multinomial(law[t, state, automaton].where(going[:, None], torch.ones(())), 1)[:, 0]
            columns.append(token.masked_fill(~going, text.PAD))
            going = going & ~self.stops[token]
            state, automaton = self.next[state, token], self.factor.next[automaton, token]
        return torch.stack(columns, -1)

    @cached_property
    def marginals(self) -> Tensor:
        """The posterior probability that token t is v, (*event, V), by forward-backward; the stop counts as a token.

        Row t sums to the probability that the text has at least t tokens before its stop.
        """
        law = self._next_token
        T, S, A, V = law.shape
        here = law.new_zeros(S, A)
        here[0, 0] = 1.0
        target = (self.next[:, None] * A + self.factor.next).flatten()  # (S A V)
        rows = []
        for t in range(T):
            move = here[..., None] * law[t]  # (S, A, V)
            rows.append(move.sum((0, 1)))
            going = (move * ~self.stops).flatten()
            here = torch.zeros(S * A, dtype=law.dtype).index_add(0, target, going).view(S, A)
        return torch.stack(rows)

    def log_psi(self, prefix: Tensor) -> Tensor:
        """log E[psi(z) | z begins with prefix], the optimal twist of `SMC`.

        :param prefix: token ids, (..., t).
        :returns: (...).
        """
        stop, t = self.prior.stop, prefix.shape[-1]
        automaton, total = self.factor.read(prefix, stop)
        ended = torch.isin(prefix, stop).any(-1)
        state = torch.zeros_like(automaton)
        for token in prefix.unbind(-1):
            state = self.next[state, token.clamp(min=0)]  # after the end the state is not used
        return total + torch.where(ended, self.factor.final[automaton], self.log_beta[t][state, automaton])

    @cached_property
    def _next_token(self) -> Tensor:
        """p(next token | t, state, automaton state; psi), (width, S, A, V); uniform where no token is possible."""
        if self.log_evidence == -torch.inf:
            raise ValueError("factor: every text is impossible, so there is no posterior")
        dead = (self.log_beta[:-1] == -torch.inf)[..., None]
        return self.log_joint.masked_fill(dead, 0.0).softmax(-1)

    @torch.no_grad()
    def _states(self) -> tuple[Tensor, Tensor]:
        """The successors and the logits of all states that the prompt leads to, (S, V) each; state 0 is the first."""
        lm, k = self.prior.lm, self.order
        V = lm.vocab_size

        def state(tokens: tuple[int, ...]) -> tuple[int, ...]:
            return tokens[len(tokens) - k :] if len(tokens) > k else tokens

        start = tuple(with_bos(lm, self.prior.prompt).tolist())
        known: dict[tuple[int, ...], int] = {state(start): 0}
        texts: list[tuple[int, ...]] = [()]
        following = []
        for path in texts:  # breadth first: the loop appends to the list
            row = []
            for v in range(V):
                longer = (*path, v)
                key = state(start + longer)
                if key not in known:
                    known[key] = len(texts)
                    texts.append(longer)
                row.append(known[key])
            following.append(row)
            if len(texts) * V > STATES:
                raise ValueError(f"order: {k} tokens of {V} give too many states")
        width = max(len(path) for path in texts)
        shortest = torch.tensor([p + (text.PAD,) * (width - len(p)) for p in texts], dtype=torch.long)
        logits = self._logits(self.prior.prompt, shortest)
        full = torch.tensor([len(key) == k for key in known])
        if bool(full.any()):
            keys = torch.tensor([key for key in known if len(key) == k], dtype=torch.long).view(int(full.sum()), k)
            detour = torch.cat([keys.flip(0)[:, :1] if k else keys, keys], 1)  # other history, the same last k tokens
            if not torch.allclose(self._logits(detour, keys[:, :0]), logits[full], rtol=1e-3, atol=1e-3):
                raise ValueError(f"order: the language model reads further back than {k} tokens")
        return torch.tensor(following), logits

    def _logits(self, prompt: Tensor, after: Tensor) -> Tensor:
        """The network's logits (S, V) after the prompt and ``after`` (S, L)."""
        end = text.length(after)
        value = text.cat(after, after.new_zeros(1))  # the last token is a placeholder for the next one
        return score(self.prior.lm, prompt, value, lambda logits, rows: logits[torch.arange(len(rows)), end[rows]])
