"""Output of a fine-tuning run: lines on the console, a curve, evaluations as JSON."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_vla.core.text import format_seconds
from verl_vla.evaluation.evaluate import Evaluation
from verl_vla.runs.console import Progress
from verl_vla.runs.plots import draw_sft_curve
from verl_vla.runs.run_dir import keep_evaluation

logger = logging.getLogger(__name__)


class SFTConsole:
    """Follows one process's part of a run."""

    def __init__(self, folder: Path, total_steps: int, show_every: int) -> None:
        self._folder = folder
        self._total_steps = total_steps
        self._show_every = show_every
        self._progress = Progress(total_steps)
        self._first_shown: tuple[int, float] | None = None

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Report a step now and then, the first, the last and every tested one always."""
        # at every step, also one that is not shown: the first call notes when counting began
        left_s = self._time_left_s(step, values["timing_s/step"])
        is_shown = "val/accuracy" in values or step in (1, self._total_steps)
        if step % self._show_every and not is_shown:
            return
        held_out = (
            f"  held out {100 * values['val/accuracy']:.1f}%" if "val/accuracy" in values else ""
        )
        logger.info(
            "step %*d/%d  loss %.3f  tokens right %4.1f%%%s  rate %.1e  %.2f s  left %s",
            len(str(self._total_steps)),
            step,
            self._total_steps,
            values["train/loss"],
            100 * values["train/accuracy"],
            held_out,
            values["train/lr"],
            values["timing_s/step"],
            format_seconds(left_s),
        )

    def keep_evaluation(self, step: int, result: Evaluation, record: Mapping[str, Any]) -> None:
        """Report an evaluation and write it down, with the outcome of each of its episodes."""
        self._progress.show_evaluation(step, result.total)
        keep_evaluation(self._folder, step, record)

    def draw(self, lines: Sequence[Mapping[str, float]]) -> None:
        """Draw ``curve.png`` of everything measured."""
        draw_sft_curve(self._folder / "curve.png", lines, self._folder.name)

    def _time_left_s(self, step: int, seconds: float) -> float:
        """By the mean of this process's steps so far, with all that lay between them.

        Its first step has waited for everything to start and counts for its own ``seconds`` alone.
        """
        now = time.perf_counter()
        if self._first_shown is None:
            self._first_shown = (step, now)
        first, ended = self._first_shown
        per_step = seconds if step == first else (now - ended) / (step - first)
        return per_step * (self._total_steps - step)
