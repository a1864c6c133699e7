"""Finds the rules of a Lark grammar that never end: each of their alternatives contains a rule that never ends."""

from __future__ import annotations

import re
from collections.abc import Callable

Ends = Callable[[set[str]], bool]  # whether an expression matches some text, if the rules in this set do

_TOKEN = re.compile(
    r"""
    (?P<space>\s+|//[^\n]*|\#[^\n]*|->\s*\w+|\.\.)
  | (?P<directive>%(?:ignore|import|declare|llguidance)\b[^\n]*)
  | (?P<defined>[?!]?[A-Za-z_][\w-]*(?:\.-?\d+)?\s*(?:\[[^\]]*\]\s*)?:)
  | (?P<rule>[a-z_][\w-]*)
  | (?P<atom>[A-Z][\w-]*|"(?:\\.|[^"\\])*"i?|/(?:\\.|[^/\\\n])+/\w*|<[^>\s]*>)
  | (?P<none>[?*]|\{\s*(?:0\s*)?(?:,[^}]*)?\}|~\s*0+\b(?:\.\.\d+)?)
  | (?P<some>\+|\{[\d\s,]*\}|~\s*\d+(?:\.\.\d+)?)
  | (?P<open>[(\[]) | (?P<close>[)\]]) | (?P<bar>\|)
    """,
    re.VERBOSE,
)


def endless(lark: str) -> list[str]:
    r"""Returns the rules that match no text; [] if the grammar has a construct that is not analysed.

    >>> endless('start: "a" start | loop | "b"\nloop: "(" loop ")"')
    ['loop']
    """
    rules: dict[str, Ends] = {}
    for name, body in _definitions(lark).items():
        rules[name] = _alternatives(body[::-1], rules)
    ended: set[str] = set()
    while more := {name for name, ends in rules.items() if name not in ended and ends(ended)}:
        ended |= more
    return [name for name in rules if name not in ended]


def _definitions(lark: str) -> dict[str, list[tuple[str, str]]]:
    """Returns the tokens of each rule's body; no rules if something cannot be read."""
    found: dict[str, list[tuple[str, str]]] = {}
    body: list[tuple[str, str]] = []
    at = 0
    while at < len(lark):
        token = _TOKEN.match(lark, at)
        if token is None or token.lastgroup is None:
            return {}
        kind, at = token.lastgroup, token.end()
        if kind == "directive":
            body = []
        elif kind == "defined":
            name = re.split(r"[.\s\[:]", token[0].lstrip("?!"), maxsplit=1)[0]
            body = []
            if name.lower() == name:  # a terminal cannot contain itself
                body = found.setdefault(name, [])
        elif kind != "space":
            body.append((kind, token[0]))
    return found


def _alternatives(tokens: list[tuple[str, str]], rules: dict[str, Ends]) -> Ends:
    """Reads the expression up to a closing bracket or the end; its tokens are taken from the end of the list."""
    sequences: list[list[Ends]] = [[]]
    while tokens:
        kind, said = tokens.pop()
        if kind == "close":
            break
        if kind == "bar":
            sequences.append([])
        elif kind == "none" and sequences[-1]:
            sequences[-1][-1] = _always
        elif kind == "rule":
            sequences[-1].append(lambda ended, name=said: name not in rules or name in ended)  # type: ignore[misc]
        elif kind == "open":
            within = _alternatives(tokens, rules)
            sequences[-1].append(_always if said == "[" else within)
    return lambda ended: any(all(part(ended) for part in sequence) for sequence in sequences)


def _always(ended: set[str]) -> bool:
    return True
