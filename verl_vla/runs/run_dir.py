"""The folder of a run: its recipe, and the records of its evaluations."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import LOCK, atomic_write, folder_lock, partial_file, writing_to
from verl_vla.core.success_rate import count_entries
from verl_vla.core.text import differences

SOLVED_FILE = "solved.json"


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


def evaluated_steps(folder: Path) -> list[int]:
    """Return the training steps after which an evaluation was kept, in rising order."""
    files = evaluation_file(folder, 0).parent.glob("step_*.json")
    names = [file.stem.removeprefix("step_") for file in files]
    # as numbers: as text, step_10 would come before step_9; those with a suffix are no others
    return sorted(int(name) for name in names if name.isdecimal())


def keep_evaluation(folder: Path, step: int, record: Mapping[str, Any], suffix: str = "") -> None:
    """Write the evaluation after a training step into the run's folder, atomically."""
    file = evaluation_file(folder, step, suffix)
    file.parent.mkdir(exist_ok=True)
    atomic_write(file, json.dumps(record, indent=1))


def keep_solved(folder: Path, last_step: int) -> None:
    """Record that the run ended after ``last_step`` because the next step solved every episode."""
    atomic_write(folder / SOLVED_FILE, json.dumps({"last_step": last_step}))


def solved_after(folder: Path) -> int | None:
    """Return the step of `keep_solved`; None for a run that did not end so."""
    file = folder / SOLVED_FILE
    return json.loads(file.read_text())["last_step"] if file.exists() else None


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
    with folder_lock(folder):
        with writing_to(folder):
            # tuples become lists, as they are in the file of an earlier run
            _write_recipe(folder, json.loads(json.dumps(recipe)), may_change)
        yield


def _write_recipe(folder: Path, wanted: dict[str, Any], may_change: Sequence[str]) -> None:
    file = folder / "recipe.yaml"
    # what a process leaves that was killed before its recipe was written is no other run
    others = {path.name for path in folder.iterdir()} - {LOCK, partial_file(file).name}
    if file.exists():
        changed = differences(yaml.safe_load(file.read_text()), wanted, may_change)
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
    # again on resume: the parts that may change have their new values
    atomic_write(file, yaml.safe_dump(wanted, sort_keys=False))
