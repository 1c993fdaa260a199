"""Plan of an evaluation under perturbation: the perturbed suites, and the control's starts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_vla.config.choices import ALL_BASES, PERTURBATIONS, PERTURBED_BASES, PRO_AXES, Split
from verl_vla.core.episode import Start
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import atomic_write
from verl_vla.core.text import nearest
from verl_vla.envs.base import Suite
from verl_vla.envs.libero.suite import LiberoSuite, libero_suite
from verl_vla.evaluation.compare import read_evaluation
from verl_vla.evaluation.perturbation_table import make_rows, table, told_differences
from verl_vla.rl.setup import starts, task_ids

logger = logging.getLogger(__name__)

TABLE = "perturbations.json"
NEEDED = ("policy", "seed", "dtype", "device")
"""Keys of a record that `eval` writes and a training run does not, or not in the same place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One suite and the starts that are evaluated in it."""

    suite: str
    starts: tuple[Start, ...]

    @property
    def task_names(self) -> dict[int, str]:
        """Names of the evaluated tasks, by task id."""
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
    """Choose the starts of each perturbed suite; tasks that cannot be built are logged.

    Args:
        suite: one of `PERTURBED_BASES`, or `ALL_BASES` if all perturbations are of LIBERO-Plus.
        perturbations: names of `PERTURBATIONS`.
        tasks: task ids in the unperturbed suite, whose variants are all evaluated; None for all.
        tasks_per_axis: largest number of variants per axis, spread evenly; None for all.
        states: split of the init states.
        episodes: largest number of init states per task; None for all.

    Raises:
        ConfigError: there is no such perturbation of this suite, its package is not installed,
            nothing would be evaluated, or ``states`` is ``sampled``.
    """
    _check_names(suite, perturbations)
    _check_tasks(suite, tasks)
    if states == "sampled":
        raise ConfigError(
            "--states is sampled with --perturbation, but perturbed tasks and their control would "
            "sample other states; set --states official or held_out"
        )
    planned: list[Planned] = []
    for name in perturbations:
        chosen = libero_suite(f"{suite}_{name}")
        ids = spread(chosen, _of_tasks(chosen, task_ids(chosen, None), tasks), tasks_per_axis)
        found = starts(chosen, ids, states, per_task=episodes)
        planned.append(Planned(suite=chosen.name, starts=found))
    if not any(part.starts for part in planned):
        raise ConfigError(
            f"--tasks is {tasks}, and no variant of them under --perturbation "
            f"{' '.join(perturbations)} can be built; name other tasks, or leave --tasks out"
        )
    return planned


def plan_control(planned: Sequence[Planned]) -> list[Planned]:
    """Return the unperturbed starts of the planned ones, without duplicates, by LIBERO suite."""
    found: dict[str, dict[Start, None]] = {}
    for part in planned:
        tasks = libero_suite(part.suite).tasks
        for start in part.starts:
            base = tasks[start.task_id].base
            # true of every task of a perturbed suite
            assert base is not None
            control = Start(task_id=base.task_id, init_state_id=start.init_state_id)
            # a dictionary as an ordered set: variants share their unperturbed start
            found.setdefault(base.suite, {})[control] = None
    return [
        Planned(suite=suite, starts=tuple(sorted(kept, key=lambda s: (s.task_id, s.init_state_id))))
        for suite, kept in found.items()
    ]


def bases_of(suite: str, ids: Sequence[int]) -> list[str]:
    """Return LIBERO's suites from which tasks of a perturbed suite were made."""
    tasks = libero_suite(suite).tasks
    bases = [tasks[i].base for i in ids]
    return list(dict.fromkeys(base.suite for base in bases if base is not None))


def read_controls(folder: Path, suites: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read evaluations of LIBERO's suites; ``folder`` holds one of them, or a folder for each.

    Raises:
        ConfigError: one is missing, is of another suite, or was not written by `eval`.
    """
    # the folder of one evaluation itself, or one folder for each suite
    one = len(suites) == 1 and not (folder / suites[0]).is_dir()
    found = {suite: read_evaluation(folder if one else folder / suite) for suite in suites}
    for suite, record in found.items():
        if record["suite"] != suite:
            raise ConfigError(
                f"--control is {folder}, an evaluation of {record['suite']}, and {suite} is "
                "perturbed; name one of that suite"
            )
        missing = [key for key in NEEDED if key not in record]
        if missing:
            raise ConfigError(
                f"--control is {folder}, which does not say its {', '.join(missing)}; name the "
                "folder of an eval (evaluations of a training run lack it)"
            )
    return found


def write_table(
    out: Path,
    records: Sequence[Mapping[str, Any]],
    controls: Mapping[str, Mapping[str, Any]],
) -> None:
    """Print the table of all axes and write it into ``out``."""
    rows = make_rows(records, controls)
    for suite, control in controls.items():
        for told in dict.fromkeys(
            t for record in records for t in told_differences(record, control)
        ):
            logger.warning("control %s and its perturbed suites differ in %s", suite, told)
    logger.info("\n%s", table(rows))
    atomic_write(out / TABLE, json.dumps([row.as_json() for row in rows], indent=1))
    logger.info("written to %s", out / TABLE)


def _check_names(suite: str, perturbations: Sequence[str]) -> None:
    for name in perturbations:
        if name not in PERTURBATIONS:
            raise ConfigError(f"--perturbation is {name!r}; {nearest(name, PERTURBATIONS)}")
        if perturbations.count(name) > 1:
            raise ConfigError(f"--perturbation has {name} twice; name each once")
        if "plus" in perturbations and name.startswith("plus_"):
            raise ConfigError(f"--perturbation has plus and {name}, a part of it; leave out one")
        if suite != ALL_BASES and suite not in PERTURBED_BASES:
            raise ConfigError(
                f"--suite is {suite!r}, which --perturbation {name} does not perturb; choose among "
                f"{', '.join(PERTURBED_BASES)}, or {ALL_BASES} for all four where the perturbation "
                "is plus or plus_AXIS"
            )
        if suite == ALL_BASES and name in PRO_AXES:
            raise ConfigError(
                f"--suite is {suite}, but --perturbation {name} is of one suite; choose among "
                f"{', '.join(PERTURBED_BASES)}"
            )


def _check_tasks(suite: str, tasks: Sequence[int] | None) -> None:
    if tasks is None:
        return
    # a task id must be known in all of the suites that it is used for
    number = min(
        len(libero_suite(s).tasks) for s in (PERTURBED_BASES if suite == ALL_BASES else [suite])
    )
    for task in tasks:
        if not 0 <= task < number:
            raise ConfigError(
                f"--tasks has {task}, but with --perturbation it names tasks of the unperturbed "
                f"suite, and {suite} has 0 to {number - 1}; choose among those"
            )
    if len(set(tasks)) != len(tasks):
        raise ConfigError(f"--tasks is {list(tasks)}; name each task once")


def _of_tasks(chosen: LiberoSuite, ids: Sequence[int], wanted: Sequence[int] | None) -> list[int]:
    if wanted is None:
        return list(ids)
    bases = {i: chosen.tasks[i].base for i in ids}
    return [i for i, base in bases.items() if base is not None and base.task_id in wanted]


def spread(chosen: Suite, ids: Sequence[int], number: int | None) -> list[int]:
    """Choose at most ``number`` tasks of each axis, evenly spaced.

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
        # by axis, so that a small axis is not drowned by a large one
        axes.setdefault(chosen.tasks[i].axis, []).append(i)
    return sorted(
        of_axis[index * len(of_axis) // min(number, len(of_axis))]
        for of_axis in axes.values()
        for index in range(min(number, len(of_axis)))
    )
