"""``train recipe=NAME key=value ...``: train a policy with GRPO under veRL."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import warnings
from typing import Literal

from verl_vla.config.compose import load_recipe
from verl_vla.evaluation.conditions import sampling_of
from verl_vla.runs.html.report import write_report
from verl_vla.runs.metrics import read_metrics
from verl_vla.runs.plots import draw_curve
from verl_vla.trainer.grpo.run import Run, open_run
from verl_vla.trainer.sft.run import SFTRun

logger = logging.getLogger(__name__)

TRANSFER_THREADS = 8
"""TransferQueue's default number of threads (``client.py``, ``TQ_NUM_THREADS``), which it reads
when it is imported."""

NOT_OURS = ".* engine is not available"
"""Pattern of veRL's warnings about back ends that are not installed and not used."""


def run(options: argparse.Namespace) -> int:
    """Train; the same command resumes."""
    recipe = load_recipe(options.overrides)
    with open_run(recipe) as opened:
        logger.info("run folder %s", opened.folder)
        improve(opened)
    return 0


def improve(opened: Run) -> None:
    """Train to the last step, draw ``curve.png`` and write ``report.html``."""
    start_training(opened)
    title = f"GRPO on {opened.recipe.environment.suite}, seed {opened.recipe.seed}"
    lines = read_metrics(opened.folder / "metrics.jsonl")
    sampling = sampling_of(opened.recipe.evaluation.temperature)
    draw_curve(opened.folder / "curve.png", lines, title, sampling=sampling)
    # once more at the end: the last one may be minutes old
    write_report(opened.folder)


def start_training(opened: Run | SFTRun, kind: Literal["grpo", "sft"] = "grpo") -> None:
    """Pass a checked run to veRL, by the launcher of its kind in `verl_vla.trainer`.

    veRL is imported only here: an error in a recipe is then reported in seconds, and the simulators
    start while the import runs.
    """
    # no more threads than half of the cores, or TransferQueue warns at every transfer
    threads = max(1, min(TRANSFER_THREADS, (os.cpu_count() or 1) // 2))
    os.environ.setdefault("TQ_NUM_THREADS", str(threads))
    warnings.filterwarnings("ignore", message=NOT_OURS, category=UserWarning)
    # last, since the import reads what the lines above have set
    importlib.import_module(f"verl_vla.trainer.{kind}.launch").train(opened)
