"""`View`: a Hugging Face language model with its tokenizer, seen from one set of weights; causal and masked ones."""

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
from lmppl.vocabulary import Vocabulary, first_int

TOKEN_BUDGET = 16_384


class View(Encoding, nn.Module):
    """A network and its tokenizer under one set of weights: what causal and masked language models have in common.

    Adapters of one base model are views of their own that share `.network`. The network is always in `eval()` mode,
    `train()` included: a log-probability is a function of its inputs, so dropout stays off. Call the view, not
    `.model`, which all views share.
    """

    kind = "language model"  # in words
    loader: Any = None  # transformers' class that loads one

    def __init__(
        self, model: Any, tokenizer: Any, *, _adapter: Adapter | None = None, _vocabulary: Vocabulary | None = None
    ) -> None:
        super().__init__()
        if not (hasattr(model, "config") and hasattr(model, "forward")):
            raise ValueError(f"model: expected a {self.kind} of transformers, got {type(model).__name__}")
        if not hasattr(tokenizer, "all_special_ids"):
            raise ValueError(f"tokenizer: expected a tokenizer of transformers, got {type(tokenizer).__name__}")
        network = model.__dict__.get("_lmppl_network")
        if network is None:
            # Kept on the model, so that wrapping the same model twice does not give two ideas of what is active.
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
        self.max_length: int | None = first_int(
            getattr(config, "max_position_embeddings", None), getattr(config, "n_positions", None)
        )
        self.token_budget = TOKEN_BUDGET
        self._adapter = _adapter
        self._vocab_size = network.vocab_size
        self._long: bool | None = None

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], *, device: Any = None, dtype: Any = None, **hf_kwargs: Any
    ) -> Self:
        """The language model saved under a path, or under a name on the Hugging Face hub.

        With ``gguf_file=`` (the extra ``gguf``), weights and tokenizer are those of one GGUF file there, dequantised;
        `save_pretrained` then writes an ordinary checkpoint. Code that a checkpoint brings along runs only with
        ``trust_remote_code=True``. Raises CheckpointError (an OSError and a ValueError) if there is no whole language
        model there.

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
        """One of the small language models that ship with the package; keywords as in `from_pretrained`.

        >>> lm = LanguageModel.embedded("stories")
        """
        from lmppl import embedded

        return cls.from_pretrained(embedded.path(name), **kwargs)

    # Facts -----------------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """How many ids the network gives a logit. Raises ValueError where that changed since it was wrapped."""
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
        return self.network.base_parameters[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.base_parameters[0].dtype

    @property
    def has_adapter(self) -> bool:
        """Whether this view has weights of its own on top of the base model's."""
        return self._adapter is not None

    @property
    def adapter_name(self) -> str | None:
        """What the network knows this view's adapter by."""
        return None if self._adapter is None else self._adapter.name

    @property
    def tokens_scored(self) -> int:
        """How many tokens have gone through the network, all views together.

        What exceeds `token_budget` in a pass with gradient goes through again in the backward pass, and counts again.
        """
        return self.network.tokens_scored

    # Running the network ---------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, *, tokens: int | None = None, **kwargs: Any) -> Any:
        """The Hugging Face model's output under this view's weights; gradients reach this view's parameters only.

        :param tokens: what to add to `tokens_scored` (default: every element of `input_ids`).
        """
        network = self.network
        with network.lock:
            self._refuse_resized()
            network.tokens_scored += input_ids.numel() if tokens is None else tokens
            return network.run(self._adapter, input_ids, long=self._long, **kwargs)

    def reading(self, *, long: bool) -> Self:
        """This view, every pass with the rotary factors of long texts, or all with those of short ones.

        Of short texts: `max_length` is the length up to which they hold. See `lmppl.positions`.
        """
        view = copy.copy(self)
        view._long = long
        if not long:
            view.max_length = self.network.rotary.turn
        return view

    @property
    def long(self) -> bool | None:
        """What `reading` was given: None where a pass is read as its own length demands."""
        return self._long

    def train(self, mode: bool = True) -> Self:
        """Sets `.training` of the view only: the network stays in `eval()` mode, with dropout off."""
        self.training = mode
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the network; of a view with an adapter, the adapter's alone.

        So they are what `parameters`, `requires_grad_` and ``pyro.module(name, view)`` see. A module that contains a
        view sees everything of the network.
        """
        found = super().named_parameters(prefix, recurse, remove_duplicate)
        own = None if self._adapter is None else set(self._adapter.parameters)
        return found if own is None else ((name, p) for name, p in found if p in own)

    # Views and their weights -----------------------------------------------------------------------------------------

    def with_adapter(self, peft_config: peft.PeftConfig | str | os.PathLike[str], name: str | None = None) -> Self:
        """The same base weights with a new adapter, or one loaded from a path; only the adapter trains.

        Called on a view that has an adapter itself, it gives a sibling: adapters sit on the base, not on one another.
        When nobody holds the view any more its adapter leaves the network (see `remove_adapter`). Raises ValueError
        naming `peft_config` or `name`, and CheckpointError where a path holds no fitting adapter; the network is then
        as it was.

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
        """Take an adapter and its weights out of the network: of this view, of another view, or of this name.

        The views that had it can no longer be used. Raises ValueError where there is no such adapter.

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
        """What an optimiser should get: the adapter's parameters, or the base model's where this is the base.

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
        """Write the base model and tokenizer for transformers, or the adapter for peft; whole or not at all.

        What was saved there before is replaced, nothing else; ``lmppl.json`` says which files those are. Raises
        ValueError where files of these names were written by others, or changed since.
        """
        with files.writing(directory, loading.BASE if self._adapter is None else loading.KIND) as fresh:
            if self._adapter is None:
                self.network.save_base(fresh)
                # Of several chat templates each would be a file in a folder of its own.
                several = isinstance(getattr(self.tokenizer, "chat_template", None), dict)
                self.tokenizer.save_pretrained(fresh, **({"save_jinja_files": False} if several else {}))
            else:
                self.network.save_adapter(self._adapter, fresh)
