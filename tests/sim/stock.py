"""Play LIBERO's own environment as the published evaluations do, and write down all of it.

``python stock.py SUITE TASK FOLDER``: reads ``question.npz`` (init_state, moves, resets: number of
resets, and so of episodes, the last of which is played), writes ``answer.npz`` (qpos, qvel, solved,
proprio, arm and the images, after each move).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from verl_vla.config.choices import CAMERAS
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.assets import asset_folder
from verl_vla.envs.libero.suite import make_libero_env

SIZE = 128


def main(suite_name: str, task_id: int, folder: Path) -> None:
    ours = make_libero_env(EnvConfig(suite=suite_name))
    if suite_name == "mini":
        from verl_vla.envs.mini.problem import register_mini_problem  # noqa: PLC0415 -- imports LIBERO

        register_mini_problem()
    from libero.libero.envs import OffScreenRenderEnv  # noqa: PLC0415 -- after `make_libero_env`
    from robosuite.utils.transform_utils import quat2axisangle  # noqa: PLC0415 -- the same

    with np.load(folder / "question.npz") as question:
        init_state, moves = question["init_state"], question["moves"]
        num_resets = int(question["resets"])
    task = ours.suite.task(task_id)
    robot = "Panda"
    if task.change.arm_rad is not None:
        robot = register_robot(task.change.arm_rad)
    bddl_file = str(task.bddl_file)
    trace: dict[str, list[np.ndarray]] = {}
    with asset_folder(ours.assets):
        env = OffScreenRenderEnv(
            bddl_file_name=bddl_file,
            robots=[robot],
            camera_heights=SIZE,
            camera_widths=SIZE,
            ignore_done=True,
        )
        env.seed(0)
        env.reset()
        for _ in range(num_resets - 1):
            # an episode before it, so that random numbers of a step would count
            env.set_init_state(init_state)
            env.step(moves[0])
            env.reset()
    env.set_init_state(init_state)
    for move in moves:
        seen, _, done, _ = env.step(move)
        turn = quat2axisangle(seen["robot0_eef_quat"])
        proprio = [seen["robot0_eef_pos"], turn, seen["robot0_gripper_qpos"]]
        row = {
            "qpos": np.array(env.sim.data.qpos),
            "qvel": np.array(env.sim.data.qvel),
            "solved": np.array(done),
            "proprio": np.concatenate(proprio).astype(np.float32),
            "arm": seen["robot0_joint_pos"],
            **{camera: seen[f"{camera}_image"] for camera in CAMERAS},
        }
        for name, value in row.items():
            trace.setdefault(name, []).append(value)
    np.savez(folder / "answer.npz", **{name: np.stack(rows) for name, rows in trace.items()})


def register_robot(arm_rad: tuple[float, ...]) -> str:
    """A robot class of its own for a start of the arm, as LIBERO-Plus has 500 of them."""
    from libero.libero.envs.robots import MountedPanda  # noqa: PLC0415 -- after `make_libero_env`
    from robosuite.robots import ROBOT_CLASS_MAPPING, SingleArm  # noqa: PLC0415 -- the same

    type("MountedPandaMoved", (MountedPanda,), {"init_qpos": property(lambda _: np.array(arm_rad))})
    ROBOT_CLASS_MAPPING["MountedPandaMoved"] = SingleArm
    return "PandaMoved"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
