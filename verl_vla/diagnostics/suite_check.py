"""Check, by simulation, that every task of a suite can be built and begun on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_vla.envs.base import EnvConfig, Suite

SMALL_PX = 64
"""Side in pixels of the single image that is rendered of each task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCheck:
    """Result of one task."""

    task_id: int
    name: str
    fault: str | None
    """Reason why it cannot be built or begun; None if it can."""
    was_foreseen: bool
    """True if the suite itself declares the fault, without a simulator."""

    def as_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return {
            "task": self.task_id,
            "name": self.name,
            "fault": self.fault,
            "foreseen": self.was_foreseen,
        }


def check_tasks(
    chosen: Suite, config: EnvConfig, tasks: Sequence[int], show: Callable[[TaskCheck], None]
) -> list[TaskCheck]:
    """Build each task, begin it from its first init state and let it settle, one after the other.

    Args:
        chosen: the suite.
        config: configuration of the environment, with the name of the suite.
        tasks: task ids.
        show: callback that gets each result at once; LIBERO's tasks take 2 to 10 seconds each.
    """
    env = chosen.make_env(config)
    found: list[TaskCheck] = []
    try:
        for task in tasks:
            # the suite's own refusals cost no simulator
            foreseen = chosen.refusals[task] if task in chosen.refusals else None
            fault = _fault(env, chosen, task) if foreseen is None else foreseen
            found.append(
                TaskCheck(
                    task_id=task,
                    name=chosen.tasks[task].name,
                    fault=fault,
                    was_foreseen=foreseen is not None,
                )
            )
            show(found[-1])
    finally:
        env.close()
    return found


def count_faults(checks: Sequence[TaskCheck]) -> dict[str, int]:
    """Count the tasks with each fault, the most frequent first."""
    faults = Counter(check.fault for check in checks if check.fault is not None)
    return dict(faults.most_common())


def _fault(env: Any, chosen: Suite, task: int) -> str | None:
    first = chosen.init_state_ids(task, "official")[0]
    try:
        seen = env.reset(task, first)
    except Exception as error:  # noqa: BLE001 -- any exception is a fault of the task
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if not np.isfinite(seen.proprio).all():
        return "its state is not finite after settling"
    return None
