"""`NGram`: a table of logits as a Hugging Face causal language model, the simplest one there is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class NGramConfig(PreTrainedConfig):
    """The configuration of an `NGram`.

    :param vocab_size: the number V of tokens.
    :param order: the number of tokens back on which the next one depends (n - 1).
    :param kwargs: arguments of transformers' ``PreTrainedConfig``.
    """

    model_type = "lmppl_ngram"

    def __init__(self, vocab_size: int = 8, order: int = 1, **kwargs: Any):
        self.order = order
        super().__init__(**kwargs)
        self.vocab_size = vocab_size


class NGram(PreTrainedModel):
    r"""A causal language model whose next token depends on the last ``order`` tokens, through one row of a table.

    .. math:: \log p(z_t \mid z_{<t}) = \log \mathrm{softmax}(table[z_{t-k}, \ldots, z_{t-1}])_{z_t}, \qquad k = order

    ``table`` is ((V + 1)^k, V). Its rows are counted in base V + 1, with the last token varying fastest; the digit V
    stands for "before the beginning". `lmppl.inference.markov` has exact inference for it.

    :param config: an `NGramConfig`.

    Example::

        lm = LanguageModel(NGram(NGramConfig(vocab_size=6, order=2)), tokenizer)
    """

    config_class = NGramConfig

    def __init__(self, config: NGramConfig):
        super().__init__(config)
        self.table = nn.Parameter(torch.zeros((config.vocab_size + 1) ** config.order, config.vocab_size))
        self.post_init()

    def rows(self, tokens: Tensor) -> Tensor:
        """Returns the number of the table's row after each prefix of ``tokens``, (..., T) -> (..., T)."""
        base, order = self.config.vocab_size + 1, self.config.order
        before = nn.functional.pad(tokens, (max(order - 1, 0), 0), value=base - 1)
        weights = base ** torch.arange(order - 1, -1, -1, device=tokens.device)
        return (before.unfold(-1, order, 1) * weights).sum(-1) if order else torch.zeros_like(tokens)

    def forward(self, input_ids: Tensor, logits_to_keep: int | Tensor = 0, **kwargs: Any) -> CausalLMOutputWithPast:
        """Returns logits (B, T, V) after each token; there is no cache."""
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=self.table[self.rows(input_ids)[:, keep]])

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves the table unchanged: all tokens have equal probabilities."""


AutoConfig.register(NGramConfig.model_type, NGramConfig)
AutoModelForCausalLM.register(NGramConfig, NGram)
