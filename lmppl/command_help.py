"""The pages of ``--help``: the options, as typer shows them, and the models, from the catalogue."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from .catalogue import MODELS, Entry

_ASKED = "lmppl.model"


class ModelCommand(TyperCommand):
    """A command on a model. Its help ends with the data files of all models, or with what the model named takes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_ASKED] = next((a for a in args if a in MODELS), None)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        asked = model_asked(ctx)
        console = Console(markup=False, emoji=False, highlight=False)
        console.print(_all_data(ctx.command_path) if asked is None else _page(asked, MODELS[asked]))


def model_asked(ctx: Any) -> str | None:
    """Returns the model in a command line, which may be incomplete."""
    found: str | None = ctx.meta.get(_ASKED)
    return found


def nearest(name: str, names: Iterable[str]) -> str:
    """ "What to add to an error: " Did you mean ...?" where one of the names is near, else nothing."""
    found = get_close_matches(name, list(names), n=1)
    return f" Did you mean {found[0]!r}?" if found else ""


def usage(error: Any, arguments: list[str]) -> str:
    """Returns what is wrong with a command's arguments, the wrong value, and where the possible ones are listed."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return ""  # nothing was asked: the help has been printed
    given, context = _given(getattr(error, "param", None), arguments), getattr(error, "ctx", None)
    shown = "" if given is None else f" (got {given!r})"
    where = "" if context is None else f"; see {context.command_path} --help"
    return " ".join(error.format_message().split()).rstrip(".") + shown + where


def _given(param: Any, arguments: list[str]) -> str | None:
    """Returns the value after an option's name; None if the option is absent."""
    for name in (n for n in getattr(param, "opts", []) if n.startswith("-")):
        for at, argument in enumerate(arguments):
            if argument.startswith(f"{name}="):
                return argument.partition("=")[2]
            if argument == name and at + 1 < len(arguments):
                return arguments[at + 1]
    return None


def _page(name: str, entry: Entry) -> Panel:
    rows = [("--data", entry.data)]
    rows += [("such as", _visible(entry.example))] if entry.example else []
    rows += [(f"--set {option}=", meaning) for option, meaning in entry.options.items()]
    return _panel(name, rows, f"{entry.infers}\n")


def _all_data(command: str) -> Panel:
    rows = []
    for name, entry in MODELS.items():
        rows += [(name, entry.data)] + ([("", _visible(entry.example))] if entry.example else [])
    return _panel("What --data takes, and an example", rows, "", f"\n{command} MODEL --help has a model's options.")


def _panel(title: str, rows: list[tuple[str, str]], before: str = "", after: str = "") -> Panel:
    """Rows of two columns under a title, as typer shows its options."""
    grid = Table.grid(padding=(0, 2))
    for name, meaning in rows:
        grid.add_row(Text(name, "bold cyan"), Text(meaning, "" if name else "dim"))
    outer = Table.grid()
    for part in (Text(before), grid, Text(after)):
        if part is grid or part:
            outer.add_row(part)
    return Panel(outer, title=Text(title), title_align="left", border_style="dim", expand=True)


def _visible(example: str) -> str:
    return example.replace("\t", "<tab>")
