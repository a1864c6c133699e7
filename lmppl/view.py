"""`View`: a Hugging Face language model and its tokenizer under one set of weights; the base of all language models."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any, Self

import peft
import torch
from torch import Tensor, nn

from lmppl import files, loading
from lmppl.adapters import Adapter, Network
from lmppl.encoding import Encoding
from lmppl.suitable import refuse_unloaded
from lmppl.vocabulary import Vocabulary, first_int

TOKEN_BUDGET = 16_384
CONTEXT = ("max_position_embeddings", "n_positions", "max_target_positions")  # the configuration's names for its length


def _context(model: Any, config: Any) -> int | None:
    """Returns how many tokens the network can read; None if there is no limit."""
    most = first_int(*(getattr(config, name, None) for name in CONTEXT))
    if most is None or most < 1:  # XLNet's -1
        return None
    tables = (getattr(module, "position_embeddings", None) for module in model.modules())
    # RoBERTa's positions begin after that of padding.
    padding = next((i for t in tables if (i := getattr(t, "padding_idx", None)) is not None), -1)
    return most - padding - 1


class View(Encoding, nn.Module):
    """A network and its tokenizer under one set of weights: what causal and masked language models have in common.

    The base model and each of its adapters are views, which share one ``.network``. The network stays in ``eval()``
    mode, also after ``train()``: a log-probability is a function of its inputs, so dropout stays off. Call the view and
    not ``.model``, which all views share.
    """

    kind = "language model"  # for messages
    loader: Any = None  # the class of transformers that loads one

    def __init__(
        self, model: Any, tokenizer: Any, *, _adapter: Adapter | None = None, _vocabulary: Vocabulary | None = None
    ) -> None:
        super().__init__()
        if not (hasattr(model, "config") and hasattr(model, "forward")):
            raise ValueError(f"model: expected a {self.kind} of transformers, got {type(model).__name__}")
        if not hasattr(tokenizer, "all_special_ids"):
            raise ValueError(f"tokenizer: expected a tokenizer of transformers, got {type(tokenizer).__name__}")
        refuse_unloaded(model)
        network = model.__dict__.get("_lmppl_network")
        if network is None:
            # Kept on the model: two wrappers of one model share one record of which adapter is active.
            network = model.__dict__["_lmppl_network"] = Network(model)
        with network.lock:
            network.follow()
        config = model.config.get_text_config()
        self.model: Any = model
        self.tokenizer = tokenizer
        self.network: Network = network
        self.vocabulary = _vocabulary or Vocabulary(
            tokenizer, config, network.vocab_size, getattr(model, "generation_config", None)
        )
        self.max_length: int | None = _context(model, config)
        self.token_budget = TOKEN_BUDGET
        self._adapter = _adapter
        self._vocab_size = network.vocab_size
        self._long: bool | None = None
        self._refuse_unsuitable()

    def _refuse_unsuitable(self) -> None:
        """Raises ValueError if the network cannot be a language model of this class."""

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], *, device: Any = None, dtype: Any = None, **hf_kwargs: Any
    ) -> Self:
        """Loads the language model saved under a path, or under a name on the Hugging Face hub.

        With ``gguf_file=`` (needs the extra ``gguf``), weights and tokenizer come from that one GGUF file and are
        dequantised; `save_pretrained` then writes an ordinary checkpoint. Code that comes with a checkpoint runs only
        with ``trust_remote_code=True``.

        :param name_or_path: a directory, or a name on the hub.
        :param device: where the model is moved to, e.g. "cuda"; None: where transformers puts it.
        :param dtype: the type of the weights, e.g. ``torch.bfloat16``; None: transformers' default.
        :param hf_kwargs: further arguments of transformers' ``from_pretrained``, e.g. ``revision``, ``gguf_file``.
        :returns: a language model of the class on which it is called.
        :raises CheckpointError: if there is no complete language model there. It is an OSError and a ValueError.
        :raises ValueError: if ``name_or_path`` is neither a string nor a path.

        >>> lm = LanguageModel.from_pretrained("gpt2", device="cuda", dtype=torch.bfloat16)
        >>> lm = LanguageModel.from_pretrained("models", gguf_file="smollm2.gguf")
        """
        if not isinstance(name_or_path, str | os.PathLike):
            raise ValueError(f"name_or_path: expected a directory, or a name on the hub, got {name_or_path!r}")
        if dtype is not None:
            hf_kwargs["dtype"] = dtype
        model, tokenizer = loading.checkpoint(os.fspath(name_or_path), cls.loader, **hf_kwargs)
        return cls(model if device is None else model.to(device), tokenizer)

    @classmethod
    def embedded(cls, name: str, **kwargs: Any) -> Self:
        """Loads one of the small language models that ship with the package, for examples and tests.

        :param name: "stories", "numbers", "subjectivity", "arithmetic", or for masked models "masked_stories".
        :param kwargs: arguments of `from_pretrained`.
        :returns: a language model of the class on which it is called.
        :raises ValueError: if there is no such model.

        >>> lm = LanguageModel.embedded("stories")
        >>> lm.vocab_size
        272
        """
        from lmppl import embedded

        return cls.from_pretrained(embedded.path(name), **kwargs)

    # Facts -----------------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """The number of token ids for which the network returns a logit.

        :raises ValueError: if that number changed since the network was wrapped.

        >>> LanguageModel.embedded("stories").vocab_size
        272
        """
        self._refuse_resized()
        return self._vocab_size

    def _refuse_resized(self) -> None:
        if self.network.vocab_size != self._vocab_size:
            raise ValueError(
                f"model: it has {self.network.vocab_size} ids, and had {self._vocab_size} when it was wrapped; after "
                f"resize_token_embeddings, wrap it again: {type(self).__name__}(model, tokenizer)"
            )

    @property
    def device(self) -> torch.device:
        """The device of the weights; texts are created there."""
        return self.network.base_parameters[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the base weights, such as torch.float32."""
        return self.network.base_parameters[0].dtype

    @property
    def has_adapter(self) -> bool:
        """Whether this view has an adapter, with weights in addition to the base model's.

        >>> lm.has_adapter, q.has_adapter
        (False, True)
        """
        return self._adapter is not None

    @property
    def adapter_name(self) -> str | None:
        """The name of this view's adapter in the network; None for the base model.

        >>> lm.adapter_name is None
        True
        """
        return None if self._adapter is None else self._adapter.name

    @property
    def tokens_scored(self) -> int:
        """The number of tokens that have gone through the network, over all views: the cost measure of comparisons.

        In a pass with gradient, tokens beyond ``token_budget`` go through again in the backward pass, and count again.

        >>> before = lm.tokens_scored
        >>> log_p = Completion(lm, x, max_tokens=5).log_prob(z)
        >>> lm.tokens_scored > before
        True
        """
        return self.network.tokens_scored

    # Running the network ---------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, *, tokens: int | None = None, **kwargs: Any) -> Any:
        """Runs the Hugging Face model once under this view's weights; gradients reach this view's parameters only.

        :param input_ids: LongTensor (B, L), without -1.
        :param tokens: the number to add to `tokens_scored`; None: the number of elements of ``input_ids``.
        :param kwargs: further arguments of the model's forward method.
        :returns: the model's output, with ``.logits`` (B, L, V).
        :raises ValueError: if the vocabulary was resized, or the adapter removed, since the view was made.

        >>> lm(lm.encode(["The end."])).logits.shape
        torch.Size([1, 8, 109])
        """
        network = self.network
        with network.lock:
            self._refuse_resized()
            network.tokens_scored += input_ids.numel() if tokens is None else tokens
            return network.run(self._adapter, input_ids, long=self._long, **kwargs)

    def reading(self, *, long: bool) -> Self:
        """Returns this view with a fixed choice of rotary factors: those of long texts, or those of short ones.

        It matters for networks whose positions depend on the length of the text (LongRoPE); see `lmppl.positions`.

        :param long: True: every pass uses the factors of long texts. False: those of short texts; ``max_length`` is
            then the longest text for which they hold.
        :returns: a view of the same network with the same adapter.

        >>> lm.reading(long=True).long
        True
        """
        view = copy.copy(self)
        view._long = long
        if not long:
            view.max_length = self.network.rotary.turn
        return view

    @property
    def long(self) -> bool | None:
        """The choice that `reading` made; None: each pass uses the factors for its own length."""
        return self._long

    def train(self, mode: bool = True) -> Self:
        """Sets ``.training`` of this view only; the network stays in ``eval()`` mode, with dropout off.

        :param mode: the value to set.
        :returns: this view.

        >>> lm.train().model.training
        False
        """
        self.training = mode
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the names and parameters of this view: of the network, or of the adapter alone if the view has one.

        ``parameters``, ``requires_grad_`` and ``pyro.module(name, view)`` follow it. A module that contains a view sees
        all parameters of the network.

        :param prefix: as of `torch.nn.Module.named_parameters`.
        :param recurse: likewise.
        :param remove_duplicate: likewise.
        :returns: an iterator over (name, parameter).

        >>> all("lora" in name for name, _ in q.named_parameters())
        True
        """
        found = super().named_parameters(prefix, recurse, remove_duplicate)
        own = None if self._adapter is None else set(self._adapter.parameters)
        return found if own is None else ((name, p) for name, p in found if p in own)

    # Views and their weights -----------------------------------------------------------------------------------------

    def with_adapter(self, peft_config: peft.PeftConfig | str | os.PathLike[str], name: str | None = None) -> Self:
        """Returns a view of the same base weights with a new adapter, or with a saved one; only the adapter trains.

        Any number of adapters share one base model; using one never changes the weights, gradients or ``requires_grad``
        of another. An adapter always sits on the base model, also if this view has an adapter itself. An adapter leaves
        the network when no view holds it any more (see `remove_adapter`). After an error the network is unchanged.

        :param peft_config: a configuration of PEFT (LoRA or another adapter of layers), or the directory or hub name of
            a saved adapter.
        :param name: the adapter's name in the network, a word without dots; None: a free one is chosen.
        :returns: a language model of the same class, with the same tokenizer and token budget.
        :raises ValueError: if the configuration does not fit the model, or the name is taken.
        :raises CheckpointError: if a path holds no adapter that fits the model.

        >>> guide = lm.with_adapter(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        >>> guide.save_pretrained("out/guide")
        >>> guide = lm.with_adapter("out/guide")
        """
        self._refuse_resized()
        if isinstance(peft_config, peft.PeftConfig):
            adapter = self.network.add(peft_config, name)
        elif isinstance(peft_config, str | os.PathLike):
            adapter = self.network.load(os.fspath(peft_config), name)
        else:
            raise ValueError(f"peft_config must be a PeftConfig or a path, not {type(peft_config).__name__}")
        view = type(self)(self.model, self.tokenizer, _adapter=adapter, _vocabulary=self.vocabulary)
        view.token_budget = self.token_budget
        return view

    def remove_adapter(self, adapter: View | str | None = None) -> None:
        """Removes an adapter and its weights from the network; views with this adapter can no longer be used.

        :param adapter: a view with an adapter of this network, or the adapter's name; None: this view's own.
        :raises ValueError: if there is no such adapter.

        >>> lm.remove_adapter(guide)
        """
        found: Any = self if adapter is None else adapter
        if isinstance(found, View):
            found = found._adapter if found.network is self.network else None
        elif isinstance(found, str):
            found = self.network.adapters.get(found)
        if not isinstance(found, Adapter):
            known = sorted(self.network.adapters)
            raise ValueError(f"adapter: expected a view with an adapter of this network, or one of {known}")
        self.network.remove(found)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters for an optimiser: the adapter's, or the base model's if the view has no adapter.

        :returns: a list of parameters with ``requires_grad``.
        :raises ValueError: if the adapter was removed.

        >>> optimizer = torch.optim.AdamW(guide.trainable_parameters(), lr=1e-3)
        """
        with self.network.lock:
            self.network.follow()
            self._refuse_resized()
            if self._adapter is not None:
                self.network.refuse_removed(self._adapter)
            own = self.network.base_parameters if self._adapter is None else self._adapter.parameters
            return [p for p in own if p.requires_grad]

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Saves the base model and its tokenizer, or the adapter alone if the view has one, in safetensors.

        transformers and PEFT read the files without lmppl. All files are written, or none after an error. An earlier
        save in the same directory is replaced, and nothing else; ``lmppl.json`` lists the files that belong to the
        save.

        :param directory: where to save; it is created if it does not exist.
        :raises ValueError: if a file of one of these names was written by another program, or was changed since.

        >>> q.save_pretrained("out/guide")
        >>> guide = lm.with_adapter("out/guide")
        """
        with files.writing(directory, loading.BASE if self._adapter is None else loading.KIND) as fresh:
            if self._adapter is None:
                self.network.save_base(fresh)
                # transformers would write each of several chat templates into a folder of its own.
                several = isinstance(getattr(self.tokenizer, "chat_template", None), dict)
                self.tokenizer.save_pretrained(fresh, **({"save_jinja_files": False} if several else {}))
            else:
                self.network.save_adapter(self._adapter, fresh)
