"""A Hugging Face language model with its tokenizer, seen from one set of weights.

`View` is what all of them have in common, `LanguageModel` a causal one; `masked_language_model` has the masked ones.
"""

from __future__ import annotations

import copy
import os
import string as strings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lmppl import files, loading
from lmppl import text as texts
from lmppl.adapters import Adapter, Network
from lmppl.chat import render
from lmppl.stop_strings import Stops
from lmppl.text import PAD
from lmppl.vocabulary import Vocabulary, first_int, flatten, nest

Stop = str | int | Iterable[str | int] | Tensor | None
TOKEN_BUDGET = 16_384


class View(nn.Module):
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
    def eos_id(self) -> int | None:
        """The end that `encode` writes; None where there is none."""
        return self.vocabulary.eos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every end of a text: the generation configuration's, else the configuration's, else the tokenizer's."""
        self.token_id("eos")
        return self.vocabulary.eos_ids

    @property
    def bos_id(self) -> int | None:
        """What an empty text starts from: the model's bos, else its eos."""
        return self.vocabulary.bos_id

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts a bos before any text unless told otherwise."""
        return self.vocabulary.adds_bos

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

    # Text ------------------------------------------------------------------------------------------------------------

    def encode(self, text: Any, stop: str | int | None = None, *, start: bool = False) -> Tensor:
        """The tokens of a string, or of a nested list of strings: ``LongTensor[..., L]``, no special tokens added.

        A string is a piece of text, which may stand anywhere: its tokens spell it and nothing else.

        :param stop: "eos", a string or an id, appended to every text: an observed whole text needs it.
        :param start: write the strings as the tokenizer writes the start of a document, with the space that
            SentencePiece puts before it. Strings that are given as prompts (``Completion(lm, "Once")``) are read so.

        Raises ValueError naming the text, and the word of it, that the tokenizer cannot write.

        >>> lm.encode(["The end.", "Once"], stop="eos").shape
        """
        shape, flat = flatten(text)
        end = () if stop is None else self.vocabulary.ending_ids(stop)
        rows = [ids + end for ids in self.vocabulary.encode(flat, start)]
        width = max((len(ids) for ids in rows), default=0)
        padded = [ids + (PAD,) * (width - len(ids)) for ids in rows]
        return torch.tensor(padded, dtype=torch.long, device=self.device).reshape(*shape, width)

    def decode(self, text: Tensor) -> Any:
        """The string of a text ``[L]``, or a nested list that mirrors the leading axes; special tokens are dropped.

        A string is what its tokens spell one after another, its first space included.

        >>> lm.decode(lm.encode(["The end.", "Once"], stop="eos"))
        ['The end.', 'Once']
        """
        texts.validate(text, "text", self.vocab_size)
        flat = text.reshape(text.shape[:-1].numel(), text.shape[-1]).tolist()
        rows = [[i for i in ids if i != PAD] for ids in flat]
        return nest([self.vocabulary.decode(ids) for ids in rows], text.shape[:-1])

    def join(self, *parts: Tensor | str) -> Tensor:
        """One text after another, batched and broadcasting: ``[..., L1], [..., L2], ... -> [..., L]``.

        The eos that ends a text is dropped, because the text goes on. An eos inside a text, as the turn ends of a chat,
        and any other stop are part of the text and stay. Strings stay as they are written.

        >>> lm.decode(lm.join(lm.encode("The end.", stop="eos"), " Once"))
        'The end. Once'
        """
        if not parts:
            raise ValueError("join needs at least one text")
        return self._assembled([("texts", part) for part in parts])

    def fill(self, template: str, **fields: Tensor | str) -> Tensor:
        """A template whose fields ``{x}`` are texts, batched and broadcasting; put together as by `join`.

        Where all fields are strings it is ``lm.encode(template.format(**fields))``. A text keeps its tokens: a space
        before its field is a token beside them, where a tokenizer writes a word with its space as one. Give the space
        to the text: ``"of{x}"`` with " Spain", not ``"of {x}"`` with "Spain".

        >>> lm.fill("Beginning:{x}\\nEnding:{y}\\nMiddle:", x=x, y=y)
        """
        parts: list[tuple[str, Tensor | str]] = []
        used = set()
        try:
            pieces = list(strings.Formatter().parse(template))
        except (TypeError, ValueError) as error:
            raise ValueError(f"template: {template!r} is no template ({error}); write {{{{ for a brace") from error
        for fixed, name, spec, conversion in pieces:
            parts.append(("template", fixed))
            if name is None:
                continue
            if name not in fields or spec or conversion:
                raise ValueError(f"template has the field {name!r}; the fields given are {sorted(fields)}")
            used.add(name)
            parts.append((name, fields[name]))
        if unknown := sorted(set(fields) - used):
            raise ValueError(f"{unknown[0]} is no field of the template {template!r}")
        return self._assembled(parts)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **template_arguments: Any
    ) -> Tensor:
        """A conversation in the tokenizer's own chat template, whose contents may be texts: ``LongTensor[..., L]``.

        Where all contents are strings it is ``tokenizer.apply_chat_template(messages, tokenize=True)``. A content that
        is a text is put where the template puts a string, batched and broadcasting, without the eos that ends it: the
        template writes its own. A template that reads its contents sees a placeholder there.

        :param messages: of ``{"role": ..., "content": ...}``, a content being a string or a text.
        :param add_generation_prompt: whether the template opens the turn that is to be written.
        :param template_arguments: what else the template, or ``apply_chat_template``, takes.

        Raises ValueError for a tokenizer without a template, and for messages that the template refuses.

        >>> lm.chat([{"role": "user", "content": question}, {"role": "assistant", "content": z}, ...])
        """
        rendered = render(self.tokenizer, messages, add_generation_prompt, template_arguments)
        parts = [("content", messages[part]["content"] if isinstance(part, int) else part) for part in rendered]
        return self._assembled(parts, start=True)

    def _assembled(self, parts: Iterable[tuple[str, Tensor | str]], start: bool = False) -> Tensor:
        """Named parts in a row: strings that stand side by side are encoded as one, texts lose the eos at their end."""
        found: list[Tensor | str] = []
        for name, part in parts:
            if isinstance(part, str):
                before = found.pop() if found and isinstance(found[-1], str) else ""
                found.append(f"{before}{part}")
            elif isinstance(part, Tensor) and part.dim():
                found.append(self._opened(part))
            else:
                kind = "a tensor of one number" if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(f"{name} must be texts or strings, not {kind}")
        begin = [
            self.encode(p, start=start and not i) if isinstance(p, str) else p for i, p in enumerate(found) if p != ""
        ]
        return texts.cat(*begin) if begin else self.encode("")

    def _opened(self, text: Tensor) -> Tensor:
        """A text that goes on: the eos at its end dropped."""
        last = texts.length(text)[..., None] - 1
        at_end = torch.arange(text.shape[-1], device=text.device) == last
        ends = torch.tensor(self.vocabulary.eos_ids, dtype=text.dtype, device=text.device)
        return text.masked_fill(at_end & torch.isin(text, ends), PAD)

    def token_id(self, stop: str | int) -> int:
        """The id of one stop: "eos", a string that is one token, or an id. Raises ValueError naming `stop`."""
        return self.vocabulary.token_id(stop)

    def stop_ids(self, stop: Stop) -> Tensor:
        """The ids of all stops, each once: ``LongTensor[S]``, empty for None.

        Raises ValueError for a string that is not one token.

        >>> lm.stop_ids(["eos", "."])
        """
        several = _several(stop)
        ids = dict.fromkeys(i for s in several for i in (self.eos_ids if s == "eos" else (self.token_id(s),)))
        return torch.tensor([*ids], dtype=torch.long, device=self.device)

    def stops(self, stop: Stop) -> Stops:
        """The ids of all stops that are one token, and the strings among them that are several.

        Raises ValueError for a string that is empty, or that no tokens spell.

        >>> lm.stops(["eos", "\\nQuestion:"])
        """
        several = _several(stop)
        strings = [s for s in several if isinstance(s, str) and s != "eos" and self.vocabulary.one_token(s) is None]
        ids = self.stop_ids([s for s in several if s not in strings] or None)
        return Stops(ids, self.vocabulary.stop_strings(tuple(dict.fromkeys(strings)), ids.device) if strings else None)


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


def _several(stop: Stop) -> list[str | int]:
    """All stops that were given; none for None."""
    if stop is None:
        return []
    if isinstance(stop, Tensor):
        stop = stop.reshape(-1).tolist()
    several: list[Any] = [stop] if isinstance(stop, str | bytes) or not isinstance(stop, Iterable) else [*stop]
    for each in several:
        if isinstance(each, bytes | bytearray):
            string = bytes(each).decode(errors="replace")
            raise ValueError(f"stop={each!r}: expected a string, got bytes; write {string!r}")
    if not several:
        raise ValueError("stop is empty; for texts without a stop, pass stop=None")
    return several
