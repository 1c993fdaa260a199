"""Little demonstration files in LIBERO's layout, played by mini's experts in the real simulator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from verl_vla.config.choices import CAMERAS
from verl_vla.datasets.libero_reader import demo_file
from verl_vla.datasets.libero_writer import IMAGES
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.env import SETTLE_ACTION, LiberoEnv
from verl_vla.envs.libero.suite import make_libero_env
from verl_vla.envs.mini.experts import EXPERTS

PACE = 0.8
IDLE_AT = (0, 7, 8)
"""Steps at which the operator does nothing, for the no-op filter to find."""
RENDER_SIZE = 64


def record_folder(folder: Path, tasks: Sequence[int], *, episodes: int) -> Path:
    """Record ``episodes`` episodes of each task from its first training starts."""
    folder.mkdir(parents=True, exist_ok=True)
    env = make_libero_env(EnvConfig(suite="mini", render_size=RENDER_SIZE, image_size=28))
    try:
        for task_id in tasks:
            task = env.suite.task(task_id)
            with h5py.File(demo_file(folder, task.name), "w") as file:
                data = file.create_group("data")
                # in quotes, as LIBERO's own files have it
                information = {"language_instruction": f'"please {task.instruction}"'}
                data.attrs["problem_info"] = json.dumps(information)
                data.attrs["env_args"] = json.dumps({"bddl_file": task.bddl_file.name})
                for index in range(episodes):
                    _record_episode(env, task_id, index, data.create_group(f"demo_{index}"))
    finally:
        env.close()
    return folder


def _record_episode(env: LiberoEnv, task_id: int, index: int, group: h5py.Group) -> None:
    env.reset(task_id, index)
    simulator = env.simulator(task_id)
    expert = EXPERTS[env.suite.task(task_id).name](simulator, PACE, 0.0)
    actions, states, joints, frames = [], [], [], {camera: [] for camera in CAMERAS}
    is_solved = False
    while not is_solved:
        last = actions[-1][-1] if actions else SETTLE_ACTION[-1]
        idle = np.array([*SETTLE_ACTION[:-1], last])
        actions.append(idle if len(actions) in IDLE_AT else expert.act())
        states.append(simulator._env.sim.get_state().flatten())
        joints.append(simulator.seen_robot().arm_rad)
        for camera, seen in frames.items():
            seen.append(simulator.render(camera)[::-1, ::-1])
        is_solved = simulator.step(actions[-1])
        assert len(actions) < 200, "the expert has lost its way"
    group["actions"] = np.stack(actions)
    group["states"] = np.stack(states)
    group["obs/joint_states"] = np.stack(joints)
    for camera, seen in frames.items():
        group[IMAGES[camera]] = np.stack(seen)
