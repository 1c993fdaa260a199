"""Reading of a run's folder, whether the run is active, has ended, or has just begun."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import TypedDict

from verl_vla.core.episode import Outcome
from verl_vla.core.errors import ConfigError
from verl_vla.core.json_files import require_declared, with_other_entries
from verl_vla.runs.episode_log import EPISODE_LOG_FILE, TrainingLine, read_episodes
from verl_vla.runs.episode_recorder import video_path
from verl_vla.runs.metrics import read_metrics
from verl_vla.runs.run_dir import (
    RECIPE_FILE,
    SOLVED_FILE,
    evaluated_steps,
    evaluation_file,
    read_evaluation_file,
    read_recipe,
    solved_after,
)

METRICS_FILE = "metrics.jsonl"

Line = Mapping[str, Any]


BRIEF_BYTES = 1 << 17
"""Bytes of ``metrics.jsonl`` that a row of the overview is made from."""


@with_other_entries
class _Suite(TypedDict):
    suite: str


@with_other_entries
class _Path(TypedDict):
    path: str | None


@with_other_entries
class _Length(TypedDict):
    total_training_steps: int


@with_other_entries
class _Groups(TypedDict):
    groups_per_step: int
    group_size: int


@with_other_entries
class _Folder(TypedDict):
    folder: str


@with_other_entries
class _Rate(TypedDict):
    lr: float
    batch_size: int


class _AnyRecipe(TypedDict):
    """The part of every run's recipe that its page shows."""

    seed: int
    environment: _Suite
    policy: _Path
    trainer: _Length


@with_other_entries
class RunRecipe(_AnyRecipe):
    """The part of a GRPO run's recipe that its page shows."""

    reward: str
    sampling: _Groups


@with_other_entries
class SFTRunRecipe(_AnyRecipe):
    """The part of a fine-tuning run's recipe that its page shows."""

    demos: _Folder
    optimizer: _Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """Contents of a run's files, of GRPO or of fine-tuning."""

    STEP_METRIC: ClassVar[str]
    """Metric that every training step has, and no other line."""

    folder: Path
    recipe: Mapping[str, Any]
    lines: Sequence[Mapping[str, float]]
    """Lines of ``metrics.jsonl``."""
    evaluations: Mapping[int, Mapping[str, Any]]
    """Held-out evaluations by training step, in rising order."""
    solved_after: int | None = None
    """Training step after which a run ended early because no episode failed; None otherwise."""
    written_at: float
    """When a file of the run was written last, seconds since 1970."""
    cut: Sequence[str] = ()
    """Logs of which only the newest part was read."""

    @property
    def quiet_s(self) -> float:
        """Seconds since a file of the run was written."""
        return time.time() - self.written_at

    @property
    def trained(self) -> list[Mapping[str, float]]:
        """Lines of training steps."""
        return [line for line in self.lines if self.STEP_METRIC in line]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTView(RunView):
    """Contents of a fine-tuning run's files."""

    STEP_METRIC: ClassVar[str] = "train/loss"


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOView(RunView):
    """Contents of a GRPO run's files."""

    STEP_METRIC: ClassVar[str] = "env/success_rate"

    episodes: Sequence[Line]
    """Lines of the episode log: every training episode."""

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


def run_files(folder: Path) -> list[Path]:
    """Return the files of a run that are there and that `read_run` may read."""
    names = (RECIPE_FILE, METRICS_FILE, EPISODE_LOG_FILE, SOLVED_FILE)
    of_steps = [evaluation_file(folder, step) for step in evaluated_steps(folder)]
    # a link to nothing counts, since it is to be named
    return [f for f in [*(folder / n for n in names), *of_steps] if f.exists() or f.is_symlink()]


def read_run(
    folder: Path, *, log_bytes: int | None = None, is_brief: bool = False
) -> GRPOView | SFTView:
    """Read the files of a run; an active run may be read at any moment.

    Args:
        folder: folder of the run.
        log_bytes: bytes of each log that are read at most, the newest; None reads all.
        is_brief: whether to read only what the overview shows: the newest steps and the last
            evaluation, and no episodes.

    Raises:
        ConfigError: the folder is not that of a run, or a file is damaged.
    """
    if not is_run(folder):
        raise ConfigError(f"{folder} holds no {RECIPE_FILE}; name the folder of a training run")
    recipe, steps = read_recipe(folder), evaluated_steps(folder)
    metrics, log = folder / METRICS_FILE, folder / EPISODE_LOG_FILE
    log_bytes = BRIEF_BYTES if is_brief else log_bytes
    common: dict[str, Any] = {
        "folder": folder,
        "lines": read_metrics(metrics, log_bytes) if metrics.exists() else [],
        "evaluations": {
            step: read_evaluation_file(evaluation_file(folder, step))
            for step in (steps[-1:] if is_brief else steps)
        },
        "written_at": _written_at(folder),
        "cut": [] if log_bytes is None else _larger((metrics, log), log_bytes),
    }
    if "demos" in recipe:
        return SFTView(recipe=_declared(folder, recipe, SFTRunRecipe), **common)
    return GRPOView(
        recipe=_declared(folder, recipe, RunRecipe),
        episodes=[] if is_brief else read_episodes(folder, TrainingLine, log_bytes),
        solved_after=solved_after(folder),
        **common,
    )


def _larger(files: Sequence[Path], num_bytes: int) -> list[str]:
    return [file.name for file in files if file.exists() and file.stat().st_size > num_bytes]


def _declared(folder: Path, recipe: Mapping[str, Any], schema: Any) -> Mapping[str, Any]:
    return require_declared(recipe, schema, folder / RECIPE_FILE, "restore the file")


def _written_at(folder: Path) -> float:
    written = (RECIPE_FILE, METRICS_FILE, EPISODE_LOG_FILE)
    return max((folder / n).stat().st_mtime for n in written if (folder / n).exists())


def find_runs(root: Path) -> list[Path]:
    """Return the folders of runs under ``root``, at any depth and with ``root`` itself, sorted.

    Links are not followed: a link could lead out of ``root``.
    """
    return sorted(file.parent for file in root.rglob(RECIPE_FILE))


def kind_of(group: Sequence[Line]) -> str:
    """Classify a group for dynamic sampling: ``mixed``, or the reason why it is not."""
    # crashed episodes are never trained on, so they do not make a group mixed
    outcomes = {e["outcome"] for e in group} - {Outcome.CRASH}
    if not outcomes:
        return "all crashed"
    if len(outcomes) > 1:
        return "mixed"
    return "all solved" if Outcome.SUCCESS in outcomes else "all failed"
