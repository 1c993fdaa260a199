"""Tables and bars drawn by rich."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from verl_vla.core.text import TextTable

STYLES = {"ok": "green", "FAULT": "bold red"}
"""Styles of words that fill a cell."""
REFRESHES_PER_SECOND = 4
"""Fewer than rich's 10, since simulators want the cores."""

BAR_WIDTH = 24
"""Columns of a bar, which leave room for the note in a terminal of 80."""

UNLIMITED = 10_000
"""Columns of a terminal in which every table fits."""


class Screen:
    """A terminal: lines and tables above, and the bars of what is under way below them."""

    def __init__(self, stream: TextIO) -> None:
        # forced: `can_draw` has decided, and rich would ask the environment again
        self._console = Console(file=stream, force_terminal=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(BAR_WIDTH),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
            refresh_per_second=REFRESHES_PER_SECOND,
            redirect_stdout=False,  # during training, stdout is verl.log
            redirect_stderr=False,
        )

    def write(self, line: str) -> None:
        """Write a line as it is."""
        # Text, or rich reads [x] as markup; soft_wrap, or it breaks lines at its width
        self._console.print(Text(line), soft_wrap=True)

    def draw(self, table: TextTable) -> None:
        """Draw a table, then write its notes; numbers that a box would cut are written as lines."""
        drawn = Table(box=SIMPLE_HEAD, show_header=bool(table.head))
        for index, name in enumerate(table.head or [""] * len(table.rows[0])):
            drawn.add_column(name.strip(), justify="left" if index in table.left else "right")
        for row in table.rows:
            drawn.add_row(*map(_cell, row))
        # measured at the terminal's width, every table would seem to fit
        without_limit = self._console.options.update_width(UNLIMITED)
        needed = self._console.measure(drawn, options=without_limit).maximum
        if table.head and needed > self._console.width:
            self.write(table)
            return
        self._console.print(drawn)
        for note in table.notes:
            self.write(note)

    @contextmanager
    def bar(self, what: str, total: int) -> Generator[Callable[[str], None]]:
        """Show a bar; yield a function that moves it by one and puts a note behind it."""
        task = self._bars.add_task(what, total=total, note="")
        self._bars.start()
        try:
            yield lambda note: self._bars.update(task, advance=1, note=note)
        finally:
            self._bars.remove_task(task)
            # a bar may stand inside another, which goes on
            if not self._bars.tasks:
                self._bars.stop()

    def end_bars(self) -> None:
        """Remove all bars."""
        self._bars.stop()


def _cell(text: str) -> Text:
    """Undo the alignment and the line breaks of plain text."""
    content = " ".join(line.strip() for line in text.splitlines())
    return Text(content, style=STYLES[content] if content in STYLES else "")
