"""The documentation site: `make docs` builds it into out/docs."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode
from typer.testing import CliRunner

import lmppl
from lmppl.cli import app as commands

project = "lmppl"
version = release = lmppl.__version__
copyright = "the authors of lmppl, MIT license"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton", "sphinx_design", "myst_nb"]
suppress_warnings = ["ref.python"]  # several names of which a short one may be
smartquotes_action = "D"  # dashes, and no other quotes

nb_execution_mode = "off"  # notebooks are committed with their outputs
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
add_module_names = False
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
default_role = "py:obj"  # a name between backticks is a link where there is such a name, and code elsewhere

html_theme = "furo"
html_title = f"lmppl {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False

AXES = re.compile(r"``.*?``|(?<=[( ])\*(?=(plates?|kept|event|batch|\w*shape|stacked|fanout|context|1s)\b)")
# Commands that `convert` does not know, and the space after a function that it does not leave.
TO_MATHML = {r"\\arg(?![a-z])": r"\\operatorname{arg}", r"\\_": "_", r"(\\(?:log|exp|tanh)) *(?=[a-zA-Z\\])": r"\1\\,"}
logger = logging.getLogger(__name__)


class Command(SphinxDirective):
    """``.. command:: lmppl ...`` is a section that shows what the command prints."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        line = self.arguments[0]
        ran = CliRunner().invoke(commands, line.split()[1:], prog_name="lmppl", env={"COLUMNS": "100"})
        if ran.exit_code:
            raise self.error(f"{line}: {ran.output}")
        printed = nodes.literal_block(ran.output, ran.output, language="none")
        return [nodes.section("", nodes.title(line, line), printed, ids=[nodes.make_id(line)])]


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


def mathml(display: str) -> Any:
    """Writes a formula as MathML, which browsers show without a script or a network."""

    def visit(self: Any, node: nodes.Element) -> None:
        formula = node.astext()
        for pattern, written in TO_MATHML.items():
            formula = re.sub(pattern, written, formula)
        written = convert(formula, display=display)
        if "\\" in written:
            logger.warning("MathML has no word for a command of %r", formula, location=node)
        self.body.append(written if display == "inline" else f'<div class="math">{written}</div>')
        raise nodes.SkipNode

    return visit, None


def escaped(app: Sphinx, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Docstrings write shapes as they are, (N, *plates); in reStructuredText a bare asterisk would start emphasis."""
    block = -1  # how far the paragraph is indented whose literal block this is
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip() and (block < 0 or indent <= block) and not line.lstrip().startswith(">>>"):
            lines[i] = AXES.sub(lambda m: m[0] if m[0].startswith("`") else r"\*", line)
            block = indent if line.endswith("::") else -1


def setup(app: Sphinx) -> None:
    app.add_directive("command", Command)
    app.connect("autodoc-process-docstring", escaped)
    app.connect("missing-reference", linked)
    app.add_html_math_renderer("mathml", mathml("inline"), mathml("block"))
