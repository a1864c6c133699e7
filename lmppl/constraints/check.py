"""`Check`: a constraint that is too costly to evaluate for the whole vocabulary."""

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
    r"""A constraint that asks a function about single tokens: for checks that are too costly for the whole vocabulary.

    `SMC` proposes from it by rejection without replacement (`lmppl.distributions.rejection`). It uses :math:`\log q =
    \log p(token) - \log \hat W`, where :math:`E[\hat W] = \sum_v p(v) c(v)` is the accepted mass, so weights and
    evidence stay unbiased. `Completion.sample` also draws by rejection, from exactly the masked distribution. What
    needs the probability itself (`log_prob`, importance sampling, enumeration) checks the whole vocabulary.

    :param lm: the language model whose tokens are checked.
    :param predicate: a function ``prefix (R, t), token (R,) -> BoolTensor (R,)``: whether each token may follow its
        prefix. Stop tokens are checked too. Equal candidates are checked once.
    :param within: a cheap constraint that must also hold; only tokens that it allows are checked.
    :param accepts: the number of accepted draws on which an estimate of the mass is based, at least 2. More of them
        give less variance.
    :param patience: after so many rejections in a row, all other candidates are checked at once.
    :raises ValueError: if ``predicate`` is not callable or returns anything else, or a number is too small.

    The attribute ``evaluations`` counts the candidates that were checked.

        >>> short = Check(lm, lambda prefix, token: spelling_is_fine(prefix, token))
        >>> d = Completion(lm, prompt, max_tokens=5, allowed=short)

    Source: Lipkin et al. 2025, "Fast controlled generation from language models with adaptive weighted rejection
    sampling".
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
        """Returns whether each token may follow its prefix; ``within`` is not checked.

        :param prefix: LongTensor (R, t).
        :param token: LongTensor (R,).
        :returns: BoolTensor (R,).

        >>> letters = Check(lm, lambda prefix, token: token > 50)
        >>> letters.ask(lm.encode(["ab", "cd"]), torch.tensor([7, 77]))
        tensor([False,  True])
        """
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
        """Returns the check that accepts what this check and the others accept.

        Each check sees only tokens that passed the ones before it.

        :param others: further checks.
        :param within: the cheap constraint of the result.
        :returns: a `Check`.

        >>> letters = Check(lm, lambda prefix, token: token > 50)
        >>> few = letters.joined([Check(lm, lambda prefix, token: token < 60)], within=None)
        >>> few.ask(lm.encode(["ab", "cd"]), torch.tensor([55, 77]))
        tensor([ True, False])
        """
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
