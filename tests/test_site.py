"""The site by its sources: every public name is on one page of the API, every page in a table of contents.

`make docs` finds broken links, unknown names and faulty markup.
"""

from __future__ import annotations

import re
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
from paths import ROOT
from public_names import MODULES

DOCS = ROOT / "docs"
DIRECTIVE = re.compile(r"^\.\. (currentmodule|automodule|auto\w+):: ([\w.]+)(?:\(.*\))?$", re.MULTILINE)
TOCTREE = re.compile(r"^(?:```\{toctree\}\n(.*?)^```|\.\. toctree::\n((?: {3}.*\n|\n)*))", re.MULTILINE | re.DOTALL)


def on_page(page: Path) -> list[str]:
    """The full names that a page of the API documents."""
    found, module = [], ""
    for directive, name in DIRECTIVE.findall(page.read_text()):
        if directive in ("currentmodule", "automodule"):
            module = name
        if directive != "currentmodule":
            found.append(name if directive == "automodule" else f"{module}.{name}")
    return found


PUBLIC = [f"{m}.{name}" for m in [*MODULES, "lmppl.tools", "lmppl.testing"] for name in import_module(m).__all__]


def test_every_public_name_is_on_one_page_of_the_api():
    documented = Counter(name for page in (DOCS / "api").glob("*.rst") for name in on_page(page))
    assert not {name: documented[name] for name in PUBLIC if documented[name] != 1}
    modules = {"lmppl.constraints", "lmppl.distributions", "lmppl.testing", "lmppl.tools"}  # their first paragraphs
    assert set(documented) == {*PUBLIC, *modules}


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("*.rst")), ids=lambda page: page.stem)
def test_a_page_of_the_api_names_nothing_that_is_not_there(page):
    for name in on_page(page):
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), name


def entries(page: Path) -> set[Path]:
    """The pages that the tables of contents of a page list."""
    found = set()
    for markdown, restructured in TOCTREE.findall(page.read_text()):
        for line in (markdown or restructured).splitlines():
            entry = re.sub(r".*<(.*)>", r"\1", line.strip())  # a title <and its page>
            if entry and not entry.startswith(":"):
                listed = [p for kind in (".md", ".rst", ".ipynb") for p in page.parent.glob(entry + kind)]
                assert listed or "*" in entry, f"{page.name}: {entry} is not there"
                found |= set(listed)
    return found


def test_every_page_is_in_a_table_of_contents():
    reached, new = set(), {DOCS / "index.md"}
    while new:
        reached |= new
        new = {entry for page in new for entry in entries(page)} - reached
    pages = {p for kind in ("md", "rst", "ipynb") for p in DOCS.rglob(f"*.{kind}")}
    assert len(pages) > 40 and reached == pages


@pytest.fixture
def extensions(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "_ext")
    return import_module


def test_a_formula_is_shown_as_it_is_meant(extensions):
    mathml = extensions("mathml").mathml
    words = mathml(r"z \sim q(z \mid prompt)", "inline")
    assert "<mo>&#x0223C;</mo>" in words and "<mi>prompt</mi>" in words
    assert "<mspace" in mathml(r"\log p", "inline") and "<mspace" not in mathml(r"\log (p)", "inline")
    assert "\\" not in mathml(r"\arg\max_w \text{next\_logits}", "block")
    assert "\\" in mathml(r"\nothing", "block"), "what the build warns of"


def test_the_asterisk_of_a_shape_starts_no_emphasis(extensions):
    given = [
        "Weights (N, *plates), ``(N, *plates)``.",
        "",
        "Example::",
        "",
        "    f(x)  # (*plates)",
        "",
        "(*event) *not*",
    ]
    lines = list(given)
    extensions("docstrings").escaped(None, "", "", None, None, lines)
    assert lines == [r"Weights (N, \*plates), ``(N, *plates)``.", *given[1:-1], r"(\*event) *not*"]
