"""Texts as they are shown, and pieces of HTML: what is not `Markup` is escaped; colours are those of the page."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from typing import Any

LONGEST = 160  # characters of a text that are shown


class Markup(str):
    """HTML that is ready to be shown."""


def escaped(x: Any) -> Markup:
    """``x`` as HTML; what is `Markup` already stays as it is."""
    return x if isinstance(x, Markup) else Markup(html.escape(str(x)))


def text(string: str) -> Markup:
    """A text with its spaces and line ends; of a long one the beginning."""
    if not string:
        return note("(empty)")
    shown = string if len(string) <= LONGEST else string[:LONGEST] + "…"
    return Markup(f'<span style="white-space:pre-wrap">{html.escape(shown)}</span>')


def visible(string: str, keep: str = "\n\t") -> str:
    r"""A text whose control characters are named, except those in ``keep``: a terminal would obey them.

    >>> visible("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in keep else c for c in string)


def note(string: str) -> Markup:
    """A remark, smaller than the rest."""
    return Markup(f'<span style="font-style:italic;opacity:0.7">{html.escape(string)}</span>')


def strong(string: str) -> Markup:
    return Markup(f"<b>{html.escape(string)}</b>")


def bar(share: float, error: float = 0.0) -> Markup:
    """A bar of length ``share`` between 0 and 1, with a line from one standard error below to one above."""
    low, high = max(0.0, share - error), min(1.0, share + error)
    whisker = (
        f'<div style="position:absolute;top:45%;height:1px;background:currentColor;'
        f'left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></div>'
    )
    return Markup(
        '<div style="position:relative;width:9em;height:0.8em">'
        f'<div style="width:{100 * share:.1f}%;height:100%;background:currentColor;opacity:0.4"></div>'
        f"{whisker if high > low and error > 0 else ''}</div>"
    )


def table(titles: Sequence[str], rows: Sequence[Sequence[Any]], *, left: Sequence[int] = (0,)) -> Markup:
    """Rows under their titles; columns stand to the right, those numbered in ``left`` to the left."""

    def cell(tag: str, column: int, x: Any) -> str:
        side = "left" if column in left else "right"
        return f'<{tag} style="text-align:{side};vertical-align:top;padding:0.1em 0.7em">{escaped(x)}</{tag}>'

    head = "".join(cell("th", i, title) for i, title in enumerate(titles))
    body = "".join(f"<tr>{''.join(cell('td', i, x) for i, x in enumerate(row))}</tr>" for row in rows)
    style = "border-collapse:collapse;margin:0.2em 0 0.6em 0;color:inherit"
    return Markup(f'<table style="{style}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>')


def page(title: str, *parts: Any) -> str:
    """What a notebook shows of an object: its title, then the parts, one below the other.

    The classes keep MathJax from reading dollars in texts as formulas.
    """
    below = "".join(f"<div>{escaped(part)}</div>" for part in parts if part)
    return f'<div class="tex2jax_ignore mathjax_ignore"><div><b>{html.escape(title)}</b></div>{below}</div>'
