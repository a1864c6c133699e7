"""HTML as its tables: what a reader sees in each cell, and which tags there are."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """``tables[t][row][column]`` is the text of a cell, ``shown`` all text, ``tags`` the names of all elements."""

    def __init__(self, html: str):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: set[str] = set()
        self.shown = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.shown += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
