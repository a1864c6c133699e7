"""What the repository says of itself is so: versions, badges, the files that a newcomer looks for."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml
from paths import ROOT

import lmppl

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == lmppl.__version__
    assert citation["license"] == PROJECT["license"]


def test_the_badges_tell_the_truth():
    badges = dict(re.findall(r"!\[([^\]]+)\]\(https://img\.shields\.io/badge/([^)]+)\)", README))
    assert set(badges) == {"Python 3.11+", "License: MIT", "Typed"}
    assert PROJECT["requires-python"] == ">=3.11" and "3.11%2B" in badges["Python 3.11+"]
    assert PROJECT["license"] == "MIT" and "-MIT-" in badges["License: MIT"]
    assert (ROOT / "lmppl" / "py.typed").exists() and "py.typed" in badges["Typed"]


def test_the_issue_forms_ask_for_something():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.stem != "config":
            ids = [part["id"] for part in form["body"]]
            assert form["name"] and form["description"] and len(ids) == len(set(ids)) > 0


def test_the_commands_that_are_named_are_there():
    """`make TARGET` in README, CONTRIBUTING and docs."""
    targets = set(re.findall(r"^([.\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    named = {t for page in pages for t in re.findall(r"(?:`|^    )make ([a-z.][\w-]*)", page.read_text(), re.MULTILINE)}
    assert {"test", "demo", "lint"} <= named <= targets


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_lead_somewhere(page):
    """Those of docs are checked when the site is built."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
