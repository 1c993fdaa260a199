"""Progress on the console during a run: lines, and bars where `terminal` draws."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from verl_vla.core.episode import Outcome
from verl_vla.core.success_rate import SuccessRate
from verl_vla.core.tables import Trajectories
from verl_vla.core.text import format_seconds
from verl_vla.runs.terminal import Advance, bar

logger = logging.getLogger(__name__)

SMOOTHING = 0.7
"""Weight of the past in the running mean of seconds per step, which gives the time left."""


EVALUATION_LINES_EVERY_S = 10.0
"""Least number of seconds between two lines of an evaluation."""


class Progress:
    """Progress of a training run: one line per training step and per evaluation."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._seconds_per_step: float | None = None

    def show_step(self, step: int, values: Mapping[str, float]) -> None:
        """Log the most informative numbers of a training step."""
        logger.info(
            "step %*d/%d  success %5.1f%% of %d  groups %d/%d in %d round%s  "
            "entropy %.2f  clip %.1f/%.1f%%  ratio %.4f  %.1f s  left %s",
            len(str(self._total_steps)),
            step,
            self._total_steps,
            100 * values["env/success_rate"],
            values["env/episodes"],
            values["sampling/groups_kept"],
            values["sampling/groups_played"],
            values["sampling/rounds"],
            "" if values["sampling/rounds"] == 1 else "s",
            values["actor/entropy"],
            100 * values["actor/pg_clipfrac_low"],
            100 * values["actor/pg_clipfrac_high"],
            values["actor/ratio_first"],
            values["timing_s/step"],
            format_seconds(self._time_left_s(step, values["timing_s/step"])),
        )

    def show_evaluation(self, step: int, rate: SuccessRate, label: str = "") -> None:
        """Log an evaluation with its interval and its counts.

        Args:
            step: training step after which it was made.
            rate: what was counted.
            label: what tells it from the other evaluation after the same step.
        """
        low, high = rate.ci95
        logger.info(
            "held-out after step %d%s: %.1f%% of %d episodes (95%% interval %.1f-%.1f%%)%s",
            step,
            label,
            100 * rate.rate,
            rate.episodes,
            100 * low,
            100 * high,
            f", {rate.crashes} crashed" if rate.crashes else "",
        )

    def _time_left_s(self, step: int, seconds: float) -> float:
        # the first step has no past, and stands for it
        past = seconds if self._seconds_per_step is None else self._seconds_per_step
        self._seconds_per_step = SMOOTHING * past + (1 - SMOOTHING) * seconds
        return self._seconds_per_step * (self._total_steps - step)


@contextmanager
def episodes_bar(what: str, total: int) -> Generator[Callable[[Trajectories], None]]:
    """Show a bar of episodes; yield the ``ended`` of `verl_vla.rl.rollout.rollout` that moves it.

    Where no bar is drawn, ``ended`` does nothing.
    """
    solved = 0
    with bar(what, total) as advance:

        def count(ended: Trajectories) -> None:
            nonlocal solved
            solved += int(ended.episodes.success.sum())
            if advance is not None:
                advance(f"{solved} solved")

        yield count


class EvaluationProgress:
    """Progress of one evaluation: a line every `EVALUATION_LINES_EVERY_S`, or a bar.

    Args:
        total: number of episodes of the evaluation.
        found: log lines of the episodes that an earlier process completed.
        advance: moves the bar, if there is one.
    """

    def __init__(
        self, total: int, found: Sequence[Mapping[str, Any]], advance: Advance | None = None
    ) -> None:
        self._total = total
        self._advance = advance
        self._outcomes = [line["outcome"] for line in found]
        # episodes of an earlier process cost this one no time, so they are not in its speed
        self._found = self._played
        self._began = self._shown = time.perf_counter()

    def show(self, line: Mapping[str, Any]) -> None:
        """Add an episode that ended; log a line when it is due, and after the last episode."""
        self._outcomes.append(line["outcome"])
        now, played = time.perf_counter(), self._played
        rate = 100 * self._outcomes.count(Outcome.SUCCESS) / max(1, played)
        lost = self._outcomes.count(Outcome.CRASH)
        if self._advance is not None:
            # a lost episode is played again, and only then moves the bar
            if line["outcome"] != Outcome.CRASH:
                self._advance(f"success {rate:.1f}%  simulators lost {lost}")
            return
        # the last line is always shown, however soon after the one before
        if now - self._shown < EVALUATION_LINES_EVERY_S and played < self._total:
            return
        self._shown = now
        spent, fresh = now - self._began, max(1, played - self._found)
        logger.info(
            "%*d/%d played  success %5.1f%%  simulators lost %d  %s  left %s",
            len(str(self._total)),
            played,
            self._total,
            rate,
            lost,
            format_seconds(spent),
            format_seconds(spent / fresh * (self._total - played)),
        )

    @property
    def _played(self) -> int:
        return len(self._outcomes) - self._outcomes.count(Outcome.CRASH)
