"""``report RUN``: write ``report.html`` of a training run as it is now; it stands alone."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from verl_vla.runs.html.report import write_report

logger = logging.getLogger(__name__)


def run(arguments: Sequence[str]) -> int:
    """Write the report and say where it is."""
    parser = argparse.ArgumentParser(prog="python -m verl_vla report", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a training run, going or ended")
    options = parser.parse_args(arguments)
    logger.info("written to %s", write_report(Path(options.run)))
    return 0
