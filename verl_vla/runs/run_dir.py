"""The folder of a run: its recipe, and the records of its evaluations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeInt
from typing_extensions import TypedDict

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import (
    LOCK,
    atomic_write,
    folder_lock,
    partial_file,
    recording,
    writing_to,
)
from verl_vla.core.json_files import (
    Entries,
    read_json,
    require_declared,
    with_other_entries,
)
from verl_vla.core.success_rate import count_entries
from verl_vla.core.text import differences
from verl_vla.core.yaml_files import read_yaml

RECIPE_FILE = "recipe.yaml"
SOLVED_FILE = "solved.json"
EVALUATE_AGAIN = "evaluate again, or restore the file"
"""Remedy for the record of an evaluation that is damaged."""


@with_other_entries
class RateEntry(TypedDict):
    """A success rate in an evaluation's record; see `SuccessRate.as_json`."""

    rate: float | None
    successes: NonNegativeInt
    episodes: NonNegativeInt
    crashes: NonNegativeInt
    ci95: Annotated[list[float], Field(min_length=2, max_length=2)]


@with_other_entries
class PlayedEpisode(TypedDict):
    """An episode in an evaluation's record."""

    episode: NonNegativeInt
    task: NonNegativeInt
    init_state: NonNegativeInt
    outcome: Literal[0, 1, 2]
    """An `Outcome`."""
    steps: NonNegativeInt


@with_other_entries
class Evaluation(TypedDict):
    """Record of an evaluation; its conditions stand beside these entries."""

    total: RateEntry
    tasks: dict[str, RateEntry]
    episodes: list[PlayedEpisode]


class Solved(Entries):
    """Content of `SOLVED_FILE`."""

    last_step: int


def evaluation_record(
    entries: Sequence[Mapping[str, Any]],
    conditions: Mapping[str, Any],
    task_names: Mapping[int, str],
) -> dict[str, Any]:
    """Return an evaluation as JSON, with the conditions on which its comparability depends.

    Args:
        entries: one per episode, as `verl_vla.core.success_rate.episode_entries` makes them.
        conditions: see `verl_vla.evaluation.conditions`.
        task_names: names of the evaluated tasks, by task id.
    """
    played = ("episode", "task", "init_state", "outcome", "steps")
    return dict(conditions) | {
        "total": count_entries(entries, task_names).as_json(),
        "tasks": {
            name: count_entries(entries, [task]).as_json() for task, name in task_names.items()
        },
        "episodes": [{name: entry[name] for name in played} for entry in entries],
        "crashes": {
            str(entry["episode"]): entry["crash"] for entry in entries if entry["crash"] is not None
        },
    }


def evaluation_file(folder: Path, step: int, suffix: str = "") -> Path:
    """Return the path of the evaluation after a training step; see `EvaluationKind.suffix`."""
    return folder / "evaluations" / f"step_{step}{suffix}.json"


def read_evaluation_file(file: Path) -> dict[str, Any]:
    """Read the record of an evaluation.

    Raises:
        ConfigError: it is damaged or no `Evaluation`.
    """
    return require_evaluation_record(read_json(file, dict[str, Any], EVALUATE_AGAIN), file)


def require_evaluation_record(record: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return a record that was read from ``file``, if its counts are those of its episodes.

    Raises:
        ConfigError: it is no `Evaluation`, lists a start twice, or says other numbers than its
            episodes give.
    """
    require_declared(record, Evaluation, file, EVALUATE_AGAIN)
    starts = Counter((entry["task"], entry["init_state"]) for entry in record["episodes"])
    twice = [start for start, number in starts.items() if number > 1]
    if twice:
        raise ConfigError(
            f"{file}: task {twice[0][0]} with init state {twice[0][1]} is listed "
            f"{starts[twice[0]]} times, and a start is played once; {EVALUATE_AGAIN}"
        )
    task_ids = {task for task, _ in starts}
    if len(task_ids) != len(record["tasks"]):
        raise ConfigError(
            f"{file}: it has the rates of {len(record['tasks'])} tasks and the episodes of "
            f"{len(task_ids)}; {EVALUATE_AGAIN}"
        )
    counted = count_entries(record["episodes"], task_ids)
    said = [record["total"], *record["tasks"].values()]
    for name in ("successes", "episodes", "crashes"):
        found = getattr(counted, name)
        total, of_tasks = said[0][name], sum(entry[name] for entry in said[1:])
        if not total == of_tasks == found:
            raise ConfigError(
                f"{file}: total.{name} is {total}, the sum over its tasks {of_tasks}, and its "
                f"episodes have {found}; {EVALUATE_AGAIN}"
            )
    return record


def evaluated_steps(folder: Path) -> list[int]:
    """Return the training steps after which an evaluation was kept, in rising order."""
    files = evaluation_file(folder, 0).parent.glob("step_*.json")
    names = [file.stem.removeprefix("step_") for file in files]
    # as numbers: as text, step_10 would come before step_9; those with a suffix are no others
    return sorted(int(name) for name in names if name.isdecimal())


def keep_evaluation(folder: Path, step: int, record: Mapping[str, Any], suffix: str = "") -> None:
    """Write the evaluation after a training step into the run's folder, atomically."""
    file = evaluation_file(folder, step, suffix)
    with recording(file):
        file.parent.mkdir(exist_ok=True)
        atomic_write(file, json.dumps(record, indent=1))


def keep_solved(folder: Path, last_step: int) -> None:
    """Record that the run ended after ``last_step`` because the next step solved every episode."""
    with recording(folder / SOLVED_FILE):
        atomic_write(folder / SOLVED_FILE, json.dumps({"last_step": last_step}))


def solved_after(folder: Path) -> int | None:
    """Return the step of `keep_solved`; None for a run that did not end so."""
    file = folder / SOLVED_FILE
    return read_json(file, Solved, "remove the file").last_step if file.exists() else None


@contextmanager
def open_run_dir(
    folder: Path, recipe: Mapping[str, Any], may_change: Sequence[str]
) -> Generator[None]:
    """Create a run's folder and write ``recipe`` into it, or check that it holds the same run.

    The folder is locked for this process until the context ends.

    Raises:
        ConfigError: the folder cannot be written, is in use, holds something that is no run, or a
            run that differs in more than the parts that ``may_change`` names.
    """
    # tuples become lists, as they are in the file of an earlier run
    wanted = json.loads(json.dumps(recipe))
    # before the lock, whose file would stay in the folder of somebody else
    _check_recipe(folder, wanted, may_change)
    with folder_lock(folder):
        with writing_to(folder):
            _check_recipe(folder, wanted, may_change)
            # again on resume: the parts that may change have their new values
            atomic_write(folder / RECIPE_FILE, yaml.safe_dump(wanted, sort_keys=False))
        yield


def read_recipe(folder: Path) -> dict[str, Any]:
    """Read the recipe that a run was started with.

    Raises:
        ConfigError: the file is damaged.
    """
    remedy = "restore the file, or choose another out=FOLDER"
    return read_yaml(folder / RECIPE_FILE, dict[str, Any], remedy)


def _check_recipe(folder: Path, wanted: dict[str, Any], may_change: Sequence[str]) -> None:
    file = folder / RECIPE_FILE
    with writing_to(folder):
        found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    # what a process leaves that was killed before its recipe was written is no other run
    others = found - {LOCK, partial_file(file).name}
    if file.exists():
        changed = differences(read_recipe(folder), wanted, may_change)
        if changed:
            raise ConfigError(
                f"{folder} holds a run with other settings ({'; '.join(changed)}); "
                "choose another out=FOLDER, or use the same settings to resume it"
            )
    elif others:
        raise ConfigError(
            f"out is {folder}, which holds {min(others)!r} and no run; choose a new or an empty "
            "folder"
        )
