"""Fine-tune a policy on demonstrations: ``sft recipe=NAME key=value ...``."""

from __future__ import annotations

import argparse
import logging

from verl_vla.cli.train import start_training
from verl_vla.config.sft import load_sft_recipe
from verl_vla.runs.html.report import write_report
from verl_vla.trainer.sft.run import open_sft_run

logger = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    """Run a recipe; the same command resumes it."""
    with open_sft_run(load_sft_recipe(options.overrides)) as opened:
        logger.info("run folder %s", opened.folder)
        start_training(opened, kind="sft")
        write_report(opened.folder)
    return 0
