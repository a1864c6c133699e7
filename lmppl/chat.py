"""Chat templates whose contents may be texts: renders the template and finds where each text stands in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from torch import Tensor

Part = str | int
# Arguments of ``apply_chat_template`` that concern token ids and not the template.
OF_TOKENS = ("tokenize", "padding", "truncation", "max_length", "tokenizer_kwargs", "return_assistant_tokens_mask")


def render(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, arguments: Mapping[str, Any]
) -> list[Part]:
    """Returns the conversation as a list of strings and of message numbers; a number marks where a message's text goes.

    The template sees a placeholder for each text. Raises ValueError for a tokenizer without a template; and, naming
    ``messages``, for anything that is no conversation, that the template refuses, or whose text it leaves out.
    """
    if unknown := [name for name in OF_TOKENS if name in arguments]:
        raise ValueError(f"{unknown[0]}: chat writes the whole conversation as one text; leave this argument out")
    if not (getattr(tokenizer, "chat_template", None) or arguments.get("chat_template")):
        raise ValueError("chat: the tokenizer has no chat template; set lm.tokenizer.chat_template, or use lm.fill")
    if not isinstance(messages, list | tuple) or not messages or not all(_is_message(m) for m in messages):
        found: Any = messages if isinstance(messages, list | tuple) else [messages]
        raise ValueError(
            'messages: expected a list of {"role": str, "content": str or text}, '
            f"got {[sorted(m) if isinstance(m, Mapping) else type(m).__name__ for m in found]}"
        )
    said = repr([{k: v for k, v in m.items() if not isinstance(v, Tensor)} for m in messages])
    mark = "TeXt"  # mixed case, so that a template that changes the case of contents is noticed
    while any(mark in s for s in (said, repr(arguments), str(tokenizer.chat_template))):
        mark += "X"
    given = [{**m, "content": _placeholder(mark, i, m["content"])} for i, m in enumerate(messages)]
    try:
        rendered = tokenizer.apply_chat_template(
            given, tokenize=False, add_generation_prompt=add_generation_prompt, **arguments
        )
    except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"messages: the chat template refuses them ({reason})") from error
    pieces: list[str] = re.split(f"{mark}([0-9]+){mark}", rendered)
    parts: list[Part] = [int(p) if i % 2 else p for i, p in enumerate(pieces)]
    found = [p for p in parts if isinstance(p, int)]
    texts = [i for i, m in enumerate(messages) if isinstance(m["content"], Tensor)]
    if found != texts:
        raise ValueError(f"messages: the chat template writes the texts of messages {found}, expected {texts}")
    return parts


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str | Tensor)
    )


def _placeholder(mark: str, number: int, content: str | Tensor) -> str:
    return content if isinstance(content, str) else f"{mark}{number}{mark}"
