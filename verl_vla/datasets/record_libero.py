"""Recording of scripted experts with all fields of LIBERO's demonstration files.

These experts are not disturbed, so the recorded actions are the executed ones. Start and pace are
sampled per episode.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from verl_vla.datasets.libero_writer import IMAGES, LiberoEpisode
from verl_vla.datasets.record import env_of_process, first_kept
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.experts.choice import make_expert
from verl_vla.envs.libero.env import SETTLE_ACTION, LiberoEnv
from verl_vla.envs.libero.task import CAMERAS, LiberoTask
from verl_vla.envs.mini.make_init_states import sample_init_state

if TYPE_CHECKING:
    from verl_vla.envs.libero.simulator import Simulator

SLOWEST_PACE, FASTEST_PACE = 0.7, 0.85
"""Range of the largest commanded translation, sampled per episode; the bound of an action is 1."""
ROBOSUITE = 1
"""Environment type: robomimic ``envs/env_base.py``, ``EnvType.ROBOSUITE_TYPE``."""


def record_episodes(
    config: EnvConfig, tasks: Sequence[int], *, episodes: int, seed: int, workers: int
) -> Iterator[LiberoEpisode]:
    """Yield ``episodes`` solved episodes of each task, task by task.

    The result depends on ``seed`` only, not on ``workers``.

    Raises:
        ConfigError: an expert fails in more than half of its attempts.
    """
    yield from first_kept(partial(attempt_episode, config), tasks, episodes, seed, workers)


def attempt_episode(config: EnvConfig, task_id: int, seed: int, index: int) -> LiberoEpisode | None:
    """Let the expert try once in this process; see `play_episode`."""
    return play_episode(env_of_process(config), task_id, seed=seed, index=index)


def play_episode(env: LiberoEnv, task_id: int, *, seed: int, index: int) -> LiberoEpisode | None:
    """Run the ``index``-th attempt at a task until the task is solved and the expert has finished.

    The objects settle first, for ``env.config.settle_steps`` steps that are recorded too.

    Returns:
        The episode; None if the task's step limit came first.
    """
    rng = np.random.default_rng([seed, task_id, index])
    simulator, task = env.simulator(task_id), env.suite.task(task_id)
    simulator.begin(_draw_start(env, task_id, seed, index, rng))
    rows: list[dict[str, npt.NDArray[Any]]] = []
    for _ in range(env.config.settle_steps):
        rows.append(_row(simulator, np.array(SETTLE_ACTION)))
        simulator.step(rows[-1]["actions"])
    expert = make_expert(task.name, simulator, rng.uniform(SLOWEST_PACE, FASTEST_PACE))
    for _ in range(env.suite.step_limit(env.config.step_limit, task_id)):
        # the row first: it describes the moment before its action
        rows.append(_row(simulator, expert.act()))
        if simulator.step(rows[-1]["actions"]) and expert.has_finished:
            return _episode(env, task_id, rows)
    return None


def _draw_start(
    env: LiberoEnv, task_id: int, seed: int, index: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Return a new start for the mini suite, or a training init state for LIBERO's suites.

    The new start is in neither split. For a LIBERO task, sampling would also move its cabinets and
    stoves, which are part of the model and not of the state, so a recorded episode could not be
    replayed.
    """
    if not env.suite.needs_assets:
        return sample_init_state(env, task_id, int(rng.integers(2**31)))
    ids = env.suite.init_state_ids(task_id, "train")
    # the same order for all attempts, through which their number walks
    order = np.random.default_rng([seed, task_id]).permutation(ids)
    return env.suite.load_init_states(task_id)[order[index % len(order)]]


def _row(simulator: Simulator, action: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[Any]]:
    """Return state and observation before ``action``, with the action."""
    seen = simulator.seen_robot()
    images = {
        # `render` rotates LIBERO's image by 180 degrees; a second rotation gives LIBERO's again
        name: simulator.render(camera)[::-1, ::-1]
        for camera, name in IMAGES.items()
    }
    return {
        "actions": action,
        "states": simulator.flat_state(),
        "robot_states": np.concatenate([seen.fingers_m, seen.hand_m, seen.hand_quaternion]),
        "obs/ee_pos": seen.hand_m,
        "obs/ee_ori": seen.hand_rad,
        "obs/ee_states": np.concatenate([seen.hand_m, seen.hand_rad]),
        "obs/gripper_states": seen.fingers_m,
        "obs/joint_states": seen.arm_rad,
        **images,
    }


def _episode(
    env: LiberoEnv, task_id: int, rows: list[dict[str, npt.NDArray[Any]]]
) -> LiberoEpisode:
    simulator = env.simulator(task_id)
    columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return LiberoEpisode(
        task_id=task_id,
        attributes=_attributes(env, env.suite.task(task_id), simulator),
        model_file=simulator.model_xml(),
        actions=columns["actions"],
        states=columns["states"],
        robot_states=columns["robot_states"],
        obs={
            name.removeprefix("obs/"): column
            for name, column in columns.items()
            if name.startswith("obs/")
        },
    )


def _attributes(env: LiberoEnv, task: LiberoTask, simulator: Simulator) -> dict[str, str]:
    """Return the attributes of LIBERO's files; paths in them begin with ``bddl_files``."""
    problem, controller = simulator.problem, simulator.controller
    bddl_file = f"bddl_files/{env.suite.name}/{task.bddl_file.name}"
    env_name = problem["env_name"]
    env_kwargs = {
        "robots": ["Panda"],
        "controller_configs": controller,
        "bddl_file_name": bddl_file,
        "has_renderer": False,
        "has_offscreen_renderer": True,
        "ignore_done": True,
        "use_camera_obs": True,
        "camera_depths": False,
        "camera_names": list(CAMERAS),
        "reward_shaping": True,
        "control_freq": 20,
        "camera_heights": env.config.render_size,
        "camera_widths": env.config.render_size,
        "camera_segmentations": None,
    }
    env_args = {
        "type": ROBOSUITE,
        "env_name": env_name,
        "problem_name": problem["problem_name"],
        "bddl_file": bddl_file,
        "env_kwargs": env_kwargs,
    }
    info = {name: text for name, text in problem.items() if name != "env_name"}
    return {
        "env_name": env_name,
        "env_args": json.dumps(env_args),
        "problem_info": json.dumps(info),
        "bddl_file_name": bddl_file,
        "bddl_file_content": task.definition(),
        "macros_image_convention": "opengl",
    }
