"""Measure the speed of a part, with its conditions.

Prints a table, then one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from verl_vla.cli.options import check_words
from verl_vla.core.files import require_place
from verl_vla.core.text import TextTable
from verl_vla.runs.terminal import show_table


def run(options: argparse.Namespace) -> int:
    """Measure, then print the table and the JSON object."""
    benchmark = importlib.import_module(f"verl_vla.diagnostics.benchmarks.{options.part}")
    parser = argparse.ArgumentParser(
        prog=f"verl-vla bench {options.part}", description=benchmark.__doc__
    )
    parser.add_argument("--keep", type=Path, help="also write the record to this file")
    benchmark.add_options(parser)
    chosen = parser.parse_args(options.rest)
    check_words(chosen)
    if chosen.keep is not None:
        # a measurement takes minutes, and its result must have a place
        require_place(chosen.keep, "--keep")
    chosen.arguments = [options.part, *options.rest]
    record = benchmark.measure(chosen)
    show_table(
        TextTable([], [[name, _plain(value)] for name, value in record.items()], left=(0, 1))
    )
    line = json.dumps(record)
    if chosen.keep is not None:
        chosen.keep.write_text(json.dumps(record, indent=1) + "\n")
    # last, so that a script finds it with tail -n 1
    print(line)
    return 0


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)
