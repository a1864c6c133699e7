"""Progress on standard error: a bar on a terminal or in a notebook, and plain lines at intervals elsewhere.

The bar is tqdm's. Both say how much is done, the mean rate, the time left at that rate, and the figures that matter.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Protocol

EVERY = 10.0  # seconds between two plain lines, at least
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress(Protocol):
    """Shows the progress of something."""

    def update(self, figures: str = "") -> None:
        """Counts one more unit as done, and shows these figures."""

    def say(self, line: str) -> None:
        """Prints a separate line."""


@contextmanager
def progress(name: str, total: int, *, done: int = 0, unit: str = "step", shown: bool = True) -> Iterator[Progress]:
    """Shows the progress of something with ``total`` units, ``done`` of which are done already, if ``shown``.

    >>> with progress("Training", total=2, shown=False) as bar:
    ...     for loss in (1.5, 0.5):
    ...         bar.update(f"loss {loss:.3f}")
    """
    if not shown:
        yield Silence()
        return
    made = Bar if on_terminal() or in_notebook() else Lines
    with closing(made(name, total, done, unit)) as found:
        yield found


def on_terminal() -> bool:
    """Returns whether standard error is a terminal with room for a bar; terminals of batch jobs may have no columns."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # a stream without a file
        return False


def in_notebook() -> bool:
    """Returns whether this runs in a notebook, which shows a bar although it is not a terminal."""
    return "ipykernel.zmqshell" in sys.modules


class Silence:
    """Shows nothing."""

    def update(self, figures: str = "") -> None:
        pass

    def say(self, line: str) -> None:
        pass


class Bar:
    """tqdm's bar for terminals, or its widget in a notebook with ipywidgets."""

    def __init__(self, name: str, total: int, done: int, unit: str):
        from tqdm.auto import tqdm

        # smoothing=0: the mean rate, since looks and checkpoints make single steps slow
        self._bar = tqdm(
            desc=name,
            total=total,
            initial=done,
            unit=unit,
            smoothing=0,
            miniters=1,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def update(self, figures: str = "") -> None:
        self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update()

    def say(self, line: str) -> None:
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Closes the bar and leaves it visible."""
        self._bar.close()


class Lines:
    """Plain lines without control characters: at most one every `EVERY` seconds, and one at the end."""

    def __init__(self, name: str, total: int, done: int, unit: str, clock: Callable[[], float] = time.monotonic):
        self.name, self.total, self.done, self.unit, self.clock = name, total, done, unit, clock
        self.start, self.began = done, clock()
        self.said, self.untold = self.began, ""

    def update(self, figures: str = "") -> None:
        from tqdm.std import tqdm

        self.done += 1
        now = self.clock()
        self.untold = tqdm.format_meter(
            self.done, self.total, now - self.began, prefix=self.name, unit=self.unit, postfix=figures,
            bar_format=LINE, initial=self.start,
        )  # fmt: skip
        if now - self.said >= EVERY:
            self.said = now
            self.close()

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Prints the last line, unless it has been printed."""
        if self.untold:
            self.say(self.untold)
        self.untold = ""
