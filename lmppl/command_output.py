"""The output of a command: results go to standard output, everything else to standard error."""

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
    """A console without markup, which prints texts and file names unchanged; it wraps on a terminal only."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(markup=False, emoji=False, highlight=False, stderr=stderr, width=None if terminal else WIDE)


class Output:
    """The output of one command.

    :param quiet: print results only.
    :param json: print no results, because the command prints JSON instead.
    """

    def __init__(self, quiet: bool = False, json: bool = False):
        self.quiet, self.json = quiet, json
        self.results = console()

    def result(self, shown: Any) -> None:
        """Prints a result: a string or a table."""
        if not self.json:
            self.results.print(shown, soft_wrap=isinstance(shown, str))

    def say(self, line: str) -> None:
        """Prints a line about progress."""
        if not self.quiet:
            console(stderr=True).print(line, soft_wrap=True)

    def status(self, what: str) -> AbstractContextManager[Any]:
        """A context for something slow: it shows a spinner on a terminal, and prints a line elsewhere."""
        if not self.quiet and on_terminal():
            return console(stderr=True).status(Text(what))
        self.say(what)
        return nullcontext()

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """A context that also suppresses warnings if ``quiet``; errors are still raised."""
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
