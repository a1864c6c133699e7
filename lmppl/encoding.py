"""`Encoding`: converts strings to texts and back, joins texts, and resolves stops, for one language model."""

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
    """The methods of a language model that need its tokenizer and vocabulary only, not its weights."""

    tokenizer: Any
    vocabulary: Vocabulary

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of token ids for which the network returns a logit."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device on which texts are created."""

    @property
    def eos_id(self) -> int | None:
        """The id of the token that "eos" writes in `encode`; None if there is none.

        >>> LanguageModel.embedded("stories").eos_id
        0
        """
        return self.vocabulary.eos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end a text, as a tuple.

        They come from the generation configuration; else from the model's configuration; else from the tokenizer.

        :raises ValueError: if there is no eos token.

        >>> LanguageModel.embedded("stories").eos_ids
        (0,)
        """
        self.token_id("eos")
        return self.vocabulary.eos_ids

    @property
    def bos_id(self) -> int | None:
        """The id from which an empty text starts: the model's bos, else its eos; None if there is neither.

        >>> LanguageModel.embedded("stories").bos_id
        0
        """
        return self.vocabulary.bos_id

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts a bos before every text by default, as those of Llama and Gemma do.

        >>> LanguageModel.embedded("stories").adds_bos
        False
        """
        return self.vocabulary.adds_bos

    def encode(self, text: Strings, stop: str | int | None = None, *, start: bool = False) -> Tensor:
        """Returns the tokens of strings, without special tokens: ``LongTensor[..., L]``, padded with -1 on the right.

        A string is a piece of text that may stand anywhere. Its tokens spell exactly the string.

        :param text: a string, or a nested list of strings whose lists have equal lengths on each level.
        :param stop: "eos", a string or a token id to append to every text; None: nothing. An observed whole text needs
            its stop.
        :param start: write each string as the start of a document, with the space that SentencePiece tokenizers put
            there. Strings that are passed as prompts (``Completion(lm, "Once")``) are written this way.
        :returns: ``LongTensor[..., L]``; the leading axes are those of the nested list, L is the length of the longest
            text.
        :raises ValueError: if the tokenizer cannot write a text (the message names the word), if the lists are uneven,
            or if ``stop`` is no stop.

        >>> lm = LanguageModel.embedded("stories")
        >>> lm.encode(["Tom went to the kitchen.", " He sliced it."], stop="eos")
        tensor([[ 18,  61,  62,  63,  65,   3,   0],
                [ 38, 200,  64,   3,   0,  -1,  -1]])
        """
        shape, flat = flatten(text)
        end = () if stop is None else self.vocabulary.ending_ids(stop)
        rows = [ids + end for ids in self.vocabulary.encode(flat, start)]
        width = max((len(ids) for ids in rows), default=0)
        padded = [ids + (PAD,) * (width - len(ids)) for ids in rows]
        return torch.tensor(padded, dtype=torch.long, device=self.device).reshape(*shape, width)

    def decode(self, text: Tensor) -> Any:
        """Returns the strings of texts; special tokens such as eos are left out.

        The string is what the tokens spell one after another, including a space at the beginning.

        :param text: texts ``[..., L]``.
        :returns: a string for a text ``[L]``; else nested lists of strings with the shape of the leading axes.
        :raises ValueError: if ``text`` is not well-formed, or has an id outside the vocabulary.

        >>> lm.decode(lm.encode(["The end.", "Once"], stop="eos"))
        ['The end.', 'Once']
        """
        texts.validate(text, "text", self.vocab_size)
        flat = text.reshape(text.shape[:-1].numel(), text.shape[-1]).tolist()
        rows = [[i for i in ids if i != PAD] for ids in flat]
        return nest([self.vocabulary.decode(ids) for ids in rows], text.shape[:-1])

    def join(self, *parts: Tensor | str) -> Tensor:
        """Joins texts and strings one after another: ``[..., L1], [..., L2], ... -> [..., L]``.

        An eos at the end of a text is dropped, because the joined text goes on. An eos inside a text (the turn ends of
        a chat) and any other stop (such as ".") are part of the text and stay.

        :param parts: texts whose leading axes broadcast, or strings, which are encoded unchanged; at least one.
        :returns: ``LongTensor[..., L]``.
        :raises ValueError: if no part is given, or a part is neither a text nor a string.

        >>> lm.decode(lm.join(lm.encode("The end.", stop="eos"), " Once"))
        'The end. Once'
        """
        if not parts:
            raise ValueError("join needs at least one text")
        return self._assembled([("texts", part) for part in parts])

    def fill(self, template: str, **fields: Tensor | str) -> Tensor:
        """Returns a template with its fields ``{x}`` replaced by texts, joined as by `join`.

        If all fields are strings, this is ``lm.encode(template.format(**fields))``. A field that is a text keeps its
        tokens. So put the space before a word into the text and not into the template, if the tokenizer writes a word
        and its space as one token: ``"of{x}"`` with " Spain", not ``"of {x}"`` with "Spain".

        :param template: a string with fields as of `str.format`, without format specifications; ``{{`` is a brace.
        :param fields: a text ``[..., L]`` or a string for each field; leading axes broadcast.
        :returns: ``LongTensor[..., L]``.
        :raises ValueError: if the template is malformed, a field is missing, or a keyword is no field of the template.

        >>> lm = LanguageModel.embedded("stories")
        >>> lm.decode(lm.fill("Ending:{y} Beginning:{x} Middle:", x="Tom went to the kitchen.", y=" He sliced it."))
        'Ending: He sliced it. Beginning:Tom went to the kitchen. Middle:'
        """
        parts: list[tuple[str, Tensor | str]] = []
        used = set()
        try:
            pieces = list(strings.Formatter().parse(template))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"template: {template!r} is not a valid template ({error}); write {{{{ for a brace"
            ) from error
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
        """Returns a conversation in the tokenizer's own chat template, with texts as contents: ``LongTensor[..., L]``.

        If all contents are strings, this is ``tokenizer.apply_chat_template(messages, tokenize=True)``. A content that
        is a text is placed where the template writes a string, without the eos at its end, because the template writes
        its own turn end. The template sees a placeholder instead of the text, so a template that inspects its contents
        inspects that.

        :param messages: a list of ``{"role": ..., "content": ...}``; a content is a string or a text ``[..., L]``. The
            leading axes of all texts broadcast.
        :param add_generation_prompt: whether the template opens the turn that is to be written next.
        :param template_arguments: further arguments of the template or of ``apply_chat_template``.
        :returns: ``LongTensor[..., L]``.
        :raises ValueError: if the tokenizer has no chat template, or the template refuses the messages.

        >>> question = [{"role": "user", "content": lm.encode(["Why?", "How?"])}]
        >>> z = pyro.sample("z", Completion(lm, lm.chat(question), max_tokens=24))
        >>> turns = [*question, {"role": "assistant", "content": z}, {"role": "user", "content": "In one word?"}]
        >>> y = pyro.sample("y", Completion(lm, lm.chat(turns), max_tokens=4))
        """
        rendered = render(self.tokenizer, messages, add_generation_prompt, template_arguments)
        parts = [("content", messages[part]["content"] if isinstance(part, int) else part) for part in rendered]
        return self._assembled(parts, start=True)

    def _assembled(self, parts: Iterable[tuple[str, Tensor | str]], start: bool = False) -> Tensor:
        """Joins named parts: adjacent strings are encoded as one string, and each text loses the eos at its end."""
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
        """Returns the text without the eos at its end."""
        last = texts.length(text)[..., None] - 1
        at_end = torch.arange(text.shape[-1], device=text.device) == last
        ends = torch.tensor(self.vocabulary.eos_ids, dtype=text.dtype, device=text.device)
        return text.masked_fill(at_end & torch.isin(text, ends), PAD)

    def token_id(self, stop: str | int) -> int:
        """Returns the id of one stop.

        :param stop: "eos", a string that is one token, or an id.
        :returns: the id.
        :raises ValueError: if ``stop`` is a string of several tokens, or no id of the vocabulary.

        >>> LanguageModel.embedded("stories").token_id(".")
        3
        """
        return self.vocabulary.token_id(stop)

    def stop_ids(self, stop: Stop) -> Tensor:
        """Returns the ids of all stops, each once.

        :param stop: "eos" (all ids in `eos_ids`), a string that is one token, an id, several of these, or None.
        :returns: ``LongTensor[S]``; empty for None.
        :raises ValueError: if a string is not one token, or the list is empty.

        >>> LanguageModel.embedded("stories").stop_ids(["eos", "."])
        tensor([0, 3])
        """
        several = _several(stop)
        ids = dict.fromkeys(i for s in several for i in (self.eos_ids if s == "eos" else (self.token_id(s),)))
        return torch.tensor([*ids], dtype=torch.long, device=self.device)

    def stops(self, stop: Stop) -> Stops:
        r"""Returns the stops that are single tokens, and the strings among them that take several tokens.

        :param stop: as of `Completion`: "eos", a string, a token id, several of these, or None.
        :returns: `lmppl.stop_strings.Stops`, the pair (``ids``, a LongTensor ``[S]``; ``strings``, the automaton of the
            stop strings, or None).
        :raises ValueError: if a string is empty, or the vocabulary cannot spell it.

        >>> lm.stops(["eos", "\nQuestion:"]).strings.strings
        ('\nQuestion:',)
        """
        several = _several(stop)
        strings = [s for s in several if isinstance(s, str) and s != "eos" and self.vocabulary.one_token(s) is None]
        ids = self.stop_ids([s for s in several if s not in strings] or None)
        return Stops(ids, self.vocabulary.stop_strings(tuple(dict.fromkeys(strings)), ids.device) if strings else None)


def _several(stop: Stop) -> list[str | int]:
    """Returns all stops that were given as a list; [] for None."""
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
