"""What an evaluation under perturbation plays: the perturbed suites, and the control's starts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_vla.build import starts, task_ids
from verl_vla.comparison import read_evaluation
from verl_vla.config import nearest
from verl_vla.envs.base import Split, Suite
from verl_vla.envs.libero_plus import PLUS_AXES
from verl_vla.envs.perturbed_suites import PRO_AXES
from verl_vla.envs.suites import LiberoSuite, libero_suite
from verl_vla.errors import ConfigError
from verl_vla.perturbation_table import make_rows, table
from verl_vla.sampling import Start
from verl_vla.whole_file import write_whole

logger = logging.getLogger(__name__)

PERTURBATIONS = (*PRO_AXES, "plus", *(f"plus_{axis}" for axis in PLUS_AXES))
"""LIBERO-PRO's five axes, and LIBERO-Plus's seven, together or one by one."""
TABLE = "perturbations.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One suite, and what is played of it."""

    suite: str
    starts: tuple[Start, ...]

    @property
    def task_names(self) -> dict[int, str]:
        """Of the tasks that are played, by task id."""
        tasks = libero_suite(self.suite).tasks
        return {i: tasks[i].name for i in dict.fromkeys(start.task_id for start in self.starts)}


def plan_perturbed(
    suite: str,
    perturbations: Sequence[str],
    *,
    tasks: Sequence[int] | None,
    tasks_per_axis: int | None,
    states: Split,
    episodes: int | None,
) -> list[Planned]:
    """What is played of each perturbed suite; tasks that cannot be built are left out, and told.

    Args:
        suite: of LIBERO's, or ``libero_plus`` for all four where the perturbation is of Plus.
        perturbations: names of `PERTURBATIONS`.
        tasks: task ids in ``suite``, of which all variants are played; None for all.
        tasks_per_axis: at most so many variants of each axis, spread evenly; None for all.
        states: which init states.
        episodes: at most so many init states of each task; None for all.

    Raises:
        ConfigError: there is no such perturbation of this suite, or its package is not installed.
    """
    planned: list[Planned] = []
    for name in perturbations:
        if name not in PERTURBATIONS:
            raise ConfigError(f"--perturbation is {name!r}; {nearest(name, PERTURBATIONS)}")
        chosen = libero_suite(f"{suite}_{name}")
        ids = spread(chosen, _of_tasks(chosen, task_ids(chosen, None), tasks), tasks_per_axis)
        found = [
            start
            for task in ids
            for start in starts(
                chosen, [task], states, per_task=_at_most(chosen, task, states, episodes)
            )
        ]
        planned.append(Planned(suite=chosen.name, starts=tuple(found)))
    return planned


def plan_control(planned: Sequence[Planned]) -> list[Planned]:
    """The unperturbed starts that belong to the planned ones, each once, by suite of LIBERO's."""
    found: dict[str, dict[Start, None]] = {}
    for part in planned:
        tasks = libero_suite(part.suite).tasks
        for start in part.starts:
            base = tasks[start.task_id].base
            assert base is not None
            control = Start(task_id=base.task_id, init_state_id=start.init_state_id)
            found.setdefault(base.suite, {})[control] = None
    return [
        Planned(suite=suite, starts=tuple(sorted(kept, key=lambda s: (s.task_id, s.init_state_id))))
        for suite, kept in found.items()
    ]


def bases_of(suite: str) -> list[str]:
    """LIBERO's suites that a perturbed suite was made from."""
    tasks = libero_suite(suite).tasks
    return list(dict.fromkeys(task.base.suite for task in tasks if task.base is not None))


def read_controls(folder: Path, suites: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Earlier evaluations of LIBERO's suites: ``folder`` holds one of them, or a folder for each.

    Raises:
        ConfigError: one is missing, or is of another suite.
    """
    one = len(suites) == 1 and not (folder / suites[0]).is_dir()
    found = {suite: read_evaluation(folder if one else folder / suite) for suite in suites}
    for suite, record in found.items():
        if record["suite"] != suite:
            raise ConfigError(
                f"--control is {folder}, an evaluation of {record['suite']}, and {suite} is "
                "perturbed; name one of that suite"
            )
    return found


def write_table(
    out: Path,
    records: Sequence[Mapping[str, Any]],
    controls: Mapping[str, Mapping[str, Any]],
) -> None:
    """Print the table of all axes and write it into ``out``."""
    rows = make_rows(records, controls)
    logger.info("\n%s", table(rows))
    write_whole(out / TABLE, json.dumps([row.as_json() for row in rows], indent=1))
    logger.info("written to %s", out / TABLE)


def _of_tasks(chosen: LiberoSuite, ids: Sequence[int], wanted: Sequence[int] | None) -> list[int]:
    if wanted is None:
        return list(ids)
    bases = {i: chosen.tasks[i].base for i in ids}
    return [i for i, base in bases.items() if base is not None and base.task_id in wanted]


def spread(chosen: Suite, ids: Sequence[int], number: int | None) -> list[int]:
    """At most ``number`` tasks of each axis, evenly from all of its tasks.

    Raises:
        ConfigError: the number is below 1, or the suite has no axes.
    """
    if number is None:
        return list(ids)
    if not isinstance(chosen, LiberoSuite) or chosen.package is None:
        raise ConfigError(
            f"--tasks-per-axis is {number}, but suite {chosen.name!r} is not perturbed; name a "
            "perturbed one, such as libero_plus, or leave it out"
        )
    if number < 1:
        raise ConfigError(f"--tasks-per-axis is {number}; set at least 1")
    axes: dict[str | None, list[int]] = {}
    for i in ids:
        axes.setdefault(chosen.tasks[i].axis, []).append(i)
    return sorted(
        of_axis[place * len(of_axis) // min(number, len(of_axis))]
        for of_axis in axes.values()
        for place in range(min(number, len(of_axis)))
    )


def _at_most(chosen: LiberoSuite, task: int, states: Split, episodes: int | None) -> int | None:
    """``episodes``, or as many as a task has that records fewer states than its suite."""
    if episodes is None or chosen.tasks[task].num_init_states is None:
        return episodes
    return min(episodes, len(chosen.init_state_ids(task, states)))
