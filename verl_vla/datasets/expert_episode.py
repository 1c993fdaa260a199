"""One attempt of a scripted expert, with all fields of LIBERO's demonstration files.

An expert without errors does not show how to recover from one. Therefore the arm can be disturbed
from time to time (DART, arXiv:1703.09327, disturbs every step). The file holds the actions that
were executed and marks the disturbed ones, so that a policy learns the expert's alone.

Experts may be biased: they misjudge the height of objects, and their failures are recorded too. A
policy that imitates them does the right thing at the wrong height, which more imitation does not
correct but reinforcement learning does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from verl_vla.core.errors import ConfigError
from verl_vla.datasets.libero_writer import IMAGES, LiberoEpisode
from verl_vla.envs.experts.choice import make_expert
from verl_vla.envs.libero.env import SETTLE_ACTION, LiberoEnv
from verl_vla.envs.libero.task import LiberoTask
from verl_vla.envs.mini.make_init_states import sample_init_state

if TYPE_CHECKING:
    from verl_vla.envs.libero.simulator import Simulator

FASTEST = 0.9
"""Bound of each translation of a recorded action, below 1: values clipped at the bound of the
action range would all get the same action token."""
ROBOSUITE = 1
"""Environment type: robomimic ``envs/env_base.py``, ``EnvType.ROBOSUITE_TYPE``."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingConfig:
    """Settings of the recording; spans are in simulator steps."""

    slowest_pace: float = 0.75
    """Lower bound of the largest commanded translation, which is sampled per episode; the bound of
    an action is 1."""
    fastest_pace: float = 0.85
    noise: float = 0.0
    """Standard deviation of a disturbance of each translation; the bound of an action is 1. 0
    disturbs nothing."""
    disturbed_steps: int = 5
    """Longest disturbance; the shortest is one step."""
    calm_steps: int = 24
    """Longest span between disturbances; the shortest is ``horizon``."""
    every: int = 1
    """Steps between images. A disturbed expert, or one with ``every`` above 1, is seen only where
    ``horizon`` undisturbed actions follow: the images that training can use."""
    horizon: int = 8
    """Actions recorded after the end, so that a whole chunk follows the last image before it."""
    height_error_m: float = 0.0
    """Largest error of a biased expert, which takes objects to be higher than they are. The error
    is sampled per episode, and failed attempts are recorded too. 0 for experts without error."""

    def __post_init__(self) -> None:
        if not 0 < self.slowest_pace <= self.fastest_pace <= FASTEST:
            raise ConfigError(
                f"the pace is {self.slowest_pace} to {self.fastest_pace}; it must rise, above 0 "
                f"and up to {FASTEST}"
            )
        for name, value in (("noise", self.noise), ("height_error_m", self.height_error_m)):
            if value < 0:
                raise ConfigError(f"{name} is {value}; set 0 or more")
        if min(self.every, self.horizon, self.disturbed_steps) < 1:
            raise ConfigError(
                f"every is {self.every}, horizon {self.horizon} and disturbed_steps "
                f"{self.disturbed_steps}; set at least 1 each"
            )
        if self.calm_steps < self.horizon:
            raise ConfigError(
                f"calm_steps is {self.calm_steps}, less than horizon, {self.horizon}; no image "
                "would be followed by enough calm actions"
            )

    @property
    def has_all_images(self) -> bool:
        """True where every row gets its image, as in LIBERO's own files."""
        return self.every == 1 and self.noise == 0


def play_expert(
    env: LiberoEnv, task_id: int, config: RecordingConfig, *, seed: int, index: int
) -> LiberoEpisode | None:
    """Run the ``index``-th attempt at a task until the task is solved, or a biased expert missed.

    The start is sampled from the task's regions and is in neither split of the suite. Its objects
    settle first, for ``env.config.settle_steps`` steps that are recorded too: the recorded actions,
    executed from the first recorded state, give every recorded state again, to the bit.

    Returns:
        The episode; None if the task's step limit came first.
    """
    # the order of these draws is part of the data: another one gives other episodes
    rng = np.random.default_rng([seed, task_id, index])
    simulator = env.simulator(task_id)
    simulator.begin(sample_init_state(env, task_id, int(rng.integers(2**31))))
    pace = rng.uniform(config.slowest_pace, config.fastest_pace)
    height_error_m = rng.uniform(0.0, config.height_error_m)
    limit = env.suite.step_limit(env.config.step_limit, task_id)
    disturbances = _disturbances(config, limit + config.horizon, rng)
    recording = _Recording(env, task_id)
    for _ in range(env.config.settle_steps):
        recording.add(np.array(SETTLE_ACTION), with_images=config.has_all_images)
        simulator.step(np.array(SETTLE_ACTION))
    expert = make_expert(env.suite.task(task_id).name, simulator, pace, height_error_m)
    ended_after: int | None = None
    for step, disturbance in enumerate(disturbances):
        action = expert.act().copy()
        action[:3] = np.clip(action[:3] + disturbance, -FASTEST, FASTEST)
        # the row first: it describes the moment before its action
        recording.add(
            action,
            is_disturbed=bool(disturbance.any()),
            with_images=config.has_all_images
            or (ended_after is None and _starts_chunk(disturbances, step, config)),
        )
        is_solved = simulator.step(action)
        if config.height_error_m == 0:
            has_ended = is_solved and expert.has_finished
        else:
            has_ended = is_solved or (height_error_m > 0 and expert.has_missed())
        if has_ended and ended_after is None:
            ended_after = step + 1
        if ended_after is not None and step + 1 >= ended_after + config.horizon:
            break
    if ended_after is None or ended_after > limit or not recording.has_images:
        return None
    return recording.episode()


def _disturbances(
    config: RecordingConfig, num_steps: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Return [num_steps, 3], added to the executed translations: constant pushes with pauses.

    Half of the episodes begin with a push, so that early images show the arm in many positions.
    """
    pushes = np.zeros((num_steps, 3))
    step = 0 if rng.random() < 0.5 else int(rng.integers(config.horizon, config.calm_steps + 1))
    while step < num_steps:
        length = int(rng.integers(1, config.disturbed_steps + 1))
        pushes[step : step + length] = rng.normal(0.0, config.noise, 3)
        # a pause is never shorter than a chunk, so that an image fits in
        step += length + int(rng.integers(config.horizon, config.calm_steps + 1))
    return pushes


def _starts_chunk(
    disturbances: npt.NDArray[np.float64], step: int, config: RecordingConfig
) -> bool:
    """Check that an image is due and that the next ``horizon`` actions are not disturbed."""
    return step % config.every == 0 and not disturbances[step : step + config.horizon].any()


class _Recording:
    """The rows of one attempt."""

    def __init__(self, env: LiberoEnv, task_id: int) -> None:
        self._env, self._task_id = env, task_id
        self._rows: list[dict[str, Array]] = []
        self._images: dict[str, list[Array]] = {IMAGES[camera]: [] for camera in env.config.cameras}

    @property
    def has_images(self) -> bool:
        """True where at least one row has its images."""
        return any(bool(row["rendered"]) for row in self._rows)

    def add(self, action: Array, *, with_images: bool, is_disturbed: bool = False) -> None:
        """Add state and observation at this moment, and the action that follows."""
        simulator = self._env.simulator(self._task_id)
        seen = simulator.seen_robot()
        self._rows.append(
            {
                "actions": action,
                "disturbed": np.array(is_disturbed),
                "rendered": np.array(with_images),
                "states": simulator.flat_state(),
                "robot_states": np.concatenate([seen.fingers_m, seen.hand_m, seen.hand_quaternion]),
                "obs/ee_pos": seen.hand_m,
                "obs/ee_ori": seen.hand_rad,
                "obs/ee_states": np.concatenate([seen.hand_m, seen.hand_rad]),
                "obs/gripper_states": seen.fingers_m,
                "obs/joint_states": seen.arm_rad,
            }
        )
        if with_images:
            for camera in self._env.config.cameras:
                # `render` rotates LIBERO's image by 180 degrees; a second rotation gives it again
                image = simulator.render(camera)[::-1, ::-1]
                self._images[IMAGES[camera]].append(image)

    def episode(self) -> LiberoEpisode:
        """Return the recorded episode."""
        simulator = self._env.simulator(self._task_id)
        columns = {name: np.stack([row[name] for row in self._rows]) for name in self._rows[0]}
        return LiberoEpisode(
            task_id=self._task_id,
            attributes=_attributes(self._env, self._env.suite.task(self._task_id), simulator),
            model_file=simulator.model_xml(),
            actions=columns["actions"],
            disturbed=columns["disturbed"],
            states=columns["states"],
            robot_states=columns["robot_states"],
            proprio={name: column for name, column in columns.items() if name.startswith("obs/")},
            rendered=columns["rendered"],
            images={name: np.stack(images) for name, images in self._images.items()},
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
        "camera_names": list(env.config.cameras),
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
