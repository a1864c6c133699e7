"""`LanguageModel`: a causal language model of Hugging Face; `view` has what it shares with masked ones."""

from __future__ import annotations

from transformers import AutoModelForCausalLM

from lmppl.encoding import Stop
from lmppl.view import TOKEN_BUDGET, View

__all__ = ["TOKEN_BUDGET", "LanguageModel", "Stop", "View"]


class LanguageModel(View):
    """A causal language model and its tokenizer.

    Adapters of one base model are `LanguageModel`s of their own, *views* that share `.network`. The network is always
    in `eval()` mode, `train()` included: a log-probability is a function of its inputs, so dropout stays off. Its
    activation functions `gelu_new` and `gelu_fast` are computed by torch's one operation for them. Call the view, not
    `.model`, which all views share. Gradient checkpointing (`lm.model.activation_checkpointing_enable()`) holds for all
    views: each layer is computed again in the backward pass, by the view that ran it.

    The law of a token is what the network says that reads the text so far, alone, also where its positions depend on
    how long the text is (LongRoPE). Several threads may use views of one network: they take turns, pass by pass. What
    is replaced in the model later is followed, but for its vocabulary: wrap it again after `resize_token_embeddings`.

    `token_budget` (an attribute, 16,384 unless set) is the most tokens that go through the network in one pass; larger
    work is split, so that memory stays bounded however many particles are asked for. With gradient, activations of as
    many tokens are kept for the backward pass (of one scoring; a loss may hold several), which reads the rest again; on
    a processor at most half a gigabyte of them at the default budget, in proportion at another.
    One text alone is never split.

    :param model: any causal language model of transformers, without PEFT layers.
    :param tokenizer: its tokenizer.

    >>> lm = LanguageModel.from_pretrained("gpt2")
    >>> guide = lm.with_adapter(LoraConfig(r=16, target_modules="all-linear"))
    """

    kind = "causal language model"
    loader = AutoModelForCausalLM
