"""``.. printed:: lmppl ...`` is a section that shows what the command prints."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.testing import CliRunner

from lmppl.cli import app as commands

COLUMNS = "88"  # as many as fit beside the table of contents


class Printed(SphinxDirective):
    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        line = self.arguments[0]
        ran = CliRunner().invoke(commands, line.split()[1:], prog_name="lmppl", env={"COLUMNS": COLUMNS})
        if ran.exit_code:
            raise self.error(f"{line}: {ran.output}")
        shown = "\n".join(row.rstrip() for row in ran.output.strip("\n").splitlines())
        title = nodes.title("", "", nodes.literal(line, line))
        return [nodes.section("", title, nodes.literal_block(shown, shown, language="none"), ids=[nodes.make_id(line)])]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("printed", Printed)
    return {"parallel_read_safe": True}
