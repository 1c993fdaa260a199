"""Text for messages: the nearest known name, differences of mappings, time spans, tables."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def nearest(
    name: str, choices: Sequence[str], others: Sequence[str] = (), *, prefix: str = ""
) -> str:
    """Return the end of a message: which known name ``name`` probably meant, and the ``choices``.

    ``others`` are searched too, but not listed, since there are too many of them. ``prefix`` is
    shown before each name.

    >>> nearest("libero_spacial", ["libero_spatial", "mini"])
    "did you mean 'libero_spatial'? Known: libero_spatial, mini"
    """
    close = difflib.get_close_matches(name, [*choices, *others], n=1)
    known = f"Known: {', '.join(prefix + choice for choice in choices)}"
    return f"did you mean {prefix + close[0]!r}? {known}" if close else known


def shorten(text: str, most: int = 200) -> str:
    """Return the first ``most`` characters of a text, and three dots if it has more.

    >>> shorten("abcdef", 3)
    'abc...'
    """
    return text if len(text) <= most else text[:most] + "..."


def differences(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    may_change: Sequence[str] = (),
    path: str = "",
) -> list[str]:
    """List, as ``key: old -> new``, the differences of two nested mappings that are not allowed.

    ``may_change`` are the dotted names that are allowed to differ.
    """
    found: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        name = f"{path}.{key}" if path else key
        if name in may_change:
            continue
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, may_change, name)
        elif old != new:
            found.append(f"{name}: {old!r} -> {new!r}")
    return found


def format_seconds(seconds: float) -> str:
    """Return a short, readable time span.

    >>> format_seconds(8.4), format_seconds(125), format_seconds(7260)
    ('8s', '2m05s', '2h01m')
    """
    # rounded before it is split, or 59.7 would become 60s
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class TextTable(str):
    """A table as plain text, which keeps its cells so that a terminal can draw them.

    >>> print(TextTable(["task", "rate"], [["lift", "50%"], ["push", "100%"]], notes=["greedy"]))
    task  rate
    lift   50%
    push  100%
    greedy
    """

    head: Sequence[str]
    """Names of the columns; empty for a table without a head."""
    rows: Sequence[Sequence[str]]
    left: Collection[int]
    """Columns whose cells are aligned to the left."""
    notes: Sequence[str]
    """Lines below the table."""

    def __new__(
        cls,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        left: Collection[int] = (0,),
        notes: Sequence[str] = (),
    ) -> TextTable:
        """Align the cells in columns, two spaces apart."""
        lines = [head, *rows] if head else rows
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        # a str takes its text when it is made and never after
        table = super().__new__(cls, "\n".join([*text, *notes]))
        table.head, table.rows, table.left, table.notes = head, rows, left, notes
        return table
