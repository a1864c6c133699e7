"""`LanguageModel`: a causal language model of Hugging Face. `view` has what it shares with masked ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lmppl.encoding import Stop
from lmppl.suitable import refuse_other_predictions
from lmppl.view import TOKEN_BUDGET, View

__all__ = ["TOKEN_BUDGET", "LanguageModel", "Stop", "View"]


class LanguageModel(View):
    r"""A causal language model of Hugging Face and its tokenizer, as a distribution over text.

    .. math:: p(z_1 \dots z_n \mid prompt) = \prod_t p(z_t \mid prompt, z_{<t})

    The base model and each of its adapters are language models of this class, *views* that share one ``.network``:

    - Call the view and not ``.model``, which all views share.
    - The network stays in ``eval()`` mode, also after ``train()``: a log-probability is a function of its inputs, so
      dropout stays off. The activation functions ``gelu_new`` and ``gelu_fast`` are computed by torch's single
      operation.
    - Gradient checkpointing (``lm.model.activation_checkpointing_enable()``) applies to all views: the backward pass
      computes each layer again.
    - Several threads may use views of one network. They take turns, pass by pass.
    - Modules that are replaced in the model later are noticed. After ``resize_token_embeddings``, wrap the model again.

    The probability of a token is what the network returns when it reads the text before it and nothing else, also if
    its positions depend on the length of the text (LongRoPE).

    ``token_budget`` (an attribute, 16,384 by default) is the largest number of tokens in one pass through the network.
    Larger work is split, so memory stays bounded for any number of particles; a single text is never split. With
    gradient, activations of at most that many tokens are kept for each scoring, and the backward pass reads the rest
    again. On a processor they take at most half a gigabyte at the default budget, and proportionally more or less at
    another.

    :param model: a causal language model of transformers, without PEFT layers.
    :param tokenizer: its tokenizer.
    :raises ValueError: if ``model`` or ``tokenizer`` is not one of transformers, the model is not causal, or it already
        has PEFT layers.

    Attributes: ``.model`` and ``.tokenizer`` as given; ``.max_length``, the number of tokens of the model's context, or
    None; ``.token_budget``.

    >>> lm = LanguageModel.embedded("stories")  # or LanguageModel.from_pretrained("gpt2")
    >>> guide = lm.with_adapter(LoraConfig(r=16, target_modules="all-linear"))
    >>> z = Completion(guide, "Tom went to the kitchen.", max_tokens=9, stop=".").sample()
    >>> lm.decode(z)  # such as ' He took the small loaf.'
    """

    kind = "causal language model"
    loader = AutoModelForCausalLM

    @torch.no_grad()
    def _refuse_unsuitable(self) -> None:
        network = self.network
        with network.lock:
            if network.sharded or "predicts" in network.kept:
                return

            def read(ids: Tensor) -> Any:
                return network.run(None, ids.to(self.device), use_cache=False)

            refuse_other_predictions(self.model, network.vocab_size, self.max_length, read)
            network.kept["predicts"] = True
