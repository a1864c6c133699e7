"""Infilling by a masked diffusion language model: the middle of a story is unmasked word by word; its end is observed.

z ~ Unmasking(x ______),    y ~ LM(x z) observed;    wanted: p(z | x, y), z a path of unmasking steps

Venkatraman et al. 2024, "Amortizing intractable inference in diffusion models", section 3.2 (arXiv 2405.20971).
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import torch
from torch import Tensor

from ...distributions import Completion, Unmasking
from ...distributions.unmasking import Order
from ...embedded import Story
from ...language_model import LanguageModel
from ...masked_language_model import MaskedLanguageModel
from ...rows import distinct_rows
from ...text import length, pad


class Diffusion:
    r"""The model and guide of infilling by unmasking: a masked language model fills a gap, the end y is observed.

    .. math:: p(z, y \mid x) = p(z \mid x) \, p_{reader}(y \mid x, z)

    z is a path of unmasking steps, which determines the text.  So p(z | x) and u are exact, although the probability of
    the text is a sum over paths (720 for six words).

    :param lm: the masked language model p; it is not trained.
    :param reader: a causal language model, which scores endings; it is not trained.
    :param guide_lm: the guide's masked language model, usually ``lm.with_adapter(...)``; None: there is no guide.
    :param order: the order of the model's steps, see `Unmasking`.
    :param guide_order: the order of the guide's steps.

    `model(x, y)` and `guide(x, y)` are Pyro programs over beginnings with a gap behind them x (B, Lx) and endings y (B,
    Ly), both in tokens of ``lm``, with one plate of stories.  The gap gives the number of words of the middle.

    Source: Venkatraman et al. 2024, "Amortizing intractable inference in diffusion models", section 3.2.

    Example::

        lm, reader = MaskedLanguageModel.embedded("masked_stories"), LanguageModel.embedded("stories")
        task = Diffusion(lm, reader, lm.with_adapter(LoraConfig(r=16, target_modules="all-linear")))
        x, y = task.encode(embedded.data("stories", "test")[:2])
        posterior = Importance(task.model, task.guide, num_particles=64).run(x, y)
        lm.decode(task.prior(x).fill(posterior.resample(4).samples["z"]))  # four stories of each, without their ends
    """

    def __init__(
        self,
        lm: MaskedLanguageModel,
        reader: LanguageModel,
        guide_lm: MaskedLanguageModel | None = None,
        *,
        order: str | Order = "random",
        guide_order: str | Order = "random",
    ):
        self.lm, self.reader, self.guide_lm = lm, reader, guide_lm
        self.order, self.guide_order = order, guide_order
        self.words = torch.ones(lm.vocab_size, dtype=torch.bool, device=lm.device)  # tokens that may be drawn
        self.words[lm.tokenizer.all_special_ids] = False
        ids = reader.vocab_size
        self.same_tokens = lm.vocabulary.spelled[:ids] == reader.vocabulary.spelled

    def model(self, x: Tensor, y: Tensor) -> Tensor:
        """z unmasks the gap of x; the text after that begins with y.

        :param x: beginnings with a gap, (B, Lx).
        :param y: endings, (B, Ly).
        :returns: z, paths.
        """
        with pyro.plate("stories", len(x)):
            middle = self.prior(x)
            z = pyro.sample("z", middle)
            pyro.sample("y", self.ending(middle.fill(z), y), obs=self.read(y))
            return z

    def guide(self, x: Tensor, y: Tensor) -> Tensor:
        """z ~ q(z | x, y), by a masked language model that unmasks the gap and reads the ending behind it.

        :param x: beginnings with a gap, (B, Lx).
        :param y: endings, (B, Ly).
        :returns: z, paths.
        """
        with pyro.plate("stories", len(x)):
            return pyro.sample("z", self.posterior(x, y))

    def prior(self, x: Tensor) -> Unmasking:
        """p(z | x).

        :param x: beginnings with a gap, (B, Lx).
        :returns: an `Unmasking`.
        """
        return Unmasking(self.lm, x, order=self.order, allowed=self.words)

    def posterior(self, x: Tensor, y: Tensor, lm: MaskedLanguageModel | None = None) -> Unmasking:
        """q(z | x, y), by the guide's language model or another one.

        :param x: beginnings with a gap, (B, Lx).
        :param y: endings, (B, Ly).
        :param lm: a masked language model; None: the guide's.
        :returns: an `Unmasking`.
        :raises ValueError: where there is none.
        """
        lm = lm or self.guide_lm
        if lm is None:
            raise ValueError("guide_lm: this Diffusion was made without a guide")
        return Unmasking(lm, lm.join(x, y), order=self.guide_order, allowed=self.words)

    def ending(self, told: Tensor, y: Tensor) -> Completion:
        """p(y | x, z), by the reader.

        :param told: beginnings with their filled gaps, (..., B, L).
        :param y: endings, (B, Ly); they set the length.
        :returns: a `Completion`.
        """
        return Completion(self.reader, self.read(told), max_tokens=length(self.read(y)), stop=None)

    def read(self, told: Tensor) -> Tensor:
        """Texts of ``lm`` in the reader's tokens.

        :param told: texts (..., L).
        :returns: texts (..., L').
        """
        if self.same_tokens:
            return told
        rows, which = distinct_rows(told.reshape(-1, told.shape[-1]))
        written = self.reader.encode(self.lm.decode(rows))
        return written[which].view(*told.shape[:-1], -1)

    def encode(self, stories: Sequence[Story]) -> tuple[Tensor, Tensor]:
        """The arguments of model and guide for these stories, with a gap for each word of the middle.

        :param stories: B of them.
        :returns: (x, y).
        """
        middle = self.lm.encode([s.z for s in stories])
        gap = torch.where(middle < 0, middle, self.lm.mask_id)
        x = self.lm.join(self.lm.encode([s.x for s in stories]), gap)
        return pad(x, int(length(x).max())), self.lm.encode([s.y for s in stories])
