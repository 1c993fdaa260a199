"""One task of every axis in the simulator: what a perturbation changes, and that nothing else is.

All tasks of a suite are built by ``python -m verl_vla check-suite``; here are a few.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from verl_vla.cli import check_suite
from verl_vla.cli import eval as eval_verb
from verl_vla.cli.arguments import parse
from verl_vla.config.choices import CAMERAS
from verl_vla.core.errors import ConfigError
from verl_vla.core.image_preprocessing import prepare_image
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.env import SETTLE_ACTION, LiberoEnv
from verl_vla.envs.libero.image_noise import disturb
from verl_vla.envs.libero.plus_suites import NO_LIGHTS
from verl_vla.envs.libero.suite import FIRST_OBJECT, POSE, libero_suite, make_libero_env
from verl_vla.evaluation.compare import RESULT
from verl_vla.evaluation.perturbed import TABLE

pytestmark = pytest.mark.sim

SIZE = 64


def open_env(suite: str) -> LiberoEnv:
    return make_libero_env(
        EnvConfig(suite=suite, render_size=SIZE, image_size=SIZE, cameras=CAMERAS)
    )


def first(suite: str, task: str) -> int:
    """The first task of a suite that can be built and was made from ``task``."""
    return next(
        i
        for i, own in enumerate(libero_suite(suite).tasks)
        if own.refused is None and own.name.startswith(task)
    )


def places(env: LiberoEnv, task_id: int) -> dict[str, np.ndarray]:
    simulator = env.simulator(task_id)
    return {name: simulator.object_position(name) for name in simulator._env.objects_dict}


SPATIAL = "pick_up_the_black_bowl_between_the_plate_and_the_ramekin_and_place_it_on_the_plate"


@pytest.fixture(scope="module")
def usual() -> Iterator[LiberoEnv]:
    env = open_env("libero_spatial")
    env.reset(0, 0)
    yield env
    env.close()


def test_a_swapped_task_begins_where_its_file_says() -> None:
    env = open_env("libero_goal_swap")
    seen = env.reset(3, 1)
    assert seen.instruction == libero_suite("libero_goal").tasks[3].instruction
    state = env.suite.load_init_states(3)[1]
    for i, place in enumerate(places(env, 3).values()):
        begun = state[FIRST_OBJECT + POSE * i :][:3]
        assert np.linalg.norm(place[:2] - begun[:2]) < 0.01
        assert abs(place[2] - begun[2]) < 0.15
    assert env.step_chunk(np.zeros((2, 7), np.float32)).outcome is None
    env.close()


def test_another_scene_has_the_same_arrangement_and_another_look(usual: LiberoEnv) -> None:
    env = open_env("libero_spatial_environment")
    here, there = usual.reset(0, 0), env.reset(0, 0)
    for name, place in places(usual, 0).items():
        np.testing.assert_allclose(places(env, 0)[name], place, atol=1e-3)
    assert np.abs(here.image[0].astype(int) - there.image[0]).mean() > 5
    env.close()


def test_an_object_of_another_colour_is_the_same_object(usual: LiberoEnv) -> None:
    env = open_env("libero_spatial_object")
    state = usual.suite.load_init_states(0)[0]
    before, after = usual.reset_to(0, state), env.reset_to(0, state)
    renamed = [name.replace("yellow_", "") for name in places(env, 0)]
    assert [name.replace("akita_", "") for name in places(usual, 0)] == renamed
    for name, place in places(usual, 0).items():
        own = name.replace("plate", "yellow_plate").replace("akita_", "")
        np.testing.assert_allclose(places(env, 0)[own], place, atol=2e-3)
    assert (before.image[0] != after.image[0]).any()
    env.close()


def test_a_moved_camera_sees_the_same_episode_from_elsewhere(usual: LiberoEnv) -> None:
    task = first("libero_spatial_plus_camera", SPATIAL)
    env = open_env("libero_spatial_plus_camera")
    before, after = usual.reset(0, 0), env.reset(task, 0)
    np.testing.assert_array_equal(before.proprio, after.proprio)
    np.testing.assert_array_equal(before.image[1], after.image[1])
    assert (before.image[0] != after.image[0]).any()
    move, cameras = env.suite.task(task).change.camera, []
    for simulator in (usual.simulator(0), env.simulator(task)):
        camera = simulator.model.camera(CAMERAS[0])
        cameras.append((np.array(camera.pos), np.array(camera.quat)))
    assert move is not None
    position, turn = move.move(*cameras[0])
    np.testing.assert_allclose(cameras[1][0], position)
    np.testing.assert_allclose(abs(cameras[1][1] @ turn), 1.0)
    env.close()


def test_noise_is_in_the_third_person_image_alone(usual: LiberoEnv) -> None:
    task = first("libero_spatial_plus_noise", SPATIAL)
    env = open_env("libero_spatial_plus_noise")
    before, after = usual.reset(0, 0), env.reset(task, 0)
    np.testing.assert_array_equal(before.image[1], after.image[1])
    noise = env.suite.task(task).change.noise
    render = usual.simulator(0).render(CAMERAS[0])
    seen = prepare_image(disturb(render, noise), size=SIZE)
    np.testing.assert_array_equal(seen, after.image[0])
    assert (seen != before.image[0]).any()
    np.testing.assert_array_equal(env.reset(task, 0).image, after.image)
    env.close()


def test_another_start_of_the_arm_is_that_of_a_stock_environment_to_the_bit(
    tmp_path: Path,
) -> None:
    suite = "libero_spatial_plus_robot"
    env, task = open_env(suite), first(suite, SPATIAL)
    state = env.suite.load_init_states(task)[0]
    moves = np.array([SETTLE_ACTION] * 8)
    np.savez(tmp_path / "question.npz", init_state=state, moves=moves, resets=1)
    stock = [str(Path(__file__).with_name("stock.py")), suite, str(task), str(tmp_path)]
    subprocess.run([sys.executable, *stock], check=True)
    simulator = env.simulator(task)
    simulator.begin(state)
    with np.load(tmp_path / "answer.npz") as answer:
        for i, move in enumerate(moves):
            simulator.step(move)
            assert np.array_equal(simulator.data.qpos, answer["qpos"][i]), f"step {i}"
            assert np.array_equal(simulator.proprio(), answer["proprio"][i]), f"step {i}"
    env.close()


def test_another_floor_changes_nothing_but_the_look() -> None:
    task = first("libero_object_plus_background", "")
    env, usual = open_env("libero_object_plus_background"), open_env("libero_object")
    base = env.suite.task(task).base
    assert base is not None
    before, after = usual.reset(base.task_id, 0), env.reset(task, 0)
    np.testing.assert_array_equal(before.proprio, after.proprio)
    assert np.abs(before.image[0].astype(int) - after.image[0]).mean() > 10
    env.close()
    usual.close()


def test_another_layout_begins_from_its_own_state_or_from_drawn_ones() -> None:
    task = first("libero_goal_plus_layout", "")
    env = open_env("libero_goal_plus_layout")
    env.reset(task, 0)
    with pytest.raises(ConfigError, match=r"init state 1 is not in libero_goal_plus_layout"):
        env.reset(task, 1)
    drawn = [env.reset(task, i).image for i in env.suite.init_state_ids(task, "train")[:2]]
    assert (drawn[0] != drawn[1]).any()
    env.close()


def test_what_cannot_be_built_says_why() -> None:
    env = open_env("libero_goal_plus_light")
    with pytest.raises(ConfigError, match=f"cannot be built: {NO_LIGHTS}"):
        env.reset(0, 0)


def test_a_state_of_another_task_is_refused(usual: LiberoEnv) -> None:
    with pytest.raises(ConfigError, match="has 91 values, and its simulator 92"):
        usual.reset_to(0, usual.suite.load_init_states(0)[0][:-1])


def test_check_suite_counts_what_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "checks.json"
    words = ["--suite", "libero_spatial_task", "--tasks", "2", "3", "--out", str(out)]
    assert check_suite.run(parse("check-suite", words)) == 0
    found = json.loads(out.read_text())
    assert [(check["task"], check["foreseen"]) for check in found] == [(2, False), (3, True)]
    assert found[0]["fault"] is None
    assert found[1]["fault"].startswith("its init-state file is empty")


def test_one_command_plays_the_perturbed_suites_and_their_control(tmp_path: Path) -> None:
    words = [
        *("--policy", "bases/mini", "--suite", "libero_spatial", "--tasks", "3"),
        *("--perturbation", "language", "task", "--states", "official", "--episodes-per-task", "2"),
        *("--step-limit", "4", "--num-workers", "1", "--num-slots", "1", "--out", str(tmp_path)),
    ]
    assert eval_verb.run(parse("eval", words)) == 0
    language, task = json.loads((tmp_path / TABLE).read_text())
    assert language["axis"] == "language"
    assert language["control"]["episodes"] == language["perturbed"]["episodes"] == 2
    assert language["paired"]["neither"] == 2
    assert task["tasks_evaluated"] == 0
    assert sum(task["refused"].values()) == 2
    record = json.loads((tmp_path / "libero_spatial" / RESULT).read_text())
    assert [(e["task"], e["init_state"]) for e in record["episodes"]] == [(3, 0), (3, 1)]
    # the episodes are found again, and a control from an earlier evaluation gives the same table
    found = [*words, "--control", str(tmp_path / "libero_spatial")]
    assert eval_verb.run(parse("eval", found)) == 0
    again = json.loads((tmp_path / "libero_spatial_language" / RESULT).read_text())
    assert again["time"]["episodes_found"] == 2
    assert json.loads((tmp_path / TABLE).read_text()) == [language, task]
