"""`Check`: a constraint too costly to evaluate on the whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..language_model import LanguageModel
from ..rows import distinct_rows
from .arguments import as_lm
from .masks import Constraint, PrefixConstraint, allowed_at, distinct

Predicate = Callable[[Tensor, Tensor], Tensor]
_AT_ONCE = 2**16  # candidates in one call of the predicate


class Check(PrefixConstraint):
    r"""The constraint that allows a token where a function says so, asked about as few candidates as may be.

    SMC proposes from it by rejection without replacement (`lmppl.distributions.rejection`): log q of the token is
    :math:`\log p(token) - \log \hat W`, where :math:`E[\hat W] = \sum_v p(v) c(v)` is the mass kept, so that weights
    and evidence stay unbiased.  `Completion.sample` draws by rejection too, from exactly the masked distribution.  What
    needs the probability itself (`log_prob`, importance sampling, enumeration) asks about the whole vocabulary.

    :param lm: the language model whose tokens are checked.
    :param predicate: ``prefix (R, t), token (R,) -> BoolTensor (R,)``; a stop is a token too.  Candidates that occur
        several times are asked about once.
    :param within: a cheap constraint that holds as well; only tokens that it allows are candidates.
    :param accepts: how many accepted draws an estimate of the mass waits for, at least 2; more, and it varies less.
    :param patience: after so many rejections in a row, all of its other candidates are asked about at once.

    ``evaluations`` counts the candidates asked about.

        >>> short = Check(lm, lambda prefix, token: spelling_is_fine(prefix, token))
        >>> Completion(lm, prompt, max_tokens=5, allowed=short)
    """

    def __init__(
        self,
        lm: LanguageModel,
        predicate: Predicate,
        *,
        within: Constraint | None = None,
        accepts: int = 2,
        patience: int = 64,
    ):
        if not callable(predicate):
            raise ValueError(f"predicate: expected a function of prefix and token, got {predicate!r}")
        if accepts < 2 or patience < 1:
            raise ValueError(f"accepts, patience: must be at least 2 and 1, got {accepts} and {patience}")
        self.lm, self.predicate, self.within = as_lm(lm), predicate, within
        self.num_accepts, self.patience = accepts, patience
        self.vocab_size = lm.vocab_size
        self.evaluations = 0

    def ask(self, prefix: Tensor, token: Tensor) -> Tensor:
        """Whether each ``token`` (R,) may follow its ``prefix`` (R, t), BoolTensor (R,); `within` is not asked."""
        if not len(token):
            return torch.zeros_like(token, dtype=torch.bool)
        candidates, index = distinct_rows(torch.cat([prefix, token[:, None]], 1))
        answers = [self._answer(part[:, :-1], part[:, -1]) for part in candidates.split(_AT_ONCE)]
        return torch.cat(answers)[index]

    def __call__(self, prefix: Tensor) -> Tensor:
        rows, index = distinct(prefix)
        mask = torch.ones(len(rows), self.vocab_size, dtype=torch.bool, device=prefix.device)
        if self.within is not None:
            mask = mask & allowed_at(self.within, rows, self.vocab_size)
        row, token = mask.nonzero().unbind(1)
        mask[row, token] = self.ask(rows[row], token)
        return mask[index].view(*prefix.shape[:-1], self.vocab_size)

    def joined(self, others: Sequence[Check], within: Constraint | None) -> Check:
        """The check that passes what this and the others pass, each asked only about what passed before."""
        if not others and within is self.within:
            return self
        checks = [self, *others]

        def predicate(prefix: Tensor, token: Tensor) -> Tensor:
            passed = torch.ones_like(token, dtype=torch.bool)
            for check in checks:
                passed[passed.clone()] = check.ask(prefix[passed], token[passed])
            return passed

        most = max(c.num_accepts for c in checks)
        return Check(self.lm, predicate, within=within, accepts=most, patience=min(c.patience for c in checks))

    def _answer(self, prefix: Tensor, token: Tensor) -> Tensor:
        answer = self.predicate(prefix, token)
        if not isinstance(answer, Tensor) or answer.dtype != torch.bool or answer.shape != token.shape:
            found = f"{answer.dtype} {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
            raise ValueError(f"predicate: it must return a BoolTensor {tuple(token.shape)}, got {found}")
        self.evaluations += len(token)
        return answer.to(token.device)
