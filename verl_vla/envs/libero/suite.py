"""LIBERO's suites and the embedded one: tasks, recorded init states and step limits.

Making a suite needs no simulator. A suite's task ids, instructions and init states are those of the
published evaluations: LIBERO's task list in its order, instructions made from the tasks' names, and
the ``.pruned_init`` files.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt

from verl_vla.config.choices import CAMERAS, SUITES, Split
from verl_vla.core.errors import ConfigError
from verl_vla.core.text import nearest
from verl_vla.envs.base import Env, EnvConfig, StepLimit, Suite
from verl_vla.envs.libero.asset_files import require_models
from verl_vla.envs.libero.assets import find_assets, libero_root
from verl_vla.envs.libero.env import LiberoEnv
from verl_vla.envs.libero.init_states import read_states
from verl_vla.envs.libero.mujoco_version import require_libero_physics
from verl_vla.envs.libero.plus_suites import PLUS_SUITES, plus_tasks
from verl_vla.envs.libero.pro_suites import PRO_SUITES, pro_objects, pro_tasks
from verl_vla.envs.libero.task import (
    ACTION_DIM,
    DISTRIBUTIONS,
    MAX_SAMPLED,
    PLUS,
    PRO,
    PROPRIO_DIM,
    LiberoTask,
)

SIMULATION = ("mujoco", "robosuite", "hf-libero")
"""Packages whose versions decide a simulator's results."""
PERTURBED = (*PRO_SUITES, *PLUS_SUITES)
"""Suites made from LIBERO's by one change, from separate packages; see docs/perturbed-suites.md."""
PUBLISHED_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Step limits of openvla-oft ``experiments/robot/libero/run_libero_eval.py:63``: a little more than
the longest demonstration of the suite."""
SIMPLEVLA_STEPS = 512
"""Step limit of every LIBERO suite in SimpleVLA-RL ``verl/workers/rollout/rob_rollout.py:429``."""
MINI_STEPS = {
    "push_the_red_cube_onto_the_green_marker": 48,
    "lift_the_red_cube": 64,
    "put_the_red_cube_on_the_white_plate": 80,
    "stack_the_red_cube_on_the_blue_cube": 96,
    "lift_the_can": 64,
    "lift_the_milk_carton": 64,
    "push_the_blue_cube_onto_the_green_marker": 48,
}
"""Tasks of the mini suite with their step limits: six in order of difficulty, and the first one
again with another object. A limit is about twice the scripted expert's steps, so that a policy
fails for lack of skill, not of time."""
FIRST_OBJECT = 10
"""Index in an init state where the first object's pose begins: after time, arm and two fingers."""
POSE = 7
"""Number of values of a pose: a position and a quaternion."""
LIBERO_INIT_STATES = 50
MINI_INIT_STATES = 100
TRAINED_SAMPLED = 40
"""Number of sampled starts that a task with a single recorded init state is trained on: as many as
other LIBERO tasks have for training."""
_MINI = Path(__file__).resolve().parents[1] / "mini"


@dataclass(frozen=True, kw_only=True)
class LiberoSuite(Suite):
    """A LIBERO benchmark, or the embedded one."""

    name: str
    tasks: tuple[LiberoTask, ...]  # pyright: ignore[reportIncompatibleVariableOverride] -- frozen
    num_init_states: int
    cameras: tuple[str, ...] = CAMERAS
    action_dim: int = ACTION_DIM
    proprio_dim: int = PROPRIO_DIM
    gripper_dims: tuple[int, ...] = (ACTION_DIM - 1,)
    images_are_mirrored: bool = True
    package: str | None = None
    """Package of the perturbed tasks; see `verl_vla.envs.libero.task`."""

    @property
    def needs_assets(self) -> bool:
        """True where LIBERO's meshes and textures are needed to simulate the suite."""
        return self.name != "mini"

    @property
    def versions(self) -> dict[str, str]:
        """See `Suite.versions`."""
        tasks = () if self.package is None else (DISTRIBUTIONS[self.package][0],)
        return {name: metadata.version(name) for name in (*SIMULATION, *tasks)}

    @property
    def refusals(self) -> dict[int, str]:
        """See `Suite.refusals`."""
        return {i: task.refused for i, task in enumerate(self.tasks) if task.refused is not None}

    def require_simulator(self) -> None:
        """Check LIBERO's place, MuJoCo's version and LIBERO's assets, which mini does not need.

        A suite with objects of LIBERO-PRO also needs their models among the assets.
        """
        # the embedded suite simulates with LIBERO's code too
        libero_root()
        require_libero_physics()
        if not self.needs_assets:
            return
        assets = find_assets()
        if self.package == PRO:
            # tasks that are refused anyway need no models
            buildable = [task for task in self.tasks if task.refused is None]
            require_models(assets, self.name, pro_objects(buildable))

    def make_env(self, config: EnvConfig) -> Env:
        """See `Suite.make_env`."""
        return LiberoEnv(self, config)

    def task(self, task_id: int) -> LiberoTask:
        """See `Suite.task`."""
        super().task(task_id)
        return self.tasks[task_id]

    def step_limit(self, limit: StepLimit, task_id: int) -> int:
        """See `Suite.step_limit`; SimpleVLA-RL has one limit for all LIBERO suites."""
        if limit == "simplevla" and self.needs_assets:
            return SIMPLEVLA_STEPS
        return super().step_limit(limit, task_id)

    def held_out_ids(self) -> list[int]:
        """Return every fifth of LIBERO's 50 states (4, 9, .., 49), or the mini suite's last 50.

        Published numbers use all 50 of LIBERO's states to train and to evaluate, so a rate on these
        10 cannot be compared with one on the 50.
        """
        if self.needs_assets:
            return super().held_out_ids()
        return list(range(self.num_init_states // 2, self.num_init_states))

    def sampled_ids(self) -> list[int]:
        """Return the ids of the starts that an environment samples from the task's regions."""
        return list(range(self.num_init_states, self.num_init_states + MAX_SAMPLED))

    def num_recorded(self, task_id: int) -> int:
        """Return the number of recorded init states of a task."""
        number = self.task(task_id).num_init_states
        return self.num_init_states if number is None else number

    def init_state_ids(self, task_id: int, split: Split) -> list[int]:
        """See `Suite.init_state_ids`; a single recorded state is kept for evaluation.

        A task with a single recorded state is trained on the last sampled starts.
        """
        number = self.task(task_id).num_init_states
        if number is None or split == "sampled":
            return super().init_state_ids(task_id, split)
        if split == "train":
            # from the end, since an evaluation of N starts takes the first N
            return self.sampled_ids()[-TRAINED_SAMPLED:]
        return list(range(number))

    def load_init_states(self, task_id: int) -> npt.NDArray[np.float64]:
        """Read a task's init states, [num_init_states, 1 + nq + nv] (time, positions, velocities).

        Raises:
            ConfigError: the file is missing, or holds another number of states.
        """
        task = self.task(task_id)
        file, number = task.init_states_file, self.num_recorded(task_id)
        if not file.is_file():
            raise ConfigError(f"{file} is missing; reinstall the package it belongs to")
        states = read_states(file)
        if len(states) != number:
            raise ConfigError(f"{file} holds {len(states)} states, not {number}")
        for i in range(task.num_objects):
            first = FIRST_OBJECT + POSE * i
            # positions alone: the workspaces are apart by a shift, not by a turn
            states[:, first : first + 3] += task.state_shift_m
        return states


def libero_suite(name: str) -> LiberoSuite:
    """Return one of `SUITES` or `PERTURBED`, whose tasks have files.

    Raises:
        ConfigError: the name is unknown (with the nearest known one), or LIBERO is not installed.
    """
    if name in PERTURBED:
        return _perturbed_suite(name)
    if name not in SUITES:
        raise ConfigError(
            f"suite is {name!r}, which is unknown; {nearest(name, SUITES, PERTURBED)}, and "
            "perturbed ones such as libero_spatial_swap or libero_plus; one of your own is "
            "path/to/file.py:ClassName, which can be trained and evaluated in, but has neither "
            "demonstrations nor videos here"
        )
    return _mini_suite() if name == "mini" else _libero_suite(name)


def instruction_of(task_name: str) -> str:
    """Return a task's name as a sentence, without the scene that LIBERO-100 puts before it.

    Demonstrations and published evaluations use this instruction (LIBERO ``benchmark/__init__.py``,
    `grab_language_from_filename`); the sentence in a BDDL file sometimes differs.

    >>> instruction_of("KITCHEN_SCENE10_close_the_top_drawer")
    'close the top drawer'
    """
    words = task_name.split("_")
    if words[0].isupper():
        # KITCHEN_SCENE10_close_..: the name begins after the scene
        words = words[next(i for i, word in enumerate(words) if word.startswith("SCENE")) + 1 :]
    return " ".join(words)


@cache
def _mini_suite() -> LiberoSuite:
    tasks = [
        LiberoTask(
            name=name,
            instruction=instruction_of(name),
            bddl_file=_MINI / "bddl" / f"{name}.bddl",
            init_states_file=_MINI / "init_states" / f"{name}.npz",
            published_steps=steps,
        )
        for name, steps in MINI_STEPS.items()
    ]
    return LiberoSuite(name="mini", tasks=tuple(tasks), num_init_states=MINI_INIT_STATES)


@cache
def _libero_suite(name: str) -> LiberoSuite:
    root = libero_root()
    tasks = [
        LiberoTask(
            name=task,
            instruction=instruction_of(task),
            bddl_file=root / "bddl_files" / name / f"{task}.bddl",
            init_states_file=root / "init_files" / name / f"{task}.pruned_init",
            published_steps=PUBLISHED_STEPS[name],
        )
        for task in _libero_task_names(root)[name]
    ]
    return LiberoSuite(name=name, tasks=tuple(tasks), num_init_states=LIBERO_INIT_STATES)


@cache
def _perturbed_suite(name: str) -> LiberoSuite:
    if name in PRO_SUITES:
        package, tasks = PRO, pro_tasks(name, _libero_suite(PRO_SUITES[name][0]).tasks)
    else:
        package, tasks = PLUS, plus_tasks(name, lambda base: _libero_suite(base).tasks)
    return LiberoSuite(
        name=name, tasks=tuple(tasks), num_init_states=LIBERO_INIT_STATES, package=package
    )


def _libero_task_names(root: Path) -> dict[str, list[str]]:
    # run as a file: importing it as a module would import all of LIBERO, which may ask on stdin
    file = root / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("libero_suite_task_map", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} cannot be read; reinstall hf-libero==0.1.4")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.libero_task_map


def make_libero_env(config: EnvConfig) -> LiberoEnv:
    """Build an environment of one of LIBERO's suites or of the embedded one.

    ``functools.partial(make_libero_env, config)`` is its picklable factory.

    Raises:
        ConfigError: LIBERO, its assets or a GL library are missing.
    """
    return LiberoEnv(libero_suite(config.suite), config)
