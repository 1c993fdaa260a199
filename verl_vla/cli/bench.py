"""``bench PART``: how fast a part is, beside its peers' way and with its conditions.

Prints a table, then one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PARTS = {
    "images": "prepare images for the policy, one thread",
    "env": "one simulator against the stock environment: a chunk, and a reset",
    "pool": "more simulator processes, and where they stop being faster",
    "rollout": "playing with and without the two halves that take turns",
    "update": "forward and backward passes over rows, and their memory",
    "step": "whole training steps against those of another commit",
    "gpu": "a 7.5 B policy with random weights on one device; needs neither hub nor Ray",
    "page": "write the tables of docs/benchmarks.md from the records in docs/benchmarks",
}
"""Part to its one-line help; each is a module of `verl_vla.diagnostics.benchmarks`."""


def run(arguments: Sequence[str]) -> int:
    """Measure, then print the table and the JSON object."""
    options = _parser(arguments[:1]).parse_args(arguments)
    options.arguments = list(arguments)
    record = importlib.import_module(f"verl_vla.diagnostics.benchmarks.{options.part}").measure(
        options
    )
    width = max(map(len, record))
    for name, value in record.items():
        print(f"{name:<{width}}  {_plain(value)}")
    line = json.dumps(record)
    if options.keep is not None:
        options.keep.write_text(json.dumps(record, indent=1) + "\n")
    print(line)
    return 0


def _parser(chosen: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m verl_vla bench", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, text in PARTS.items():
        part = parts.add_parser(name, help=text)
        part.add_argument("--keep", type=Path, help="also write the record to this file")
        if name in chosen:
            importlib.import_module(f"verl_vla.diagnostics.benchmarks.{name}").add_options(part)
    return parser


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)
