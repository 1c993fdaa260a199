"""Recording in LIBERO's own layout: real physics, real files, real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pytest

from verl_vla.cli import demos
from verl_vla.cli.arguments import parse
from verl_vla.config.choices import CAMERAS
from verl_vla.core.errors import ConfigError
from verl_vla.datasets.expert_episode import RecordingConfig, play_expert
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.suite import make_libero_env

if TYPE_CHECKING:
    from verl_vla.envs.libero.simulator import Simulator

pytestmark = pytest.mark.sim

LIFT, STACK, CAN = 1, 3, 4
SIZE = 32
SHAPES = {
    "actions": (7,),
    "robot_states": (9,),
    "rewards": (),
    "dones": (),
    "obs/agentview_rgb": (SIZE, SIZE, 3),
    "obs/eye_in_hand_rgb": (SIZE, SIZE, 3),
    "obs/ee_pos": (3,),
    "obs/ee_ori": (3,),
    "obs/ee_states": (6,),
    "obs/gripper_states": (2,),
    "obs/joint_states": (7,),
}


def config(suite: str) -> EnvConfig:
    return EnvConfig(suite=suite, render_size=SIZE, cameras=CAMERAS)


def played_again(simulator: Simulator, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    simulator.begin(states[0])
    again = []
    for action in actions:
        again.append(simulator.flat_state())
        simulator.step(action)
    return np.stack(again)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demos") / "lift.hdf5"
    words = (
        f"--suite mini --tasks {LIFT} --episodes-per-task 2 --render-size {SIZE} --num-workers 1 "
        f"--out {path}"
    )
    assert demos.run(parse("demos", words.split())) == 0
    return path


def test_the_command_writes_liberos_layout(written: Path) -> None:
    with h5py.File(written) as file:
        data = file["data"]
        assert json.loads(data.attrs["problem_info"]) == {
            "problem_name": "mini_tabletop",
            "domain_name": "robosuite",
            "language_instruction": "lift the red cube",
        }
        arguments = json.loads(data.attrs["env_args"])
        assert arguments["env_kwargs"]["camera_heights"] == SIZE
        assert arguments["env_kwargs"]["controller_configs"]["type"] == "OSC_POSE"
        assert data.attrs["bddl_file_name"] == "bddl_files/mini/lift_the_red_cube.bddl"
        assert "(:goal" in data.attrs["bddl_file_content"]
        assert data.attrs["num_demos"] == len(data) == 2
        assert data.attrs["total"] == sum(len(demo["actions"]) for demo in data.values())
        for demo in data.values():
            rows = len(demo["actions"])
            assert {name: demo[name].shape for name in SHAPES} == {
                name: (rows, *shape) for name, shape in SHAPES.items()
            }
            assert "<mujoco" in demo.attrs["model_file"]
            assert set(demo["actions"][:, 6]) == {-1.0, 1.0}
        starts = [demo["states"][0] for demo in data.values()]
        assert not np.array_equal(*starts)


def test_stored_actions_give_the_stored_states_again_to_the_bit(written: Path) -> None:
    env = make_libero_env(config("mini"))
    with h5py.File(written) as file:
        for demo in file["data"].values():
            states = demo["states"][()]
            again = played_again(env.simulator(LIFT), states, demo["actions"][()])
            assert np.array_equal(again, states)
    env.close()


def test_a_folder_gets_a_file_a_task_whatever_the_workers(written: Path, tmp_path: Path) -> None:
    words = (
        f"--suite mini --tasks {LIFT} {CAN} --episodes-per-task 1 --render-size {SIZE} "
        "--num-workers 2"
    )
    assert demos.run(parse("demos", [*words.split(), "--out", str(tmp_path / "new")])) == 0
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["lift_the_can_demo.hdf5", "lift_the_red_cube_demo.hdf5"]
    with h5py.File(written) as one, h5py.File(tmp_path / "new" / names[1]) as two:
        assert list(two["data"]) == ["demo_0"]
        for name in (*SHAPES, "states"):
            assert np.array_equal(one[f"data/demo_0/{name}"], two[f"data/demo_0/{name}"]), name


def test_a_second_call_records_what_is_missing(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    words = (
        f"--suite mini --episodes-per-task 1 --render-size {SIZE} --num-workers 1 --out {folder}"
    )
    assert demos.run(parse("demos", [*words.split(), "--tasks", str(LIFT)])) == 0
    (first,) = folder.iterdir()
    before = first.stat().st_mtime_ns
    assert demos.run(parse("demos", [*words.split(), "--tasks", str(LIFT), str(CAN)])) == 0
    assert first.stat().st_mtime_ns == before
    assert len(list(folder.iterdir())) == 2
    with pytest.raises(ConfigError, match=r"was recorded with seed 0, not 1"):
        demos.run(parse("demos", [*words.split(), "--tasks", str(LIFT), "--seed", "1"]))


def test_images_and_poses_are_those_before_the_action_upside_down(written: Path) -> None:
    env = make_libero_env(config("mini"))
    with h5py.File(written) as file:
        demo = file["data/demo_0"]
        simulator = env.simulator(LIFT)
        simulator.begin(demo["states"][0])
        for row in range(15):
            if row == 14:
                upright = simulator.render("agentview")[:, ::-1]
                assert np.array_equal(demo["obs/agentview_rgb"][row], upright[::-1])
                assert np.array_equal(demo["obs/ee_states"][row], simulator_pose(simulator))
            simulator.step(demo["actions"][row])
    env.close()


def simulator_pose(simulator: Simulator) -> np.ndarray:
    seen = simulator.seen_robot()
    return np.concatenate([seen.hand_m, seen.hand_rad])


def test_a_spatial_episode_is_played_again_to_the_bit() -> None:
    env = make_libero_env(config("libero_spatial"))
    episode = play_expert(env, 0, RecordingConfig(every=8), seed=0, index=1)
    env.close()
    assert episode is not None
    fresh = make_libero_env(config("libero_spatial"))
    again = played_again(fresh.simulator(0), episode.states, episode.actions)
    fresh.close()
    assert np.array_equal(again, episode.states)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--suite libero_10 --out x.hdf5", "no scripted experts"),
        ("--suite mini --out x.hdf5", "one file, for 7 tasks"),
        ("--suite mini --task 0 --noise -0.1 --out x.hdf5", "noise is -0.1; set 0 or more"),
        ("--suite mini --task 7 --out x.hdf5", "tasks 0 to 6"),
    ],
)
def test_impossible_recordings_are_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        demos.run(parse("demos", words.split()))


def children_of(pid: int) -> set[int]:
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return {int(child) for child in listing.split()}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_parent_leaves_no_process_behind(tmp_path: Path) -> None:
    words = f"demos --suite mini --tasks {STACK} --episodes-per-task 500 --render-size {SIZE} --out"
    command = [sys.executable, "-m", "verl_vla", *words.split(), str(tmp_path / "x.hdf5")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=dict(os.environ)) as parent:
        partial = tmp_path / "x.hdf5.partial"
        deadline = time.monotonic() + 120
        while not (partial.exists() and partial.stat().st_size > 0):
            assert parent.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline, "nothing was recorded"
            time.sleep(0.2)
        children = children_of(parent.pid)
        assert len(children) >= 2
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(map(is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(is_alive, children))
    assert not (tmp_path / "x.hdf5").exists()
