"""Docstrings as they are written here: a name between backticks is a link, and a shape is (N, *plates)."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

AXES = re.compile(r"``.*?``|(?<=[( ])\*(?=(plates?|kept|event|batch|\w*shape|stacked|fanout|context|1s)\b)")


def linked(app: Sphinx, env: Any, node: pending_xref, content: nodes.Element) -> nodes.reference | None:
    """A link to the documented name that ends with what is between the backticks, where there is one such name."""
    if node["reftype"] != "obj":
        return None
    documented = env.domains.python_domain.objects
    ends = [name for name, entry in documented.items() if name.endswith(f".{node['reftarget']}") and not entry.aliased]
    whole = [name for name in ends if documented[name].objtype in ("class", "exception", "function", "data")]
    for found in (whole, ends):
        if len(found) == 1:
            entry = documented[found[0]]
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, found[0])
    return None


def escaped(app: Sphinx, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """In reStructuredText the asterisk of a shape would start emphasis; examples and literals are left alone."""
    block = -1  # how far the paragraph is indented whose literal block this is
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip() and (block < 0 or indent <= block) and not line.lstrip().startswith(">>>"):
            lines[i] = AXES.sub(lambda m: m[0] if m[0].startswith("`") else r"\*", line)
            block = indent if line.endswith("::") else -1


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", escaped)
    app.connect("missing-reference", linked)
    return {"parallel_read_safe": True}
