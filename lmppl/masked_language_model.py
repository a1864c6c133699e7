"""`MaskedLanguageModel`: a Hugging Face masked language model with its tokenizer."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM

from lmppl.view import View


class MaskedLanguageModel(View):
    r"""A masked language model of Hugging Face and its tokenizer: it predicts masked tokens from both sides.

    .. math:: p_\theta(x_i = w \mid x), \qquad x \text{ a text some of whose tokens are masks, } i \text{ one of them}

    With several gaps it does not define a distribution over texts by itself; `lmppl.distributions.Unmasking` makes one
    of it. Adapters, `encode`, `decode`, `join` and `save_pretrained` work as those of `LanguageModel`. ``token_budget``
    (an attribute) is the largest number of tokens in one pass through the network.

    :param model: a masked language model of transformers (BERT, RoBERTa, ModernBERT, ...), without PEFT layers.
    :param tokenizer: its tokenizer.
    :param private: for internal use.
    :raises ValueError: if the tokenizer has no mask token.

    >>> lm = MaskedLanguageModel.embedded("masked_stories")  # or .from_pretrained("answerdotai/ModernBERT-base")
    >>> d = Unmasking(lm, lm.join("Tom went to the", lm.gap(1), "."))
    >>> lm.decode(d.fill(d.sample()))  # such as 'Tom went to the attic.'
    """

    kind = "masked language model"
    loader = AutoModelForMaskedLM

    def __init__(self, model: Any, tokenizer: Any, **private: Any) -> None:
        super().__init__(model, tokenizer, **private)
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise ValueError("tokenizer: it has no mask token, which a masked language model needs")

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *, device: Any = None, dtype: Any = None, **hf_kwargs: Any) -> Self:
        """Loads the masked language model saved under a path, or under a name on the Hugging Face hub.

        :param name_or_path: a directory, or a name on the hub.
        :param device: where the model is moved to, e.g. "cuda"; None: where transformers puts it.
        :param dtype: the type of the weights; None: transformers' default.
        :param hf_kwargs: further arguments of transformers' ``from_pretrained``.
        :returns: a `MaskedLanguageModel`.
        :raises CheckpointError: if there is no complete masked language model there. It is an OSError and a ValueError.
        :raises ValueError: for ``gguf_file``: GGUF files hold causal language models.

        >>> lm = MaskedLanguageModel.from_pretrained("bert-base-cased", device="cuda")
        """
        if "gguf_file" in hf_kwargs:
            raise ValueError("gguf_file: GGUF files hold causal language models only; use safetensors")
        return super().from_pretrained(name_or_path, device=device, dtype=dtype, **hf_kwargs)

    @property
    def mask_id(self) -> int:
        """The id of the mask token, which stands for a gap.

        >>> lm = MaskedLanguageModel.embedded("masked_stories")
        >>> lm.tokenizer.decode([lm.mask_id])
        '<mask>'
        """
        return int(self.tokenizer.mask_token_id)

    def gap(self, tokens: int) -> Tensor:
        """Returns a text of mask tokens.

        :param tokens: how many, at least 1.
        :returns: ``LongTensor[tokens]``.
        :raises ValueError: if ``tokens`` is not a positive integer.

        >>> canvas = lm.join(x, lm.gap(6), y)
        >>> int((canvas == lm.mask_id).sum())
        6
        """
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"tokens: expected a positive integer, got {tokens!r}")
        return torch.full((tokens,), self.mask_id, device=self.device)

    @cached_property
    def frame(self) -> tuple[Tensor, Tensor]:
        """The texts that the tokenizer puts before and after a text by default ([CLS] and [SEP] of BERT), a pair.

        >>> lm = MaskedLanguageModel.embedded("masked_stories")
        >>> [len(text) for text in lm.frame]
        [0, 0]
        """
        mask = self.tokenizer.mask_token
        framed, bare = (self.tokenizer(mask, add_special_tokens=a)["input_ids"] for a in (True, False))
        at = framed.index(self.mask_id)
        after = framed[at + len(bare) - bare.index(self.mask_id) :]
        before = framed[: at - bare.index(self.mask_id)]
        return tuple(torch.tensor(ids, dtype=torch.long, device=self.device) for ids in (before, after))  # type: ignore[return-value]
