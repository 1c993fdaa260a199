"""Compare two evaluated policies on the starts of both.

A and B are folders of ``eval``, or files in a training run's ``evaluations/``.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from verl_vla.core.files import atomic_write, require_place, writing_to
from verl_vla.evaluation.compare import as_json, pair, read_evaluation, table, told_differences

logger = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    """Print the table, and the differences in the reported conditions."""
    out = None if options.out is None else Path(options.out)
    if out is not None:
        require_place(out, "--out")
    first, second = (read_evaluation(Path(path)) for path in (options.first, options.second))
    # refuses evaluations of other starts or conditions, before anything is printed
    pairs = pair(first, second)
    logger.info("A  %s\nB  %s\n", options.first, options.second)
    logger.info("%s", table(pairs))
    logger.info(
        "\n%s, %s states, %s; p: exact McNemar test on the starts where A and B disagree",
        first["suite"],
        first["states"],
        first["sampling"],
    )
    for difference in told_differences(first, second):
        logger.info("differs: %s", difference)
    if out is not None:
        with writing_to(out.parent):
            atomic_write(out, json.dumps(as_json(pairs), indent=1))
    return 0
