"""Demonstrations in LIBERO's own layout: one HDF5 file a task, ``<task name>_demo.hdf5``.

Names, dtypes and attributes are those of LIBERO's ``scripts/create_dataset.py``, which follows
robomimic: a group ``data`` and in it ``demo_0``, ``demo_1``, ... Two things to know:

- Images are stored as LIBERO stores them, bottom row first, as OpenGL renders (the attribute
  ``macros_image_convention``). Policies see them turned by 180 degrees.
- Row t of ``obs`` was seen *before* action t, as in openvla's copy of the data
  (``experiments/robot/libero/regenerate_libero_dataset.py``). LIBERO's own script writes down what
  was seen after it.

The first rows are the steps in which the objects settle; they command no motion, and the no-op
filter of any fine-tuning on these files drops them. They are kept so that ``actions``, played from
``states[0]``, give ``states`` again to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from verl_vla.envs.libero.task import CAMERAS

IMAGES: dict[str, str] = dict(
    zip(CAMERAS, ("obs/agentview_rgb", "obs/eye_in_hand_rgb"), strict=True)
)
"""Where an episode keeps the images of each camera."""
FILE_SUFFIX = "_demo.hdf5"
"""LIBERO ``libero/libero/benchmark/__init__.py``, ``get_task_demonstration``."""
PARTIAL_SUFFIX = ".partial"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiberoEpisode:
    """One solved episode of T steps; what is said of a row holds before its action."""

    task_id: int
    attributes: Mapping[str, str]
    """Of the group ``data``; equal for all episodes of a task."""
    model_file: str
    """The simulated model, XML."""
    actions: Floats
    """[T, 7] simulator units: the gripper -1 opens, +1 closes."""
    states: Floats
    """[T, 1 + nq + nv] time, positions, velocities of MuJoCo."""
    robot_states: Floats
    """[T, 9] fingers (m), position (m) and quaternion (x, y, z, w) of the hand."""
    obs: Mapping[str, npt.NDArray[Any]]
    """``agentview_rgb`` and ``eye_in_hand_rgb`` [T, H, W, 3] uint8, bottom row first, ``ee_pos``
    [T, 3] m, ``ee_ori`` [T, 3] axis-angle, ``ee_states`` [T, 6] both, ``gripper_states`` [T, 2] m,
    ``joint_states`` [T, 7] rad."""

    @property
    def num_steps(self) -> int:
        """T, the settling included."""
        return len(self.actions)


def file_name(task_name: str) -> str:
    """Name of a task's file.

    >>> file_name("lift_the_can")
    'lift_the_can_demo.hdf5'
    """
    return f"{task_name}{FILE_SUFFIX}"


def write_libero_file(path: Path, episodes: Iterable[LiberoEpisode]) -> None:
    """Write the episodes of one task as they come; the file appears when it is whole."""
    partial_file = path.with_name(path.name + PARTIAL_SUFFIX)
    total = num_demos = 0
    with h5py.File(partial_file, "w") as file:
        data = file.create_group("data")
        for num_demos, episode in enumerate(episodes, 1):
            if num_demos == 1:
                data.attrs.update(episode.attributes)
            _write_episode(data.create_group(f"demo_{num_demos - 1}"), episode)
            total += episode.num_steps
        data.attrs["num_demos"] = num_demos
        data.attrs["total"] = total
    partial_file.replace(path)


def _write_episode(group: Any, episode: LiberoEpisode) -> None:
    is_last = np.zeros(episode.num_steps, dtype=np.uint8)
    is_last[-1] = 1
    for name, values in episode.obs.items():
        group[f"obs/{name}"] = values
    group["actions"] = episode.actions
    group["states"] = episode.states
    group["robot_states"] = episode.robot_states
    group["rewards"] = is_last
    group["dones"] = is_last
    group.attrs["num_samples"] = episode.num_steps
    group.attrs["model_file"] = episode.model_file
    group.attrs["init_state"] = episode.states[0]
