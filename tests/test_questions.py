"""docs/questions.md: thirty questions, each with a page and a heading that exist, two clicks from the first page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from paths import ROOT

DOCS = ROOT / "docs"
ROWS = [
    [cell.strip() for cell in line.strip("| \n").split(" | ")]
    for line in (DOCS / "questions.md").read_text().splitlines()
    if re.match(r"\| \d+ \|", line)
]
LINK = re.compile(r"\[[^\]]+\]\(([^)#]+)(?:#([^)]+))?\)")


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub and the site make them of its headings."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in found}


def test_there_are_thirty():
    assert [int(row[0]) for row in ROWS] == list(range(1, 31))
    assert all(len(row) == 4 and row[1][-1] in "?." and row[2][-1] == "." for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_question_has_its_answer(row):
    links = LINK.findall(row[3])
    assert links and len(links) == row[3].count("](")
    for page, anchor in links:
        assert (DOCS / page).is_file(), page
        assert not anchor or anchor in headings(DOCS / page), f"{page}#{anchor}"


def test_the_first_page_leads_to_the_questions():
    assert "(questions.md" in (DOCS / "index.md").read_text()
