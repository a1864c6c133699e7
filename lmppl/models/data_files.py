"""Reads the user's data files: UTF-8, with or without a byte-order mark; lines end at newlines only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
MARK = b"\xef\xbb\xbf"


def read_text(path: str | Path, name: str = "data") -> str:
    """The text of a file.

    :param name: the argument that an error names.
    :raises ValueError: naming the file, where it is a directory, and line and byte, where it is not UTF-8 or has a NUL
        byte (as UTF-16 has).
    """
    if Path(path).is_dir():
        raise ValueError(f"{name}: {path} is a directory; expected a file")
    content = Path(path).read_bytes().removeprefix(MARK)
    if b"\0" in content and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        line = content[: content.index(b"\0")].count(b"\n") + 1
        raise ValueError(f"{name}: {path}, line {line} has a NUL byte, which is not text; save the file as UTF-8")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start].split(b"\n")
        raise ValueError(
            f"{name}: {path}, line {len(before)} is not UTF-8 at byte {len(before[-1]) + 1} of the line, "
            f"0x{content[error.start]:02x}; save the file as UTF-8"
        ) from error


def read_lines(path: str | Path, name: str = "data") -> Iterator[tuple[int, str]]:
    r"""The lines of a text file that are not blank, each with its number from 1.

    A line ends at "\n" or "\r\n".  The other line ends of Unicode (U+2028, U+0085, "\v") are part of the text.

    :raises ValueError: as `read_text`.
    """
    for number, line in enumerate(read_text(path, name).split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def read_each(path: str | Path, parse: Callable[[str], T], what: str, name: str = "data") -> list[T]:
    """What ``parse`` returns for each line of a text file; blank lines are skipped.

    :param what: what a line holds, in words, for an error.
    :raises ValueError: as `read_text`; naming file and line, where ``parse`` raises one; and where there is no line.
    """
    found = []
    for number, line in read_lines(path, name):
        try:
            found.append(parse(line))
        except ValueError as error:
            raise ValueError(f"{name}: {path}, line {number} {error}") from error
    if not found:
        raise ValueError(f"{name}: {path} has no {what} in it")
    return found


def read_json(path: str | Path, name: str = "data") -> Any:
    """The content of a JSON file.

    :raises ValueError: naming file and line, where it is not UTF-8 or not JSON.
    """
    written = read_text(path, name)
    try:
        return parsed(written)
    except ValueError as error:
        line = f", line {error.__cause__.lineno}" if isinstance(error.__cause__, json.JSONDecodeError) else ""
        raise ValueError(f"{name}: {path}{line} {error}") from error


def parsed(written: str) -> Any:
    """The value of a JSON string.

    :raises ValueError: without the place, where it is not JSON, or has half of a character (a lone surrogate).
    """
    try:
        found = json.loads(written)
        json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at character {error.colno}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"has half of a character, {error.object[error.start]!r}") from error
    except (ValueError, RecursionError) as error:  # a number with too many digits, too many nested brackets
        raise ValueError(f"is not JSON that can be read: {error}") from error
    return found
