"""The tables of a page of the documentation, and figures of its text that are copied from them."""

from __future__ import annotations

import re
from decimal import Decimal

Table = dict[tuple[str, str], str]  # a cell by the first cell of its row and the header of its column


def tables(text: str) -> list[Table]:
    """The tables of a text."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = (re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in block.splitlines())
        header, _, *rows = [[cell.strip() for cell in line] for line in lines]
        found.append({(row[0], name): row[i] for row in rows for i, name in enumerate(header)})
    return found


def section(page: str, title: str) -> str:
    """The section of a page that has this title."""
    (found,) = (text for text in re.split(r"^## ", page, flags=re.MULTILINE) if text.startswith(f"{title}\n"))
    return found


def mean(cell: str) -> Decimal:
    """The first number of a cell; the others are its spread."""
    return Decimal(cell.split(" ")[0].replace(",", "").rstrip("%"))


def rounds_to(value: Decimal, shown: str) -> bool:
    """Whether a figure of a text is a value, rounded to the figure's own last digit."""
    figure = Decimal(shown.replace(",", ""))
    return abs(figure - value) <= Decimal(1).scaleb(int(figure.as_tuple().exponent)) / 2


def says(text: str, sentence: str, *values: Decimal) -> bool:
    """Whether a text has this sentence, with these values in the places of {}."""
    pattern = re.escape(sentence).replace(r"\{\}", r"(-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?)").replace(r"\ ", r"\s+")
    return any(
        all(rounds_to(value, shown) for value, shown in zip(values, match.groups(), strict=True))
        for match in re.finditer(pattern, text)
    )
