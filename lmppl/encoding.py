"""`Encoding`: texts in the tokens of a language model, from strings and back, put together, and what ends them."""

from __future__ import annotations

import string as strings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lmppl import text as texts
from lmppl.chat import render
from lmppl.stop_strings import Stops
from lmppl.text import PAD
from lmppl.vocabulary import Vocabulary, flatten, nest

Stop = str | int | Iterable[str | int] | Tensor | None
Strings: TypeAlias = "str | Sequence[Strings]"  # a string, or evenly nested lists of strings


class Encoding(ABC):
    """What a language model's tokenizer and vocabulary make of texts; whatever weights it has."""

    tokenizer: Any
    vocabulary: Vocabulary

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """How many ids the network gives a logit."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where texts go."""

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

    def encode(self, text: Strings, stop: str | int | None = None, *, start: bool = False) -> Tensor:
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
