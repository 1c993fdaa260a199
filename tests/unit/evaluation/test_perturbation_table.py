"""What an evaluation under perturbation plays, and how it is counted beside its control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from verl_vla.cli import eval as eval_verb
from verl_vla.cli.arguments import parse
from verl_vla.config.choices import PERTURBED_BASES
from verl_vla.core.episode import Outcome, Start
from verl_vla.core.errors import ConfigError
from verl_vla.envs.libero.suite import libero_suite
from verl_vla.envs.registry import suite
from verl_vla.evaluation.compare import RESULT
from verl_vla.evaluation.perturbation_table import make_rows, table
from verl_vla.evaluation.perturbed import (
    Planned,
    bases_of,
    plan_control,
    plan_perturbed,
    read_controls,
    spread,
    write_table,
)
from verl_vla.runs.run_dir import evaluation_record

POLICY = {"fingerprint": "abc", "unnorm_key": None}
SUCCESS, TIMEOUT, CRASH = Outcome.SUCCESS, Outcome.TIMEOUT, Outcome.CRASH


def evaluation(name: str, outcomes: dict[tuple[int, int], Outcome], **changed: Any) -> dict:
    """An evaluation of a suite, by task id and init state."""
    tasks = libero_suite(name).tasks
    names = {task: tasks[task].name for task in dict.fromkeys(t for t, _ in outcomes)}
    conditions = {
        "suite": name,
        "states": "official",
        "step_limits": {own: tasks[task].published_steps for task, own in names.items()},
        "settle_steps": 10,
        "fixtures": "redrawn",
        "render_size": 256,
        "image_size": 224,
        "renderer": "llvmpipe",
        "assets": None,
        "sampling": "greedy",
        "seed": None,
        "simulation": dict(libero_suite(name).versions),
        "policy": POLICY,
        "dtype": "float32",
        "device": "cpu",
        "versions": {},
    }
    entries = [
        {"episode": i, "task": t, "init_state": s, "outcome": o, "steps": 9, "crash": None}
        for i, ((t, s), o) in enumerate(outcomes.items())
    ]
    return json.loads(json.dumps(evaluation_record(entries, conditions | changed, names)))


CONTROL = evaluation(
    "libero_goal", {(0, 0): SUCCESS, (0, 1): SUCCESS, (5, 0): SUCCESS, (5, 1): TIMEOUT}
)
SWAP = evaluation(
    "libero_goal_swap", {(0, 0): TIMEOUT, (0, 1): SUCCESS, (5, 0): TIMEOUT, (5, 1): CRASH}
)


def test_an_axis_is_counted_beside_its_control() -> None:
    (row,) = make_rows([SWAP], {"libero_goal": CONTROL})
    assert (row.suite, row.axis) == ("libero_goal", "swap")
    assert row.perturbed.as_json() | {"ci95": None} == {
        "rate": 1 / 3,
        "successes": 1,
        "episodes": 3,
        "crashes": 1,
        "ci95": None,
    }
    assert row.control is not None
    assert (row.control.successes, row.control.episodes) == (3, 4)
    assert row.paired is not None
    assert (row.paired.both, row.paired.first_only, row.paired.second_only) == (1, 2, 0)
    assert (row.tasks_evaluated, row.tasks_left_out, row.refused) == (2, 8, {})


def test_there_may_be_no_control() -> None:
    (row,) = make_rows([SWAP], {})
    assert row.control is None
    assert row.paired is None
    assert row.as_json()["paired"] is None


def test_variants_that_share_a_control_episode_are_no_pairs() -> None:
    chosen = libero_suite("libero_goal_plus_noise")
    of_task = [i for i, task in enumerate(chosen.tasks) if task.base and task.base.task_id == 5]
    noise = evaluation("libero_goal_plus_noise", {(i, 0): TIMEOUT for i in of_task[:7]})
    (row,) = make_rows([noise], {"libero_goal": CONTROL})
    assert row.paired is None
    assert row.control is not None
    assert (row.control.successes, row.control.episodes) == (1, 1)
    assert (row.perturbed.successes, row.perturbed.episodes) == (0, 7)
    assert row.tasks_left_out == len(chosen.tasks) - 7


def test_what_cannot_be_built_stands_below_the_table() -> None:
    first = next(i for i, t in enumerate(libero_suite("libero_goal_plus").tasks) if not t.refused)
    plus = evaluation("libero_goal_plus", {(first, 0): SUCCESS})
    rows = make_rows([plus], {})
    assert [row.axis for row in rows] == list(
        dict.fromkeys(task.axis for task in libero_suite("libero_goal_plus").tasks)
    )
    assert sum(
        row.tasks_evaluated + row.tasks_left_out + sum(row.refused.values()) for row in rows
    ) == (len(libero_suite("libero_goal_plus").tasks))
    lines = table(rows).splitlines()
    assert any("libero_goal light: 279 tasks not evaluated: its lights" in line for line in lines)
    assert any(line.startswith("libero_goal light ") and "none" in line for line in lines)


def test_the_table_shows_rates_intervals_and_the_test() -> None:
    head, line, *rest = table(make_rows([SWAP], {"libero_goal": CONTROL})).splitlines()
    assert head.split() == ["tasks", "perturbed", "control", "p"]
    expected = "libero_goal swap 2 of 10 33.3% 1/3 [ 6, 79] 75.0% 3/4 [ 30, 95] 0.5000"
    assert " ".join(line.split()) == expected
    assert rest == ["libero_goal swap: 8 tasks not asked for"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"settle_steps": 0}, "settle_steps"),
        ({"fixtures": "first"}, "fixtures: 'first' -> 'redrawn'"),
        ({"states": "held_out"}, "states"),
        ({"sampling": "temperature 1"}, "sampling"),
        ({"policy": POLICY | {"fingerprint": "other"}}, r"another policy \(its fingerprint"),
        ({"policy": POLICY | {"unnorm_key": "mini"}}, r"another policy \(its unnorm_key"),
        ({"sampling": "temperature 1", "seed": 4}, "seed: 4 -> None"),
        (
            {"step_limits": dict.fromkeys(CONTROL["step_limits"], 512)},
            r"step_limits\.open_the_middle_drawer_of_the_cabinet: 512 -> 300",
        ),
        ({"simulation": {"mujoco": "2.3.7"}}, "mujoco"),
    ],
)
def test_a_control_under_other_conditions_is_refused(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"control of libero_goal_swap .*{reason}"):
        make_rows([SWAP], {"libero_goal": CONTROL | changed})


def test_step_limits_are_compared_by_the_task_that_a_variant_was_made_from() -> None:
    chosen = libero_suite("libero_goal_plus_noise")
    of_task = [i for i, task in enumerate(chosen.tasks) if task.base and task.base.task_id == 5]
    noise = evaluation("libero_goal_plus_noise", {(of_task[0], 0): TIMEOUT})
    make_rows([noise], {"libero_goal": CONTROL})
    limits = noise["step_limits"] | {chosen.tasks[of_task[0]].name: 512}
    with pytest.raises(ConfigError, match=r"step_limits\.push_the_plate_to_.*: 300 -> 512"):
        make_rows([noise | {"step_limits": limits}], {"libero_goal": CONTROL})


def test_drawn_states_are_no_pairs_and_are_refused() -> None:
    swap, control = (record | {"states": "sampled"} for record in (SWAP, CONTROL))
    with pytest.raises(ConfigError, match="the init states of libero_goal_swap are sampled"):
        make_rows([swap], {"libero_goal": control})


def test_another_machine_is_told_and_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="verl_vla.evaluation.perturbed"):
        write_table(tmp_path, [SWAP], {"libero_goal": CONTROL})
        assert not caplog.text
        write_table(tmp_path, [SWAP], {"libero_goal": CONTROL | {"dtype": "bfloat16"}})
    assert "libero_goal and its perturbed suites differ in dtype: 'bfloat16' -> 'f" in caplog.text


def test_a_control_that_lacks_a_start_is_refused() -> None:
    fewer = CONTROL | {"episodes": CONTROL["episodes"][:3]}
    with pytest.raises(ConfigError, match=r"lacks 1 starts, such as task 5 from init state 1"):
        make_rows([SWAP], {"libero_goal": fewer})


def test_a_plan_has_the_same_starts_of_each_axis_and_each_control_start_once() -> None:
    planned = plan_perturbed(
        "libero_spatial",
        ["swap", "task"],
        tasks=[2, 3],
        tasks_per_axis=None,
        states="official",
        episodes=2,
    )
    assert [part.suite for part in planned] == ["libero_spatial_swap", "libero_spatial_task"]
    both = [(t, s) for t in (2, 3) for s in (0, 1)]
    assert [(s.task_id, s.init_state_id) for s in planned[0].starts] == both
    assert [(s.task_id, s.init_state_id) for s in planned[1].starts] == both[:2]  # 3 is refused
    (control,) = plan_control(planned)
    assert control.suite == "libero_spatial"
    assert [(s.task_id, s.init_state_id) for s in control.starts] == both
    assert control.task_names == {i: suite("libero_spatial").tasks[i].name for i in (2, 3)}


def test_a_plan_of_plus_spreads_over_its_axes() -> None:
    (plan,) = plan_perturbed(
        "libero",
        ["plus"],
        tasks=None,
        tasks_per_axis=4,
        states="official",
        episodes=1,
    )
    chosen = libero_suite("libero_plus")
    axes = [chosen.tasks[start.task_id].axis for start in plan.starts]
    assert {axis: axes.count(axis) for axis in axes} == dict.fromkeys(
        ("background", "camera", "language", "noise", "robot", "layout"), 4
    )
    assert {start.init_state_id for start in plan.starts} == {0}
    controls = plan_control([plan])
    assert {part.suite for part in controls} <= set(PERTURBED_BASES)
    assert sum(len(part.starts) for part in controls) <= len(plan.starts)


def test_a_single_state_is_enough_for_a_layout() -> None:
    (plan,) = plan_perturbed(
        "libero_goal",
        ["plus_layout"],
        tasks=[0],
        tasks_per_axis=2,
        states="official",
        episodes=3,
    )
    assert [start.init_state_id for start in plan.starts] == [0, 0]


def test_impossible_plans_are_refused() -> None:
    arguments: dict[str, Any] = {
        "tasks": None,
        "tasks_per_axis": None,
        "states": "official",
        "episodes": 1,
    }
    with pytest.raises(ConfigError, match="--perturbation is 'swop'; did you mean 'swap'"):
        plan_perturbed("libero_goal", ["swop"], **arguments)
    with pytest.raises(ConfigError, match=r"--suite is 'mini', which --perturbation swap does not"):
        plan_perturbed("mini", ["swap"], **arguments)
    with pytest.raises(ConfigError, match=r"--suite is 'libero_plus', .* or libero for all"):
        plan_perturbed("libero_plus", ["plus"], **arguments)
    with pytest.raises(ConfigError, match="--suite is libero, but --perturbation swap is of one"):
        plan_perturbed("libero", ["swap"], **arguments)
    with pytest.raises(ConfigError, match="--perturbation has swap twice"):
        plan_perturbed("libero_goal", ["swap", "task", "swap"], **arguments)
    with pytest.raises(ConfigError, match="--perturbation has plus and plus_noise, a part of it"):
        plan_perturbed("libero_goal", ["plus_noise", "plus"], **arguments)
    for name, axis in (("libero_goal", "swap"), ("libero", "plus_noise")):
        with pytest.raises(ConfigError, match=rf"--tasks has 99.* and {name} has 0 to 9"):
            plan_perturbed(name, [axis], **(arguments | {"tasks": [0, 99]}))
    with pytest.raises(ConfigError, match=r"--tasks is \[1, 1\]; name each task once"):
        plan_perturbed("libero_goal", ["swap"], **(arguments | {"tasks": [1, 1]}))
    with pytest.raises(ConfigError, match=r"--tasks is \[3\], and no variant .* task can be built"):
        plan_perturbed("libero_spatial", ["task"], **(arguments | {"tasks": [3]}))
    with pytest.raises(ConfigError, match="--states is sampled with --perturbation"):
        plan_perturbed("libero_goal", ["swap"], **(arguments | {"states": "sampled"}))
    with pytest.raises(ConfigError, match="no task of suite 'libero_goal_plus_light' can be built"):
        plan_perturbed("libero_goal", ["plus_light"], **arguments)
    with pytest.raises(ConfigError, match="--tasks-per-axis is 0; set at least 1"):
        plan_perturbed("libero_goal", ["plus"], **(arguments | {"tasks_per_axis": 0}))
    with pytest.raises(ConfigError, match="suite 'libero_goal' is not perturbed"):
        spread(suite("libero_goal"), [0, 1], 1)


def write(folder: Path, record: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / RESULT).write_text(json.dumps(record))
    return folder


def test_a_control_is_found_in_its_folder_or_among_several(tmp_path: Path) -> None:
    one = write(tmp_path / "one", CONTROL)
    assert read_controls(one, ["libero_goal"]) == {"libero_goal": CONTROL}
    many = tmp_path / "many"
    object_suite = evaluation("libero_object", {(0, 0): SUCCESS})
    write(many / "libero_goal", CONTROL)
    write(many / "libero_object", object_suite)
    assert read_controls(many, ["libero_goal", "libero_object"]) == {
        "libero_goal": CONTROL,
        "libero_object": object_suite,
    }
    with pytest.raises(ConfigError, match="an evaluation of libero_goal, and libero_10 is"):
        read_controls(one, ["libero_10"])
    with pytest.raises(ConfigError, match="is missing"):
        read_controls(tmp_path / "none", ["libero_goal"])


def test_an_evaluation_of_a_training_run_is_no_control(tmp_path: Path) -> None:
    kept = {k: v for k, v in CONTROL.items() if k not in ("policy", "dtype", "device")}
    (tmp_path / "step_8.json").write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match="does not say its policy, dtype, device; name the fold"):
        read_controls(tmp_path / "step_8.json", ["libero_goal"])


def test_only_the_suites_of_the_chosen_tasks_need_a_control() -> None:
    tasks = libero_suite("libero_plus").tasks
    of_goal = [i for i, task in enumerate(tasks) if task.base and task.base.suite == "libero_goal"]
    assert bases_of("libero_plus", of_goal[:3]) == ["libero_goal"]
    assert bases_of("libero_plus", range(len(tasks))) == list(PERTURBED_BASES)


def test_the_table_is_written_as_json(tmp_path: Path) -> None:
    write_table(tmp_path, [SWAP], {"libero_goal": CONTROL})
    (row,) = json.loads((tmp_path / "perturbations.json").read_text())
    assert row["paired"]["control_only"] == 2
    assert row["paired"]["p_value"] == 0.5
    assert row["perturbed"]["ci95"][0] > 0


@pytest.mark.parametrize("limit", ["simplevla", "4"])
def test_a_control_is_refused_before_the_first_episode(tmp_path: Path, limit: str) -> None:
    """It has another policy and may have another limit; nothing is to be evaluated for that."""
    control, out = write(tmp_path / "control", CONTROL), tmp_path / "out"
    words = [
        *(
            "--policy",
            "bases/mini",
            "--tasks",
            "0",
            "--states",
            "official",
            "--episodes-per-task",
            "1",
        ),
        *("--step-limit", limit, "--out", str(out), "--control", str(control)),
    ]
    of_control = "its fingerprint.*step_limits.open_the_middle_drawer_of_the_cabinet: 300 -> "
    for suite_words in (
        ["--suite", "libero_goal_swap"],
        ["--suite", "libero_goal", "--perturbation", "swap"],
    ):
        with pytest.raises(ConfigError, match=f"libero_goal_swap does not compare.*{of_control}"):
            eval_verb.run(parse("eval", [*words, *suite_words]))
    assert not out.exists()


def test_control_is_a_word_for_perturbed_suites_alone(tmp_path: Path) -> None:
    words = ["--policy", "bases/mini", "--suite", "mini", "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="suite 'mini' is not perturbed; add --perturbation"):
        eval_verb.run(parse("eval", [*words, "--control", str(tmp_path)]))


def test_a_planned_part_names_its_tasks_once() -> None:
    starts = tuple(Start(task_id=t, init_state_id=s) for t in (4, 1) for s in (0, 1))
    assert list(Planned(suite="libero_goal", starts=starts).task_names) == [4, 1]
