"""``compare A B``: which of two evaluated policies is better, on the starts that both played.

A and B are folders of ``eval``, or files of a training run's ``evaluations/``.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from verl_vla.evaluation.compare import as_json, pair, read_evaluation, table, told_differences

logger = logging.getLogger(__name__)


def run(arguments: Sequence[str]) -> int:
    """Print the table, and what differs between the two beside the policies."""
    options = _parser().parse_args(arguments)
    first, second = (read_evaluation(Path(path)) for path in (options.first, options.second))
    pairs = pair(first, second)
    logger.info("A  %s\nB  %s\n\n%s", options.first, options.second, table(pairs))
    logger.info(
        "\n%s, %s states, %s; p: exact McNemar test on the starts where A and B disagree",
        first["suite"],
        first["states"],
        first["sampling"],
    )
    for difference in told_differences(first, second):
        logger.info("differs: %s", difference)
    if options.out is not None:
        Path(options.out).write_text(json.dumps(as_json(pairs), indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m verl_vla compare", description=__doc__)
    parser.add_argument("first", metavar="A")
    parser.add_argument("second", metavar="B")
    parser.add_argument("--out", help="file to write the same numbers to, as JSON")
    return parser
