"""A Hugging Face masked language model with its tokenizer, seen from one set of weights."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM

from lmppl.view import View


class MaskedLanguageModel(View):
    r"""A masked language model, a denoiser, and its tokenizer.

    .. math:: p_\theta(x_i = w \mid x), \qquad x \text{ a text some of whose tokens are masks, } i \text{ one of them}

    It reads texts both ways. By itself it is no distribution over texts with several gaps; what makes one of it is
    `lmppl.distributions.Unmasking`. Adapters, `encode`, `decode`, `join` and `save_pretrained` are those of
    `LanguageModel`; `token_budget` is the most tokens that go through the network in one pass.

    :param model: any masked language model of transformers (BERT, RoBERTa, ModernBERT, ...), without PEFT layers.
    :param tokenizer: its tokenizer.
    :raises ValueError: for a tokenizer without a mask token.

    >>> lm = MaskedLanguageModel.from_pretrained("answerdotai/ModernBERT-base")
    >>> lm.join("Tom went to the", lm.gap(1), ".")
    """

    kind = "masked language model"
    loader = AutoModelForMaskedLM

    def __init__(self, model: Any, tokenizer: Any, **private: Any) -> None:
        super().__init__(model, tokenizer, **private)
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise ValueError("tokenizer: it has no mask token, so that this is no masked language model")

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *, device: Any = None, dtype: Any = None, **hf_kwargs: Any) -> Self:
        """The masked language model saved under a path, or under a name on the Hugging Face hub.

        See `LanguageModel.from_pretrained`. Raises ValueError for ``gguf_file``: such files hold causal ones.

        >>> lm = MaskedLanguageModel.from_pretrained("bert-base-cased", device="cuda")
        """
        if "gguf_file" in hf_kwargs:
            raise ValueError("gguf_file: no masked language model is read from GGUF files; take it in safetensors")
        return super().from_pretrained(name_or_path, device=device, dtype=dtype, **hf_kwargs)

    @property
    def mask_id(self) -> int:
        """The token that stands for a gap."""
        return int(self.tokenizer.mask_token_id)

    def gap(self, tokens: int) -> Tensor:
        """So many masks in a row, a text: ``LongTensor[tokens]``.

        >>> canvas = lm.join(x, lm.gap(6), y)
        """
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"tokens: expected a positive integer, got {tokens!r}")
        return torch.full((tokens,), self.mask_id, device=self.device)

    @cached_property
    def frame(self) -> tuple[Tensor, Tensor]:
        """What the tokenizer puts before and after a text by default ([CLS] and [SEP] of BERT), a text each."""
        mask = self.tokenizer.mask_token
        framed, bare = (self.tokenizer(mask, add_special_tokens=a)["input_ids"] for a in (True, False))
        at = framed.index(self.mask_id)
        after = framed[at + len(bare) - bare.index(self.mask_id) :]
        before = framed[: at - bare.index(self.mask_id)]
        return tuple(torch.tensor(ids, dtype=torch.long, device=self.device) for ids in (before, after))  # type: ignore[return-value]
