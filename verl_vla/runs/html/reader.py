"""A run's folder as it is now, be the run under way, ended, or just begun."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from verl_vla.core.episode import Outcome
from verl_vla.core.errors import ConfigError
from verl_vla.runs.episode_log import EPISODE_LOG_FILE, read_episodes
from verl_vla.runs.episode_recorder import video_path
from verl_vla.runs.metrics import read_metrics
from verl_vla.runs.run_dir import evaluated_steps, evaluation_file, solved_after

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """What a run's files say."""

    folder: Path
    recipe: Mapping[str, Any]
    lines: Sequence[Mapping[str, float]]
    """Of ``metrics.jsonl``."""
    episodes: Sequence[Line]
    """Of the episode log: every episode that was played in training."""
    evaluations: Mapping[int, Mapping[str, Any]]
    """Held-out evaluations by training step, in rising order."""
    solved_after: int | None
    """The training step after which nothing failed any more, of a run that ended so."""
    quiet_s: float
    """Seconds since anything was written."""

    @property
    def trained(self) -> list[Mapping[str, float]]:
        """The lines of training steps."""
        return [line for line in self.lines if "env/success_rate" in line]

    @property
    def judged(self) -> list[Mapping[str, float]]:
        """The lines with a held-out evaluation."""
        return [line for line in self.lines if "val/success_rate" in line]

    @property
    def total_steps(self) -> int:
        """Training steps that the recipe asks for."""
        return self.recipe["trainer"]["total_training_steps"]

    @property
    def last_step(self) -> int:
        """The training step that ended last; 0 before the first."""
        return int(self.trained[-1]["step"]) if self.trained else 0

    @property
    def has_ended(self) -> bool:
        """Whether all steps are done, or nothing was left to learn."""
        return self.last_step >= self.total_steps or self.last_step == self.solved_after

    @property
    def task_names(self) -> dict[int, str]:
        """Names of the tasks that were evaluated; played ones that never were have their number."""
        names = {episode["task"]: f"task {episode['task']}" for episode in self.episodes}
        for record in self.evaluations.values():
            ids = list(dict.fromkeys(e["task"] for e in record["episodes"]))
            names |= dict(zip(ids, record["tasks"], strict=True))
        return dict(sorted(names.items()))

    @property
    def groups(self) -> dict[int, list[list[Line]]]:
        """Groups of episodes by training step."""
        found: dict[int, dict[int, list[Line]]] = {}
        for episode in self.episodes:
            found.setdefault(episode["step"], {}).setdefault(episode["group"], []).append(episode)
        return {step: list(groups.values()) for step, groups in found.items()}

    @property
    def recorded_groups(self) -> list[list[Line]]:
        """Groups of which videos were kept, the newest first."""
        recorded = [
            group
            for groups in self.groups.values()
            for group in groups
            if any(video_path(self.folder, e["episode"]).exists() for e in group)
        ]
        return recorded[::-1]


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, begun or ended."""
    return (folder / RECIPE_FILE).is_file()


def read_run(folder: Path) -> RunView:
    """Read everything; a run that is going may be read at any moment.

    Raises:
        ConfigError: the folder is not that of a run.
    """
    if not is_run(folder):
        raise ConfigError(f"{folder} holds no {RECIPE_FILE}; name the folder of a training run")
    recipe = yaml.safe_load((folder / RECIPE_FILE).read_text())
    metrics = folder / METRICS_FILE
    written = [folder / RECIPE_FILE, metrics, folder / EPISODE_LOG_FILE]
    return RunView(
        folder=folder,
        recipe=recipe,
        lines=read_metrics(metrics) if metrics.exists() else [],
        episodes=read_episodes(folder),
        evaluations={
            step: json.loads(evaluation_file(folder, step).read_text())
            for step in evaluated_steps(folder)
        },
        solved_after=solved_after(folder),
        quiet_s=time.time() - max(file.stat().st_mtime for file in written if file.exists()),
    )


def find_runs(root: Path) -> list[Path]:
    """Folders of runs under ``root``, at any depth, ``root`` itself included; sorted.

    Links are not followed: a link could lead out of ``root``.
    """
    return sorted(file.parent for file in root.rglob(RECIPE_FILE) if is_run(file.parent))


def kind_of(group: Sequence[Line]) -> str:
    """What a group is worth to dynamic sampling: ``mixed``, or why it is not."""
    outcomes = {e["outcome"] for e in group} - {Outcome.CRASH}
    if not outcomes:
        return "all crashed"
    if len(outcomes) > 1:
        return "mixed"
    return "all solved" if Outcome.SUCCESS in outcomes else "all failed"
