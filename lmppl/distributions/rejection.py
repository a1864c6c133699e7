r"""Adaptive weighted rejection sampling: a token from p restricted to what a check accepts, and the accepted mass.

Tokens are drawn from p, without those that the check rejected, until ``r`` draws have been accepted. The first accepted
draw is the token x.

The accepted mass is estimated as follows. If rejected tokens had been put back, r accepted draws would have taken N
draws in all, x would be independent of N, and (r - 1) / (N - 1) would be unbiased for :math:`W = \sum_v p(v) c(v)`.
Draws that repeat a rejected token need no check; only their number is unknown. Before draw k it is geometric, with the
mass :math:`\rho_k` of the tokens rejected until then. The expectation over these numbers is taken exactly:

.. math:: \hat W = E\Big[\frac{r - 1}{N - 1}\Big]
    = (r - 1) \int_0^1 s^{-2} \prod_{k=1}^{M} \frac{(1 - \rho_k) s}{1 - \rho_k s} \, ds,
    \qquad E[\hat W f(x)] = \sum_v p(v) c(v) f(v) \text{ for every } f

over the M draws made. More tokens may be checked and left out at any time (``patience``): that only changes which
repeats are averaged over. So log q = log p(x) - log W-hat is a proper weight for x.

Source: Lipkin et al. 2025, "Fast controlled generation from language models with adaptive weighted rejection sampling",
which treats the repeats differently.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import text
from ..constraints import Check
from .token_steps import TokenSteps, invert

Ask = Callable[[Tensor, Tensor], Tensor]  # rows (r,), tokens (r,) -> BoolTensor (r,)
Choose = Callable[[Tensor, Tensor, int], Tensor]  # the rest of p (r, V), rows (r,), k -> tokens (r,)


class Accepted(NamedTuple):
    """The result of `reject` for every row."""

    token: Tensor  # (R,), PAD where nothing passes
    log_mass: Tensor  # (R,) log W-hat, -inf where nothing passes


def reject(probs: Tensor, ask: Ask, choose: Choose, accepts: int = 2, patience: int = 64) -> Accepted:
    """Draws tokens from ``probs`` (R, V), restricted to what ``ask`` accepts, all rows at once; in double precision.

    ``choose`` draws in proportion to the rest of ``probs``, where k is the number of the round. ``accepts`` is r.
    """
    R = len(probs)
    left = probs / probs.sum(1, keepdim=True)
    found = torch.full((R, accepts), text.PAD, device=probs.device)  # the accepted draws
    hits, misses = (torch.zeros(R, dtype=torch.long, device=probs.device) for _ in range(2))
    knows_all = torch.zeros(R, dtype=torch.bool, device=probs.device)
    repeats = Repeats(R, probs.device)
    live = torch.arange(R, device=probs.device)
    for k in count():
        mass = left[live].sum(1)  # 1 - rho
        live, mass = live[mass > 0], mass[mass > 0]
        if not len(live):
            break
        token = choose(left[live], live, k)
        passed = knows_all[live] | (found[live] == token[:, None]).any(1)
        new = (~passed).nonzero()[:, 0]
        passed[new] = ask(live[new], token[new])
        repeats.before(live, mass)
        left[live[~passed], token[~passed]] = 0.0
        misses[live[~passed]] += 1
        found[live[passed], hits[live[passed]]] = token[passed]
        hits[live[passed]] += 1
        impatient = live[(misses[live] >= patience) & ~knows_all[live]]
        if len(impatient):
            row, other = left[impatient].nonzero().unbind(1)
            row = impatient[row]
            unknown = (found[row] != other[:, None]).all(1)
            row, other = row[unknown], other[unknown]
            failed = ~ask(row, other)
            left[row[failed], other[failed]] = 0.0
            knows_all[impatient] = True
        live = live[hits[live] < accepts]
    return Accepted(found[:, 0], repeats.log_expectation(accepts).masked_fill(hits < accepts, -torch.inf))


class Repeats:
    r"""log E[(r - 1) / (N - 1)] for R rows, where N is the number of draws including repeats of rejected tokens.

    The integral over s is a sum with equal steps h of logit s. Its integrand has no pole nearer to the real line than
    pi, for any rho, and is bounded by 1 up to half that distance. So the error is about :math:`e^{-\pi^2 / h}`, below
    1e-16.
    """

    STEP, REACH = 0.25, 40.0

    def __init__(self, rows: int, device: torch.device):
        logit = torch.arange(-self.REACH, self.REACH, self.STEP, dtype=torch.double, device=device)
        self.log_s, self.log_rest = logsigmoid(logit), logsigmoid(-logit)  # log s and log(1 - s), (S,)
        self.log_integrand = self.log_rest - self.log_s + torch.zeros(rows, 1, device=device)  # ds = s (1 - s) dlogit

    def before(self, rows: Tensor, mass: Tensor) -> None:
        """Records a draw in these rows, made when tokens of total probability 1 - ``mass`` had been rejected."""
        log_mass = mass.log()[:, None]
        outside = torch.logaddexp(self.log_rest, log_mass + self.log_s)  # 1 - rho s = (1 - s) + (1 - rho) s
        self.log_integrand[rows] += log_mass + self.log_s - outside

    def log_expectation(self, accepts: int) -> Tensor:
        """Returns the log-expectation for each row, (R,)."""
        steps = torch.tensor(self.STEP * (accepts - 1), dtype=torch.double, device=self.log_integrand.device)
        return self.log_integrand.logsumexp(1) + steps.log()


class RejectionSteps(TokenSteps):
    """Token steps under a `Check`: `propose` checks candidates only, `draw` and `score` check all tokens."""

    def propose(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the next token of every row and log q = log p(token) - log W-hat, both (R,).

        It takes one uniform number for each row.

        PAD and 0 in rows that have ended; PAD and -inf in rows where the check accepts no token.
        """
        check, t = self.rules.allowed, self.prefix.shape[1]
        assert isinstance(check, Check)
        if self.rules.forced(t) or self.rules.broad:  # an even draw needs to know every accepted token
            return self.draw(uniform)
        rules = self.rules.within(check.within)
        logits, dead = rules.permitted(self._logits()[:, None], self.prefix, t)
        stuck = self.ended if dead is None else self.ended | dead[:, 0, 0]
        rows = (~stuck).nonzero()[:, 0]
        probs = logits[rows, 0].double().softmax(-1)  # (r, V)
        late = (rules.max_tokens <= t).expand(len(self.ended))[rows] & bool(rules.stop.numel())  # a stop is certain
        free = late & (rules.stop.numel() == 1) | (rules.inserted(self.prefix, t, 1)[rows, 0] != text.PAD)

        def ask(row: Tensor, token: Tensor) -> Tensor:
            passed = free[row].clone()
            asked = ~passed
            passed[asked] = check.ask(self.prefix[rows[row[asked]]], token[asked])
            return passed

        def choose(left: Tensor, row: Tensor, k: int) -> Tensor:
            return invert(left, uniform[rows[row]] if k == 0 else scramble(uniform[rows[row]], k))

        token, log_mass = reject(probs, ask, choose, check.num_accepts, check.patience)
        nothing = log_mass == -torch.inf
        # At the limit the check may forbid some of several stops, but never all.
        token = torch.where(nothing & late, invert(probs, uniform[rows]), token)
        log_q = probs.gather(1, token.clamp(min=0)[:, None])[:, 0].log() - log_mass.masked_fill(nothing, 0.0)
        log_q = log_q.masked_fill(nothing & ~late, -torch.inf)
        tokens = torch.full_like(self.ended, text.PAD, dtype=torch.long)
        log_probs = torch.zeros_like(uniform).masked_fill(stuck & ~self.ended, -torch.inf)
        tokens[rows], log_probs[rows] = token, log_q.to(uniform.dtype)
        return tokens, log_probs


def scramble(uniform: Tensor, k: int) -> Tensor:
    """Returns the k-th number of a stream of uniform numbers that starts from one, in double precision.

    It uses the mixing function of splitmix64. Each row has its own stream, so its draws do not depend on how rows are
    grouped.
    """
    state = (uniform.double() * 2**53).long() + _signed(k * 0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ _shifted(state, shift)) * _signed(factor)
    return _shifted(state ^ _shifted(state, 31), 11).double() * 2**-53


def _signed(x: int) -> int:
    """Returns the number modulo 2^64, as torch.long represents it."""
    return (x + 2**63) % 2**64 - 2**63


def _shifted(x: Tensor, by: int) -> Tensor:
    """Returns a logical shift to the right."""
    return (x >> by) & ((1 << (64 - by)) - 1)
