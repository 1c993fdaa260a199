"""What a run's folder says about the run: its recipe, and the records of its evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from verl_vla.envs.libero import EnvConfig
from verl_vla.envs.suites import suite
from verl_vla.errors import ConfigError
from verl_vla.evaluation import Evaluation


def evaluation_record(
    result: Evaluation, env: EnvConfig, task_names: dict[int, str]
) -> dict[str, Any]:
    """An evaluation as JSON, with what decides whether two of them compare."""
    chosen = suite(env.suite)
    episodes = result.trajectories.episodes
    is_drawn = bool((episodes.init_state_id >= chosen.num_init_states).any())
    return {
        "suite": env.suite,
        "step_limits": {
            name: chosen.step_limit(env.step_limit, task) for task, name in task_names.items()
        },
        "states": "drawn" if is_drawn else "held_out",
        "render_size": env.render_size,
        "total": result.total.as_json(),
        "tasks": {task_names[t]: rate.as_json() for t, rate in result.per_task.items()},
        "episodes": [
            {"task": task, "init_state": state, "outcome": outcome, "steps": steps}
            for task, state, outcome, steps in zip(
                episodes.task_id.tolist(),
                episodes.init_state_id.tolist(),
                episodes.outcome.tolist(),
                episodes.num_steps.tolist(),
                strict=True,
            )
        ],
        "crashes": {str(key): why for key, why in result.trajectories.crashes.items()},
    }


def keep_evaluation(folder: Path, step: int, record: Mapping[str, Any]) -> None:
    """Write the evaluation after a training step into the run's folder, whole or not at all."""
    file = folder / "evaluations" / f"step_{step}.json"
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps(record, indent=1))
    partial.replace(file)


def claim_folder(folder: Path, recipe: Mapping[str, Any], may_change: Sequence[str]) -> None:
    """Make a run's folder and write ``recipe`` into it, or check that it holds the same run.

    Raises:
        ConfigError: the folder cannot be written, or holds a run that differs in more than the
            parts that ``may_change`` names.
    """
    file = folder / "recipe.yaml"
    wanted: dict[str, Any] = json.loads(json.dumps(recipe))
    if file.exists():
        changed = _differences(yaml.safe_load(file.read_text()), wanted, may_change)
        if changed:
            raise ConfigError(
                f"{folder} holds a run with other settings ({'; '.join(changed)}); "
                "choose another out=FOLDER, or use the same settings to resume it"
            )
    partial_file = file.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial_file.write_text(yaml.safe_dump(wanted, sort_keys=False))
        partial_file.replace(file)
    except OSError as error:
        raise ConfigError(
            f"out is {folder}, which cannot be written ({error.strerror}); "
            "choose another out=FOLDER"
        ) from error


def _differences(
    before: dict[str, Any], after: dict[str, Any], may_change: Sequence[str], path: str = ""
) -> list[str]:
    """Knobs that differ and may not, as ``key: old -> new``."""
    found: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        name = f"{path}.{key}" if path else key
        if name in may_change:
            continue
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, may_change, name)
        elif old != new:
            found.append(f"{name}: {old!r} -> {new!r}")
    return found
