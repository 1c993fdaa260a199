"""Everything that a training run writes about itself while it runs, behind one object."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_vla.core.success_rate import SuccessRate
from verl_vla.core.tables import Trajectories
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.runs.console import Progress
from verl_vla.runs.episode_recorder import EpisodeRecorder
from verl_vla.runs.html.report import LiveReport
from verl_vla.runs.metrics import MetricsFile


class RunRecorder:
    """Metrics, episodes, the console's lines and the HTML report of one run.

    Args:
        folder: the run's folder.
        header: see `verl_vla.evaluation.conditions.played_in`.
        codec: turns action tokens into the actions that are kept.
        groups_per_step: number of groups per training step whose actions and videos are kept.
        total_steps: number of training steps, for the time that is left.
    """

    def __init__(
        self,
        folder: Path,
        header: Mapping[str, Any],
        codec: ActionCodec,
        *,
        groups_per_step: int,
        total_steps: int,
    ) -> None:
        self._metrics = MetricsFile(folder / "metrics.jsonl")
        self._episodes = EpisodeRecorder(folder, header, codec, groups_per_step)
        self._report = LiveReport(folder)
        self._console = Progress(total_steps)

    def rewind(self, last_step: int) -> None:
        """Remove what was written after a training step; -1 removes everything."""
        self._metrics.rewind(last_step)
        self._episodes.rewind(last_step)

    def add_episodes(self, step: int, played: Trajectories, scores: Mapping[int, float]) -> None:
        """Keep one rollout round; see `EpisodeRecorder.add`."""
        self._episodes.add(step, played, scores)

    def add_step(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a training step and show its line.

        Raises:
            ContractError: a name that is not declared.
            WriteError: the metrics or a video of the step could not be written.
        """
        # they were written while ranks learned
        self._episodes.finish()
        self._metrics.append(step, values)
        self._console.show_step(step, values)

    def add_first_evaluation(self, values: Mapping[str, float]) -> None:
        """Write the metrics of the evaluation before training, as those of step 0."""
        self._metrics.append(0, values)

    def add_to_last_step(self, values: Mapping[str, float]) -> None:
        """Add metrics that were measured later to those of the last training step."""
        self._metrics.add_to_last(values)

    def show_evaluation(self, step: int, total: SuccessRate, label: str) -> None:
        """Show the line of an evaluation; see `Progress.show_evaluation`."""
        self._console.show_evaluation(step, total, label)

    def refresh_report(self) -> None:
        """Write the HTML report again, if the last one is old enough."""
        self._report.refresh()
