"""Reading of a run's folder, whether the run is active, has ended, or has just begun."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from verl_vla.core.episode import Outcome
from verl_vla.core.errors import ConfigError
from verl_vla.core.json_files import require_declared, with_other_entries
from verl_vla.runs.episode_log import EPISODE_LOG_FILE, TrainingLine, read_episodes
from verl_vla.runs.episode_recorder import video_path
from verl_vla.runs.metrics import read_metrics
from verl_vla.runs.run_dir import (
    RECIPE_FILE,
    evaluated_steps,
    evaluation_file,
    read_evaluation_file,
    read_recipe,
    solved_after,
)

METRICS_FILE = "metrics.jsonl"

Line = Mapping[str, Any]


@with_other_entries
class _Environment(TypedDict):
    suite: str


@with_other_entries
class _Policy(TypedDict):
    path: str


@with_other_entries
class _Sampling(TypedDict):
    groups_per_step: int
    group_size: int


@with_other_entries
class _Trainer(TypedDict):
    total_training_steps: int


@with_other_entries
class RunRecipe(TypedDict):
    """The part of a run's recipe that its page shows."""

    seed: int
    reward: str
    environment: _Environment
    policy: _Policy
    sampling: _Sampling
    trainer: _Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """Contents of a run's files."""

    folder: Path
    recipe: Mapping[str, Any]
    lines: Sequence[Mapping[str, float]]
    """Lines of ``metrics.jsonl``."""
    episodes: Sequence[Line]
    """Lines of the episode log: every training episode."""
    evaluations: Mapping[int, Mapping[str, Any]]
    """Held-out evaluations by training step, in rising order."""
    solved_after: int | None
    """Training step after which a run ended early because no episode failed; None otherwise."""
    quiet_s: float
    """Seconds since a file of the run was written."""

    @property
    def trained(self) -> list[Mapping[str, float]]:
        """Lines of training steps."""
        return [line for line in self.lines if "env/success_rate" in line]

    @property
    def judged(self) -> list[Mapping[str, float]]:
        """Lines with a held-out evaluation."""
        return [line for line in self.lines if "val/success_rate" in line]

    @property
    def total_steps(self) -> int:
        """Number of training steps in the recipe."""
        return self.recipe["trainer"]["total_training_steps"]

    @property
    def last_step(self) -> int:
        """Training step that ended last; 0 before the first."""
        return int(self.trained[-1]["step"]) if self.trained else 0

    @property
    def has_ended(self) -> bool:
        """True if all steps are done, or the run ended early because all was solved."""
        return self.last_step >= self.total_steps or self.last_step == self.solved_after

    @property
    def task_names(self) -> dict[int, str]:
        """Task names by id; a task that was trained on but never evaluated has its number."""
        names = {episode["task"]: f"task {episode['task']}" for episode in self.episodes}
        for record in self.evaluations.values():
            ids = list(dict.fromkeys(e["task"] for e in record["episodes"]))
            # both are in the order of the evaluated tasks
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
        """Groups with at least one video, the newest first."""
        recorded = [
            group
            for groups in self.groups.values()
            for group in groups
            if any(video_path(self.folder, e["episode"]).exists() for e in group)
        ]
        return recorded[::-1]


def is_run(folder: Path) -> bool:
    """Check whether a folder is that of a run, begun or ended."""
    return (folder / RECIPE_FILE).is_file()


def read_run(folder: Path) -> RunView:
    """Read all files of a run; an active run may be read at any moment.

    Raises:
        ConfigError: the folder is not that of a run.
    """
    if not is_run(folder):
        raise ConfigError(f"{folder} holds no {RECIPE_FILE}; name the folder of a training run")
    recipe = _read_recipe(folder)
    metrics = folder / METRICS_FILE
    written = [folder / RECIPE_FILE, metrics, folder / EPISODE_LOG_FILE]
    return RunView(
        folder=folder,
        recipe=recipe,
        lines=read_metrics(metrics) if metrics.exists() else [],
        episodes=read_episodes(folder, TrainingLine),
        evaluations={
            step: read_evaluation_file(evaluation_file(folder, step))
            for step in evaluated_steps(folder)
        },
        solved_after=solved_after(folder),
        quiet_s=time.time() - max(file.stat().st_mtime for file in written if file.exists()),
    )


def _read_recipe(folder: Path) -> dict[str, Any]:
    content = read_recipe(folder)
    if "demos" in content:
        raise ConfigError(
            f"{folder} is a run of fine-tuning, which has no episodes; its losses are in "
            f"{METRICS_FILE} and in the figure beside it"
        )
    return require_declared(content, RunRecipe, folder / RECIPE_FILE, "restore the file")


def find_runs(root: Path) -> list[Path]:
    """Return the folders of runs under ``root``, at any depth and with ``root`` itself, sorted.

    Links are not followed: a link could lead out of ``root``.
    """
    return sorted(file.parent for file in root.rglob(RECIPE_FILE) if is_run(file.parent))


def kind_of(group: Sequence[Line]) -> str:
    """Classify a group for dynamic sampling: ``mixed``, or the reason why it is not."""
    # crashed episodes are never trained on, so they do not make a group mixed
    outcomes = {e["outcome"] for e in group} - {Outcome.CRASH}
    if not outcomes:
        return "all crashed"
    if len(outcomes) > 1:
        return "mixed"
    return "all solved" if Outcome.SUCCESS in outcomes else "all failed"
