"""Formulas as MathML, which browsers show without a script or a network."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

# What `convert` does not know or do: commands, the space after a function, ~ as a relation, words of several letters.
BEFORE = {r"\\arg(?![a-z])": r"\\operatorname{arg}", r"\\_": "_", r"(\\(?:log|exp|tanh)) *(?=[a-zA-Z\\])": r"\1\\,"}
TILDE = "<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>"
WORD = re.compile(r"(?:<mi>[a-z]</mi>){4,}")


def mathml(formula: str, display: str) -> str:
    for pattern, replacement in BEFORE.items():
        formula = re.sub(pattern, replacement, formula)
    written = convert(formula, display=display).replace(*TILDE)
    return WORD.sub(lambda m: f"<mi>{re.sub('</?mi>', '', m[0])}</mi>", written)


def visitor(display: str) -> Any:
    def visit(self: Any, node: nodes.Element) -> None:
        written = mathml(node.astext(), display)
        if "\\" in written:
            logger.warning("MathML has no word for a command of %r", node.astext(), location=node)
        self.body.append(written if display == "inline" else f'<div class="math">{written}</div>')
        raise nodes.SkipNode

    return visit, None


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", visitor("inline"), visitor("block"))
    return {"parallel_read_safe": True}
