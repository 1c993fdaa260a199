"""Success rates under perturbation, compared with the same policy on the unperturbed tasks.

A perturbed episode and a control episode belong together if the perturbed task was made from the
control's task and both began at the init state with the same number. If every control episode
belongs to at most one perturbed episode, McNemar's paired test applies. LIBERO-Plus makes hundreds
of variants of a task that share a control episode, so there are intervals and no test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl_vla.core.errors import ConfigError
from verl_vla.core.success_rate import SuccessRate, count_entries
from verl_vla.core.text import TextTable, differences
from verl_vla.envs.libero.suite import libero_suite
from verl_vla.envs.libero.task import LiberoTask
from verl_vla.evaluation.compare import Paired, count_pairs

SAME = (
    "states",
    "settle_steps",
    "fixtures",
    "render_size",
    "image_size",
    "renderer",
    "assets",
    "sampling",
    "seed",
)
"""Conditions that a control must share, in addition to its policy, step limits and package
versions. The seed is null for greedy evaluations."""
OF_POLICY = ("fingerprint", "unnorm_key")
"""Keys that identify the policy and the scaling of its actions."""
TOLD = ("dtype", "device")
"""Conditions that may differ between a control and a perturbed evaluation; they are reported."""

INSTEAD = "leave --control out, and the same command evaluates the control"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One axis of one suite."""

    suite: str
    """Name of the unperturbed suite of LIBERO."""
    axis: str
    perturbed: SuccessRate
    control: SuccessRate | None
    """Success rate of the control episodes of the perturbed ones; None without a control."""
    paired: Paired | None
    """Paired counts, the control first; None if the episodes are no pairs."""
    tasks_evaluated: int
    tasks_left_out: int
    """Number of tasks that could be built but were not requested."""
    refused: dict[str, int]
    """Tasks that cannot be built, by reason."""

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain values."""
        paired = None
        if self.paired is not None:
            paired = {
                "both": self.paired.both,
                "control_only": self.paired.first_only,
                "perturbed_only": self.paired.second_only,
                "neither": self.paired.neither,
                "p_value": self.paired.p_value,
            }
        return {
            "suite": self.suite,
            "axis": self.axis,
            "perturbed": self.perturbed.as_json(),
            "control": None if self.control is None else self.control.as_json(),
            "paired": paired,
            "tasks_evaluated": self.tasks_evaluated,
            "tasks_left_out": self.tasks_left_out,
            "refused": self.refused,
        }


def make_rows(
    records: Sequence[Mapping[str, Any]], controls: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """Sort the episodes of evaluations by suite and axis, and count successes.

    Args:
        records: evaluations of perturbed suites, as made by
            `verl_vla.runs.run_dir.evaluation_record`.
        controls: evaluations of LIBERO's suites, by name; may lack some or all.

    Raises:
        ConfigError: a control is not comparable; see `check_control`.
    """
    rows: list[Row] = []
    for record in records:
        tasks = libero_suite(record["suite"]).tasks
        starts = [(episode["task"], episode["init_state"]) for episode in record["episodes"]]
        # in the order of the tasks, each pair once
        for suite, axis in dict.fromkeys((_base(task), _axis(task)) for task in tasks):
            ids = {i for i, task in enumerate(tasks) if (_base(task), _axis(task)) == (suite, axis)}
            control = controls[suite] if suite in controls else None
            if control is not None:
                check_control(record, starts, control)
            rows.append(_row(suite, axis, record, control, {i: tasks[i] for i in ids}))
    return rows


def check_control(
    conditions: Mapping[str, Any], starts: Sequence[tuple[int, int]], control: Mapping[str, Any]
) -> None:
    """Check that a perturbed evaluation and a control differ in the perturbation only.

    Args:
        conditions: conditions of the perturbed evaluation, which need not have begun.
        starts: starts of the perturbed evaluation: task ids and init states.
        control: an evaluation of one of LIBERO's suites; starts made from other suites are ignored.

    Raises:
        ConfigError: they differ in something else, or the control lacks a start.
    """
    if conditions["states"] == "sampled":
        raise ConfigError(
            f"the init states of {conditions['suite']} are sampled, and the control's are other "
            "samples, from other regions where the perturbation moved them; set --states official "
            "or held_out, or leave --perturbation and --control out"
        )
    here, there = ({key: r[key] for key in SAME} for r in (control, conditions))
    differ = differences(here, there)
    for key in OF_POLICY:
        if control["policy"][key] != conditions["policy"][key]:
            differ.append(f"another policy (its {key})")
    versions = control["simulation"]
    # the packages of the control; the perturbed suite has one more
    differ += differences(versions, {key: conditions["simulation"][key] for key in versions})
    tasks = libero_suite(conditions["suite"]).tasks
    of_suite = [(t, s) for t, s in starts if _base(tasks[t]) == control["suite"]]
    differ += _other_limits(conditions, [tasks[t] for t in {t for t, _ in of_suite}], control)
    if differ:
        raise ConfigError(
            f"the control of {conditions['suite']} does not compare with it: "
            f"{'; '.join(differ)}; {INSTEAD}"
        )
    known = {(entry["task"], entry["init_state"]) for entry in control["episodes"]}
    missing = {(_control_task(tasks[t]), s) for t, s in of_suite} - known
    if missing:
        raise ConfigError(
            f"the control of {conditions['suite']} lacks {len(missing)} starts, such as task "
            f"{min(missing)[0]} from init state {min(missing)[1]}; evaluate it on more, or "
            f"{INSTEAD}"
        )


def told_differences(record: Mapping[str, Any], control: Mapping[str, Any]) -> list[str]:
    """List differences in the conditions `TOLD`, as ``key: control -> perturbed``."""
    here, there = ({key: r[key] for key in TOLD} for r in (control, record))
    return differences(here, there)


def table(rows: Sequence[Row]) -> TextTable:
    """Format a line for each axis, and below them the tasks that were not evaluated."""
    cells: list[list[str]] = []
    for row in rows:
        total = row.tasks_evaluated + row.tasks_left_out + sum(row.refused.values())
        control = "-" if row.control is None else _cell(row.control)
        p_value = "-" if row.paired is None else f"{row.paired.p_value:.4f}"
        tasks = f"{row.tasks_evaluated} of {total}"
        cells.append(
            [_name(row), f"{tasks:>11}", _cell(row.perturbed), f"{control:>24}", f"{p_value:>7}"]
        )
    notes: list[str] = []
    for row in rows:
        for reason, number in row.refused.items():
            notes.append(f"{_name(row)}: {number} tasks not evaluated: {reason}")
        if row.tasks_left_out:
            notes.append(f"{_name(row)}: {row.tasks_left_out} tasks not asked for")
    return TextTable(["", "tasks", "perturbed", "control", "p"], cells, notes=notes)


def _row(
    suite: str,
    axis: str,
    record: Mapping[str, Any],
    control: Mapping[str, Any] | None,
    tasks: Mapping[int, LiberoTask],
) -> Row:
    episodes = [episode for episode in record["episodes"] if episode["task"] in tasks]
    refused = Counter(task.refused for task in tasks.values() if task.refused is not None)
    played = {episode["task"] for episode in episodes}
    starts = [(_control_task(tasks[e["task"]]), e["init_state"]) for e in episodes]
    control_rate = paired = None
    if control is not None:
        # a control may hold more starts than were perturbed
        known = {(entry["task"], entry["init_state"]): entry for entry in control["episodes"]}
        # variants of one task share a control episode, which counts once
        belonging = [known[start] for start in dict.fromkeys(starts)]
        control_rate = count_entries(belonging, {task for task, _ in starts})
        if len(belonging) == len(starts):
            both = zip(belonging, episodes, strict=True)
            paired = count_pairs([(before["outcome"], after["outcome"]) for before, after in both])
    return Row(
        suite=suite,
        axis=axis,
        perturbed=count_entries(episodes, played),
        control=control_rate,
        paired=paired,
        tasks_evaluated=len(played),
        tasks_left_out=len(tasks) - len(played) - sum(refused.values()),
        refused=dict(refused),
    )


def _other_limits(
    conditions: Mapping[str, Any], tasks: Sequence[LiberoTask], control: Mapping[str, Any]
) -> list[str]:
    """List tasks whose step limit differs in the control; tasks that it lacks are ignored."""
    unperturbed = libero_suite(control["suite"]).tasks
    limits = control["step_limits"]
    found: dict[str, None] = {}
    for task in tasks:
        name, own = unperturbed[_control_task(task)].name, conditions["step_limits"][task.name]
        if name in limits and limits[name] != own:
            # a dictionary as an ordered set: variants of one task say the same
            found[f"step_limits.{name}: {limits[name]} -> {own}"] = None
    return list(found)


def _control_task(task: LiberoTask) -> int:
    assert task.base is not None
    return task.base.task_id


def _base(task: LiberoTask) -> str:
    assert task.base is not None
    return task.base.suite


def _axis(task: LiberoTask) -> str:
    assert task.axis is not None
    return task.axis


def _name(row: Row) -> str:
    return f"{row.suite} {row.axis}"


def _cell(rate: SuccessRate) -> str:
    if not rate.episodes:
        return f"{'none':>24}"
    low, high = (100 * end for end in rate.ci95)
    counts = f"{rate.successes}/{rate.episodes}"
    return f"{100 * rate.rate:5.1f}% {counts:>7} [{low:3.0f},{high:3.0f}]"
