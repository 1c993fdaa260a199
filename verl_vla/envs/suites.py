"""Suites, their tasks, recorded starts and step limits. Reading this needs no simulator.

A suite's task ids, instructions and init states are those of the published evaluations: LIBERO's
task list in its own order, the instruction spelt by the task's name, the ``.pruned_init`` files.
"""

from __future__ import annotations

import codecs
import importlib.util
import pickle
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from numpy._core.multiarray import _reconstruct

from verl_vla.config import nearest
from verl_vla.envs.assets import libero_root
from verl_vla.errors import ConfigError

Split = Literal["train", "held_out", "official", "drawn"]
"""``official`` is every recorded start, as in published evaluations: trained on or not; ``drawn``
starts are recorded nowhere."""
StepLimit = Literal["published", "simplevla"] | int

SUITES = ("mini", "libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
"""Names that `suite` knows."""

PUBLISHED_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""openvla-oft ``experiments/robot/libero/run_libero_eval.py:63``: a little more than the longest
demonstration of the suite."""
SIMPLEVLA_STEPS = 512
"""SimpleVLA-RL ``verl/workers/rollout/rob_rollout.py:429``, for every LIBERO suite."""
MINI_STEPS = {
    "push_the_red_cube_onto_the_green_marker": 48,
    "lift_the_red_cube": 64,
    "put_the_red_cube_on_the_white_plate": 80,
    "stack_the_red_cube_on_the_blue_cube": 96,
    "lift_the_can": 64,
    "lift_the_milk_carton": 64,
    "push_the_blue_cube_onto_the_green_marker": 48,
}
"""Tasks of the mini suite: six in order of difficulty, and the first one again with another object.
Each with its limit: about twice the scripted expert's steps, so that a policy fails for want of
skill, not of pace."""

LIBERO_INIT_STATES = 50
MINI_INIT_STATES = 100
HELD_OUT_EVERY = 5
MAX_DRAWN = 1000
"""Starts of a task that can be drawn besides its recorded ones, for evaluations that need more."""

_NUMPY_TYPES: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}
"""All that a LIBERO init-state file may hold; anything else in it is refused."""
_MINI = Path(__file__).parent / "mini"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One instruction of a suite."""

    name: str
    instruction: str
    """As the policies were fine-tuned on it: lower case, no full stop."""
    bddl_file: Path
    init_states_file: Path
    published_steps: int
    """Step limit of the published evaluation; of the mini suite, our own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A LIBERO benchmark, or the embedded one."""

    name: str
    tasks: tuple[Task, ...]
    num_init_states: int
    """Recorded starts of each task."""

    @property
    def needs_assets(self) -> bool:
        """Whether LIBERO's meshes and textures are needed to simulate it."""
        return self.name != "mini"

    def task(self, task_id: int) -> Task:
        """Return one task.

        Raises:
            ConfigError: there is no such task.
        """
        if not 0 <= task_id < len(self.tasks):
            raise ConfigError(
                f"task {task_id} is not in {self.name}; its tasks are 0..{len(self.tasks) - 1}"
            )
        return self.tasks[task_id]

    def step_limit(self, limit: StepLimit, task_id: int) -> int:
        """Return after how many steps of the policy a task counts as failed.

        Args:
            limit: ``published``, ``simplevla`` or a number of steps.
            task_id: index of the task; the limits of LIBERO's suites are equal for all tasks.

        Raises:
            ConfigError: the limit is below 1 or means nothing for this suite.
        """
        task = self.task(task_id)
        if limit == "published":
            return task.published_steps
        if limit == "simplevla":
            if not self.needs_assets:
                raise ConfigError(
                    f"step_limit is 'simplevla', but SimpleVLA-RL never played {self.name}; "
                    "choose 'published' or a number of steps"
                )
            return SIMPLEVLA_STEPS
        if isinstance(limit, (str, bool)) or limit < 1:
            raise ConfigError(
                f"step_limit is {limit!r}; choose 'published', 'simplevla' or at least 1 step"
            )
        return limit

    def init_state_ids(self, task_id: int, split: Split) -> list[int]:
        """Return the recorded starts that may be trained on, those kept for evaluation, or all.

        Of LIBERO's 50 states, every fifth (4, 9, .., 49) is held out: 40 to train on, 10 to
        evaluate. Published numbers use all 50 for both; a number on the 10 is not one on the 50.
        The mini suite trains on its first 50 and holds out its last 50.

        ``drawn`` starts have ids that follow the recorded ones, and an environment draws them from
        the task's regions. Nobody trains on them.

        Raises:
            ConfigError: there is no such task or split.
        """
        self.task(task_id)
        if split not in get_args(Split):
            raise ConfigError(f"split is {split!r}; {nearest(split, get_args(Split))}")
        ids = range(self.num_init_states)
        if split == "official":
            return list(ids)
        if split == "drawn":
            return list(range(len(ids), len(ids) + MAX_DRAWN))
        if self.needs_assets:
            held_out = [i for i in ids if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]
        else:
            held_out = list(ids[self.num_init_states // 2 :])
        return held_out if split == "held_out" else [i for i in ids if i not in held_out]

    def load_init_states(self, task_id: int) -> npt.NDArray[np.float64]:
        """Read the starts of a task, [num_init_states, 1 + nq + nv] (time, positions, velocities).

        Raises:
            ConfigError: the file is missing, or holds another number of states.
        """
        file = self.task(task_id).init_states_file
        if not file.is_file():
            raise ConfigError(f"{file} is missing; reinstall the package it belongs to")
        states = _read_states(file)
        if len(states) != self.num_init_states:
            raise ConfigError(f"{file} holds {len(states)} states, not {self.num_init_states}")
        return states


def suite(name: str) -> Suite:
    """Return a suite by its name.

    Raises:
        ConfigError: the name is unknown (with the nearest known one), or LIBERO is not installed.
    """
    if name not in SUITES:
        raise ConfigError(f"suite is {name!r}, which is unknown; {nearest(name, SUITES)}")
    return _mini_suite() if name == "mini" else _libero_suite(name)


def step_limit(name: str, limit: StepLimit, task_id: int) -> int:
    """Return `Suite.step_limit` of the suite called ``name``."""
    return suite(name).step_limit(limit, task_id)


def instruction_of(task_name: str) -> str:
    """Spell a task's name as a sentence, without the scene that LIBERO-100 puts before it.

    LIBERO ``benchmark/__init__.py``, `grab_language_from_filename`: what the demonstrations and
    the published evaluations use, where a BDDL file's own sentence sometimes differs.

    >>> instruction_of("KITCHEN_SCENE10_close_the_top_drawer")
    'close the top drawer'
    """
    words = task_name.split("_")
    if words[0].isupper():
        words = words[next(i for i, word in enumerate(words) if word.startswith("SCENE")) + 1 :]
    return " ".join(words)


@cache
def _mini_suite() -> Suite:
    tasks = [
        Task(
            name=name,
            instruction=instruction_of(name),
            bddl_file=_MINI / "bddl" / f"{name}.bddl",
            init_states_file=_MINI / "init_states" / f"{name}.npz",
            published_steps=steps,
        )
        for name, steps in MINI_STEPS.items()
    ]
    return Suite(name="mini", tasks=tuple(tasks), num_init_states=MINI_INIT_STATES)


@cache
def _libero_suite(name: str) -> Suite:
    root = libero_root()
    tasks = [
        Task(
            name=task,
            instruction=instruction_of(task),
            bddl_file=root / "bddl_files" / name / f"{task}.bddl",
            init_states_file=root / "init_files" / name / f"{task}.pruned_init",
            published_steps=PUBLISHED_STEPS[name],
        )
        for task in _libero_task_names(root)[name]
    ]
    return Suite(name=name, tasks=tuple(tasks), num_init_states=LIBERO_INIT_STATES)


def _libero_task_names(root: Path) -> dict[str, list[str]]:
    # run as a file: importing it as a module would import all of LIBERO, which asks on stdin
    file = root / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("libero_suite_task_map", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} cannot be read; reinstall hf-libero==0.1.4")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.libero_task_map


def _read_states(file: Path) -> npt.NDArray[np.float64]:
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as stored:
            return stored["states"]
    # what `torch.save` makes of an array: a pickle in an archive, which can be read without torch
    with zipfile.ZipFile(file) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as stored:
            return _StatesUnpickler(stored).load()


class _StatesUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _NUMPY_TYPES:
            raise pickle.UnpicklingError(
                f"an init-state file asks for {module_name}.{global_name}, which no array needs"
            )
        return _NUMPY_TYPES[module_name, global_name]
