"""`TokenClassifier`: a small learned condition, logistic regression on the tokens of a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..language_model import LanguageModel
from ..text import PAD
from .data_files import read_each


class TokenClassifier(nn.Module):
    r"""The probability of a text's label, by logistic regression on its tokens.

    .. math:: p(label \mid z) = \sigma(f(z)), \qquad f(z) = b + \sum_t w_{z_t}

    Called on texts (..., L) it returns :math:`\log \sigma(f(z))`, (...), at most 0, for a `pyro.factor`.

    :param vocab_size: the size of the vocabulary whose tokens the texts have.

    >>> garden = TokenClassifier.fitted(lm, texts, labels)
    >>> pyro.factor("condition", garden(z))
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.weights, self.bias = nn.Parameter(torch.zeros(vocab_size)), nn.Parameter(torch.zeros(()))

    def logit(self, z: Tensor) -> Tensor:
        """f(z).

        :param z: texts, (..., L).
        :returns: (...).
        """
        return self.bias + self.weights[z.clamp(min=0)].masked_fill(z == PAD, 0.0).sum(-1)

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.logsigmoid(self.logit(z))

    @classmethod
    def fitted(
        cls, lm: LanguageModel, texts: Sequence[str], labels: Sequence[bool], *, ridge: float = 1e-3, steps: int = 50
    ) -> TokenClassifier:
        r"""The classifier of the largest penalised likelihood, found by L-BFGS from zero.

        .. math:: \max_{w, b} \frac1N \sum_n \log p(label_n \mid z_n) - \frac{ridge}2 |w|^2

        The objective is concave and nothing is random, so that every call gives the same.

        :param lm: the language model that encodes the texts.
        :param texts: N strings.
        :param labels: N labels.
        :param ridge: the weight of the penalty.
        :param steps: the most iterations.
        :raises ValueError: unless there are as many labels as texts, of both kinds.
        """
        if len(texts) != len(labels) or len(set(map(bool, labels))) < 2:
            raise ValueError(f"labels: expected one for each of the {len(texts)} texts, of both kinds")
        z, y = lm.encode(list(texts)), torch.tensor([float(label) for label in labels], device=lm.device)
        found = cls(lm.vocab_size).to(lm.device)
        optimizer = torch.optim.LBFGS(found.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            misfit = nn.functional.binary_cross_entropy_with_logits(found.logit(z), y)
            total = misfit + 0.5 * ridge * found.weights.square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        return found.requires_grad_(False)


def read_labelled(path: str | Path) -> tuple[list[str], list[bool]]:
    """Texts and their labels from a file: "0" or "1", a tab and a text in each line; blank lines are skipped.

    :raises ValueError: naming the file and line of anything else.
    """

    def parse(line: str) -> tuple[str, bool]:
        label, tab, said = line.partition("\t")
        if label not in ("0", "1") or not tab or not said.strip():
            raise ValueError("is not 0 or 1, a tab and a text")
        return said, label == "1"

    texts, labels = zip(*read_each(path, parse, "labelled text", "labelled"), strict=True)
    return list(texts), list(labels)
