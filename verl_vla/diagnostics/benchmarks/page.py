"""The tables of docs/benchmarks.md, written from the records in docs/benchmarks."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from typing_extensions import TypedDict

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.core.json_files import read_json, require_regular, with_other_entries
from verl_vla.diagnostics.benchmarks.measuring import Record

DOCS = PROJECT_FOLDER / "docs"
BEGIN = "<!-- written by `python -m verl_vla bench page` from docs/benchmarks/*.json -->"
END = "<!-- end of what bench page writes -->"
NOT_SHOWN = ("bench", "command", "conditions")
"""Entries of a record that are not rows of its table."""


WIDTH, MARGIN = 94, 6
"""Columns of a command, and of what a continued line adds: its indent and the backslash."""


@with_other_entries
class StoredRecord(TypedDict):
    """What a record has besides its numbers."""

    command: str
    conditions: dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of benchmarks.md")


def measure(options: argparse.Namespace) -> Record:
    """Write the tables into the page, without a measurement.

    Raises:
        ConfigError: there is no page, it lacks the two lines that mark the place of the tables, or
            a record is damaged.
    """
    page: Path = options.docs / "benchmarks.md"
    require_regular(page, "name the folder that holds it with --docs")
    records = read_records(options.docs / "benchmarks")
    page.write_text(with_tables(page.read_text(), records))
    return {"bench": "page", "records": len(records), "page": str(page)}


def read_records(folder: Path) -> dict[str, Record]:
    """Read the stored records by the names of their files, in alphabetical order."""
    remedy = "measure it again with --keep"
    return {
        file.stem: read_json(file, cast("Any", StoredRecord), remedy)
        for file in sorted(folder.glob("*.json"))
    }


def with_tables(page: str, records: dict[str, Record]) -> str:
    """Replace the text between the lines `BEGIN` and `END`."""
    if BEGIN not in page or END not in page:
        raise ConfigError(f"benchmarks.md lacks the lines {BEGIN!r} and {END!r}; put them back")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    tables = "\n".join(table(name, record) for name, record in records.items())
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def table(name: str, record: Record) -> str:
    """Format one record in Markdown: its command, its numbers, its conditions."""
    cells = {key: _cell(value) for key, value in record.items() if key not in NOT_SHOWN}
    rows = {key: f"| {key} | {cell} |" for key, cell in cells.items()}
    # a row of a table cannot be broken
    long = [key for key, row in rows.items() if len(row) > WIDTH + MARGIN]
    below = [
        line
        for key in long
        for line in ("", f"{key}:", "", "```text", *_wrap(cells[key], WIDTH + MARGIN), "```")
    ]
    short = [row for key, row in rows.items() if key not in long]
    conditions = ", ".join(f"{key} {value}" for key, value in record["conditions"].items())
    command = " \\\n    ".join(_wrap(record["command"], WIDTH))
    lines = [f"### {name}", "", "```bash", command, "```", ""]
    told = "\n".join(_wrap(f"{conditions}.", WIDTH + MARGIN))
    return "\n".join([*lines, "| what | value |", "|---|---|", *short, *below, "", told, ""])


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _list(value)
    return str(value)


def _list(values: Sequence[Any]) -> str:
    """Format a list; three numbers are a median and its range."""
    numbers = all(isinstance(value, int | float) for value in values)
    if numbers and len(values) == len(("median", "least", "largest")):
        return f"{values[0]} ({values[1]} to {values[2]})"
    return ", ".join(map(str, values)) or "none"


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
