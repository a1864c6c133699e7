"""Where the words of a command go: results to standard output, what it says on the way to standard error."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.text import Text

from .progress import on_terminal

WIDE = 10_000  # columns where there is no terminal: no line is wrapped, no table cut


def console(*, stderr: bool = False) -> Console:
    """Users' texts, data and file names are shown as they are; where there is no terminal, without wrapping."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(markup=False, emoji=False, highlight=False, stderr=stderr, width=None if terminal else WIDE)


class Output:
    """What one command prints.

    :param quiet: results alone.
    :param json: standard output has JSON alone, which the command prints itself.
    """

    def __init__(self, quiet: bool = False, json: bool = False):
        self.quiet, self.json = quiet, json
        self.results = console()

    def result(self, shown: Any) -> None:
        """Print a result: a string or a table."""
        if not self.json:
            self.results.print(shown, soft_wrap=isinstance(shown, str))

    def say(self, line: str) -> None:
        """Print a line about what goes on."""
        if not self.quiet:
            console(stderr=True).print(line, soft_wrap=True)

    def status(self, what: str) -> AbstractContextManager[Any]:
        """Around something that takes a while: a spinner on a terminal, elsewhere a line."""
        if not self.quiet and on_terminal():
            return console(stderr=True).status(Text(what))
        self.say(what)
        return nullcontext()

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Where only results are wanted, without the warnings of libraries either; errors are still raised."""
        if not self.quiet:
            yield
            return
        logger = logging.getLogger("lmppl")
        before = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logger.setLevel(before)
