"""Reading of LIBERO's demonstration files.

There is one HDF5 file per task, ``<task name>_demo.hdf5``: a group ``data`` with the attribute
``problem_info`` and, for each episode, ``demo_i/actions`` [T, 7], ``demo_i/states``
[T, 1 + nq + nv] (time, positions, velocities) and, for each camera, the `IMAGES` [T, H, W, 3]
uint8, stored bottom-up as OpenGL renders. Source: LIBERO ``scripts/create_dataset.py``.

A state is the one before its action. In LIBERO's own files the observation of a row was made
*after* its action; in openvla's copy and in files of `verl_vla.datasets.libero_writer` before it.
The arm's joints tell which: `_is_after_action`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from verl_vla.config.choices import CAMERAS
from verl_vla.config.sft import DemoChoice
from verl_vla.core.errors import ConfigError
from verl_vla.core.image_preprocessing import Pixels
from verl_vla.core.text import shorten
from verl_vla.datasets.action_targets import moving_steps
from verl_vla.datasets.demo_file import (
    ARM,
    JOINTS,
    REMEDY,
    DemoReader,
    Node,
    open_demos,
    require_one_size,
)
from verl_vla.datasets.libero_writer import FILE_SUFFIX, IMAGES, RENDERED, file_name
from verl_vla.envs.libero.suite import LiberoSuite


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """One episode without its images; T steps, without idle ones if these are filtered."""

    file: Path
    name: str
    """Name of its group in the file, ``demo_i``."""
    task_id: int
    instruction: str
    steps: npt.NDArray[np.int64]
    """[T], index of each action in the file."""
    image_rows: npt.NDArray[np.int64]
    """[T], index in the file of the image before each action."""
    actions: npt.NDArray[np.float32]
    """[T, 7], simulator units; float32 as in openvla-oft's copy of the data."""
    disturbed: npt.NDArray[np.bool_]
    """[T], True for an action that is not the expert's own; it is never learned."""
    rendered: npt.NDArray[np.bool_]
    """[T], True for an action with an image before it."""
    render_size: int
    """Height of its images, pixels."""
    cameras: tuple[str, ...]
    """Members of `CAMERAS` with images in the episode, in their order."""

    @property
    def label(self) -> str:
        """File and name, for messages."""
        return f"{self.file}: {self.name}"

    @property
    def own_actions(self) -> npt.NDArray[np.float32]:
        """The actions that are the expert's own."""
        return self.actions[~self.disturbed]


def demo_file(folder: Path, task_name: str) -> Path:
    """Return the path of a task's demonstration file."""
    return folder / file_name(task_name)


def read_demos(
    folder: Path, suite: LiberoSuite, tasks: Sequence[int], choice: DemoChoice
) -> tuple[list[Demo], list[Demo]]:
    """Read the training episodes and the held-out ones, without their images.

    Every file is closed again, so that no process forked later inherits it.

    Raises:
        ConfigError: a file is missing, broken or of another layout, or holds too few episodes.
    """
    missing = [t for t in tasks if not demo_file(folder, suite.task(t).name).is_file()]
    if missing:
        raise ConfigError(
            f"demos.folder is {str(folder)!r}, but it holds no "
            f"{demo_file(folder, suite.task(missing[0]).name).name} (tasks without a file: "
            f"{missing}); download LIBERO's {suite.name} demonstrations or record some, or name "
            "the tasks that are there with environment.tasks"
        )
    learned: list[Demo] = []
    held_out: list[Demo] = []
    for task_id in tasks:
        path = demo_file(folder, suite.task(task_id).name)
        with open_demos(path) as file:
            chosen = _split(file.names, choice, path)
            sentence = file.sentence()
            words = suite.task(task_id).instruction
            instruction = words if choice.wording == "task_name" else sentence
            # unpacked at once: a generator would read after the file is closed
            first, last = (
                [_read_demo(file.demo(n), path, n, task_id, instruction, choice) for n in part]
                for part in chosen
            )
        learned += first
        held_out += last
    require_one_size([(demo.label, demo.render_size) for demo in [*learned, *held_out]])
    return learned, held_out


def read_actions(folder: Path) -> list[npt.NDArray[np.float32]]:
    """Read the actions [T, 7] of every episode of every file in a folder.

    Idle steps and disturbed actions are left out.

    Raises:
        ConfigError: a file is broken or of another layout.
    """
    actions: list[npt.NDArray[np.float32]] = []
    for path in sorted(folder.glob(f"*{FILE_SUFFIX}")):
        with open_demos(path) as file:
            for name in file.names:
                values, disturbed = file.demo(name).actions()
                steps = moving_steps(values)
                actions.append(values[steps[~disturbed[steps]]].astype(np.float32))
    return actions


class FrameReader:
    """Reader of single images; every process opens its own files at its first read.

    A handle that is open when a process forks shares the parent's file descriptor and a copy of the
    HDF5 library's state, so the child closes it and opens the file again. A pickled reader has no
    handles.
    """

    def __init__(self) -> None:
        self._files: dict[Path, Node] = {}
        self._process = os.getpid()

    def read(self, demo: Demo, index: int, camera: str = CAMERAS[0]) -> Pixels:
        """Return the image before ``demo.actions[index]``: [H, W, 3], upright.

        It is rotated by 180 degrees, so that left and right are swapped, as openvla-oft does
        (``experiments/robot/libero/libero_utils.py:33``) and as `Renderer.render` returns it.
        """
        row, path = int(demo.image_rows[index]), IMAGES[camera]
        try:
            stored = self._file(demo.file)[f"data/{demo.name}/{path}"][row]
        except (OSError, KeyError, RuntimeError) as error:
            raise ConfigError(
                f"{demo.label}: row {row} of its {path} is broken ({shorten(str(error))}); {REMEDY}"
            ) from error
        # a copy, since torch takes no array with negative strides
        return np.ascontiguousarray(stored[::-1, ::-1])

    def close(self) -> None:
        """Close the open files."""
        while self._files:
            self._files.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._files = {}
        self._process = os.getpid()

    def _file(self, path: Path) -> Node:
        if self._process != os.getpid():
            self.close()
            self._process = os.getpid()
        if path not in self._files:
            self._files[path] = h5py.File(path, "r")
        return self._files[path]


def _split(names: list[str], choice: DemoChoice, path: Path) -> tuple[list[str], list[str]]:
    rest = len(names) - choice.held_out_per_task
    wanted = rest if choice.per_task == "all" else choice.per_task
    if wanted > rest or wanted < 1:
        raise ConfigError(
            f"{path} holds {len(names)} episodes, but demos.choice.per_task is {choice.per_task} "
            f"and demos.choice.held_out_per_task {choice.held_out_per_task}; ask for fewer"
        )
    # the last ones, so that fewer or more training episodes leave them as they are
    return names[:wanted], names[rest:]


def _read_demo(
    episode: DemoReader, path: Path, name: str, task_id: int, instruction: str, choice: DemoChoice
) -> Demo:
    # filtered in the file's own precision; openvla-oft's copy is cast only afterwards
    actions, disturbed = episode.actions()
    render_size = episode.render_size(len(actions))
    steps = moving_steps(actions) if choice.filter_noops else np.arange(len(actions))
    lag = int(_is_after_action(episode, len(actions)))
    steps = steps[steps >= lag]  # nothing shows the moment before the first action
    if not len(steps):
        raise ConfigError(
            f"{episode.label}: its {len(actions)} actions are idle, so there is nothing to learn; "
            "leave the demonstration out"
        )
    rendered = episode.mask(RENDERED, len(actions), absent=True)[steps - lag]
    if not rendered.any():
        raise ConfigError(
            f"{episode.label}: none of its {len(steps)} actions to learn has an image before it; "
            "set demos.images=rerendered, or leave the demonstration out"
        )
    return Demo(
        file=path,
        name=name,
        task_id=task_id,
        instruction=instruction,
        steps=steps,
        # an image after action t - 1 is the one before action t
        image_rows=steps - lag,
        actions=actions[steps].astype(np.float32),
        disturbed=disturbed[steps],
        rendered=rendered,
        render_size=render_size,
        cameras=tuple(camera for camera in CAMERAS if episode.has(IMAGES[camera])),
    )


def _is_after_action(episode: DemoReader, num_rows: int) -> bool:
    """Check whether an episode's observations were made after the action of their row.

    The joints of the arm are compared with those of the state before the action and of the state
    after it; the nearer one decides. A replay that drifts a little does not change the answer.
    """
    if not episode.has(JOINTS):
        raise ConfigError(
            f"{episode.label} holds no {JOINTS}, so nothing tells whether its images were taken "
            "before or after their actions; record it with them, or set demos.images=rerendered"
        )
    seen = episode.joints(num_rows)
    arm = episode.states(num_rows)[:, ARM]
    # without the last row, which has no state after it
    to_before = np.abs(seen[:-1] - arm[:-1]).sum()
    to_after = np.abs(seen[:-1] - arm[1:]).sum()
    return bool(to_after < to_before)
