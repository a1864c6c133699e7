"""What is shown of a `Completion`: its prompts and rules in words.  The network is not asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import markup

if TYPE_CHECKING:
    from .completion import Completion

PROMPTS, STOPS = 4, 4  # how many are shown


def prompts(completion: Completion) -> list[str]:
    """The first prompts, decoded."""
    rows = completion.prompt.reshape(completion.prompt.shape[:-1].numel(), completion.prompt.shape[-1])
    return completion.lm.decode(rows[:PROMPTS])


def rules(completion: Completion) -> dict[str, str]:
    """The arguments beside the prompt, those at their defaults left out."""
    found = {"max_tokens": _number(completion.max_tokens), "stop": ", ".join(_stops(completion)) or "None"}
    if bool((completion.min_tokens > 0).any()):
        found["min_tokens"] = _number(completion.min_tokens)
    if bool((completion.temperature != 1).any()):
        found["temperature"] = _number(completion.temperature)
    if completion.allowed is not None:
        found["allowed"] = _name(completion.allowed)
    if completion.tools:
        found["tools"] = ", ".join(map(_name, completion.tools))
    return found


def plain(completion: Completion) -> str:
    """One line."""
    some = [repr(p if len(p) <= 40 else p[:39] + "…") for p in prompts(completion)[:2]]
    rest = completion.prompt.shape[:-1].numel() - len(some)
    parts = [*some, *([f"{rest} more"] if rest else []), *(f"{k}={v}" for k, v in rules(completion).items())]
    return f"{type(completion).__name__}({', '.join(parts)})"


def html(completion: Completion) -> str:
    """A table of the first prompts, and one of the rules."""
    shown = prompts(completion)
    cut = completion.prompt.shape[:-1].numel() - len(shown)
    parts: list[Any] = [markup.table(["prompt"], [[markup.text(p)] for p in shown])]
    parts += [markup.note(f"{cut} more prompts")] if cut else []
    parts.append(markup.table(["", "what follows"], [*rules(completion).items()], left=(0, 1)))
    return markup.page(f"{type(completion).__name__}, batch {tuple(completion.batch_shape)}", *parts)


def _number(x: Tensor) -> str:
    if not x.numel():
        return "none"
    low, high = x.min().item(), x.max().item()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _stops(completion: Completion) -> list[str]:
    """What ends the texts, as strings; a special token by its name."""
    ids = completion.stop.tolist()
    found = [
        repr(s) if (s := completion.lm.decode(completion.stop.new_tensor([i]))) else _token(completion, i) for i in ids
    ]
    found += map(repr, completion.stop_strings.strings if completion.stop_strings is not None else ())
    return found if len(found) <= STOPS else [*found[:STOPS], f"{len(found) - STOPS} more"]


def _token(completion: Completion, token: int) -> str:
    string = completion.lm.decode(completion.stop.new_tensor([token]))
    return repr(string) if string else str(completion.lm.tokenizer.convert_ids_to_tokens(token))


def _name(x: Any) -> str:
    return getattr(x, "__name__", None) or type(x).__name__
