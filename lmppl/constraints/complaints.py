"""Shortens llguidance's error messages to one line, without its listing of the grammar."""

from __future__ import annotations

import re

_LISTED = re.compile(r"\s*(\d+ \| .*|\^+)\s*")
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*)")
_PREFIXES = re.compile(r'(invalid regex ".*" \(in regex\): |failed to compile JSON schema: |regex parse error:)')


def shown(written: str) -> str:
    """Returns a constraint as it was written, or the beginning of a long one."""
    return written if len(written) <= 120 else f"{written[:100]}... ({len(written):,} characters)"


def one_line(error: str, above: int | None = None) -> str:
    r"""Returns the reason that an error message gives, on one line.

    :param error: the message of llguidance.
    :param above: the number of lines that the package put above the user's own grammar; the message then names the
        user's line. None: the user wrote no grammar.

        >>> one_line('at 3(7): invalid regex "(" (in regex): regex parse error:\n    (\n    ^\nerror: unclosed group')
        'unclosed group'
    """
    lines = [line for line in error.strip().splitlines() if not _LISTED.fullmatch(line)] or [error.strip()]
    place = _PLACE.fullmatch(lines[0])
    said = next((x.removeprefix("error: ") for x in lines if x.startswith("error: ")), place[3] if place else lines[0])
    while prefix := _PREFIXES.match(said):
        said = said[prefix.end() :]
    where = f"line {int(place[1]) - above}, column {place[2]}: " if place and above is not None else ""
    return where + " ".join(said.split())
