"""Tables and bars on a terminal, plain lines elsewhere: the one place that decides which.

Only `verl_vla.cli.main` makes a `Console`, so neither worker processes nor tests draw anything.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, TextIO, TypeVar

from verl_vla.core.text import TextTable

if TYPE_CHECKING:
    from verl_vla.runs.screen import Screen

T = TypeVar("T")

Advance = Callable[[str], None]
"""Function that moves a bar by one and puts a note behind it."""


def can_draw(stream: TextIO) -> bool:
    """Return true for a terminal, unless NO_COLOR (no-color.org) or TERM=dumb asks for plain lines.

    Escape codes and carriage returns would make a log file unreadable.
    """
    # no-color.org: an empty NO_COLOR asks for nothing
    is_plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") in (None, "dumb")
    return stream.isatty() and not is_plain


class Console(logging.StreamHandler[TextIO]):
    """Our log lines on a stream; on a terminal, tables are drawn and bars stand below the lines."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.draws = can_draw(stream)

    @cached_property
    def screen(self) -> Screen:
        """Terminal of the stream."""
        from verl_vla.runs.screen import Screen  # noqa: PLC0415 -- rich is slow, and help needs none

        return Screen(self.stream)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; a table that is its only argument is drawn."""
        if not self.draws:
            super().emit(record)
            return
        # the table as an object: a formatted message would have lost its cells
        match record.args:
            case (TextTable() as table,):
                self.screen.draw(table)
            case _:
                self.screen.write(self.format(record))

    def end_bars(self) -> None:
        """Remove the bars that an exception has left, so that its message stands alone."""
        # asking for the property would import rich to end bars that were never made
        if "screen" in vars(self):
            self.screen.end_bars()


def show_table(table: TextTable) -> None:
    """Draw a table on stdout, or write its lines."""
    if can_draw(sys.stdout):
        Console(sys.stdout).screen.draw(table)
    else:
        sys.stdout.write(f"{table}\n")


@contextmanager
def bar(what: str, total: int) -> Generator[Advance | None]:
    """Show a bar on the terminal of our log lines; yield None where there is none."""
    handlers = logging.getLogger("verl_vla").handlers
    consoles = [handler for handler in handlers if isinstance(handler, Console) and handler.draws]
    if not consoles:
        yield None
        return
    with consoles[0].screen.bar(what, total) as advance:
        yield advance


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yield the items, with a bar of those that are done."""
    with bar(what, total) as advance:
        for item in items:
            yield item
            if advance is not None:
                advance("")


def track_encoding(batches: Sequence[T]) -> Iterator[T]:
    """Yield batches of images that an encoder maps to features, with a bar."""
    return track(batches, "encoding images", len(batches))
