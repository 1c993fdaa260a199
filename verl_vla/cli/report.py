"""Write a self-contained ``report.html`` of a training run as it is now."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from verl_vla.runs.html.report import write_report

logger = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    """Write the report and print its path."""
    logger.info("written to %s", write_report(Path(options.run)))
    return 0
