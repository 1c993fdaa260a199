"""Writing of demonstrations in LIBERO's layout: an HDF5 file per task, ``<task name>_demo.hdf5``.

Names, dtypes and attributes are those of LIBERO's ``scripts/create_dataset.py``, which follows
robomimic: a group ``data`` and in it ``demo_0``, ``demo_1``, ... Two points are surprising:

- Images are stored as LIBERO stores them, bottom row first, as OpenGL renders (the attribute
  ``macros_image_convention``). Policies see them rotated by 180 degrees.
- Row t of ``obs`` is the observation *before* action t, as in openvla's copy of the data
  (``experiments/robot/libero/regenerate_libero_dataset.py``). LIBERO's own script stores the
  observation after it.

The first rows are the steps in which the objects settle; they command no motion, and the no-op
filter of any fine-tuning on these files drops them. They are kept so that ``actions``, executed
from ``states[0]``, reproduce ``states`` bit for bit.

Two fields are this project's own. ``demo_i/disturbed`` [T] marks the actions that are not the
expert's, since a disturbance was added. ``demo_i/rendered`` [T] marks the rows that have images;
those of the other rows are black and take no room in the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from verl_vla.config.choices import CAMERAS

IMAGES: dict[str, str] = dict(
    zip(CAMERAS, ("obs/agentview_rgb", "obs/eye_in_hand_rgb"), strict=True)
)
"""Path of each camera's images within an episode's group."""
DISTURBED, RENDERED = "disturbed", "rendered"
"""Names of this project's masks within an episode's group."""
RECORDING = "recording"
"""Name of this project's attribute of the group ``data``: the settings of the recording."""
FILE_SUFFIX = "_demo.hdf5"
"""Suffix of file names; LIBERO ``libero/libero/benchmark/__init__.py``,
``get_task_demonstration``."""
PARTIAL_SUFFIX = ".partial"
COMPRESSION_LEVEL = 1
"""Fastest level of gzip; it saves half of a rendered image's room."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiberoEpisode:
    """One solved episode of T steps; each row holds the values before its action."""

    task_id: int
    attributes: Mapping[str, str]
    """Attributes of the group ``data``; equal for all episodes of a task."""
    model_file: str
    """The simulated model, XML."""
    actions: Floats
    """[T, 7], simulator units; gripper: -1 opens, +1 closes."""
    states: Floats
    """[T, 1 + nq + nv]: time, positions, velocities of MuJoCo."""
    disturbed: npt.NDArray[np.bool_]
    """[T], True for an action that is not the expert's own."""
    robot_states: Floats
    """[T, 9]: fingers (m), position (m) and quaternion (x, y, z, w) of the hand."""
    proprio: Mapping[str, Floats]
    """By path: ``obs/ee_pos`` [T, 3] m, ``obs/ee_ori`` [T, 3] axis-angle, ``obs/ee_states`` [T, 6]
    both, ``obs/gripper_states`` [T, 2] m, ``obs/joint_states`` [T, 7] rad."""
    rendered: npt.NDArray[np.bool_]
    """[T], True for the R rows that have images."""
    images: Mapping[str, npt.NDArray[np.uint8]]
    """By path, a member of `IMAGES` for every recorded camera: [R, H, W, 3], bottom row first."""

    @property
    def num_steps(self) -> int:
        """Number of steps T, including those in which the objects settle."""
        return len(self.actions)


def file_name(task_name: str) -> str:
    """Return the name of a task's file.

    >>> file_name("lift_the_can")
    'lift_the_can_demo.hdf5'
    """
    return f"{task_name}{FILE_SUFFIX}"


def write_libero_file(
    path: Path, episodes: Iterable[LiberoEpisode], recording: Mapping[str, Any]
) -> None:
    """Write the episodes of one task as they arrive; the file gets its name when complete.

    Args:
        path: the file.
        episodes: at least one.
        recording: settings of the recording, stored as JSON in `RECORDING`.
    """
    partial_file = path.with_name(path.name + PARTIAL_SUFFIX)
    total = num_demos = 0
    with h5py.File(partial_file, "w") as file:
        data = file.create_group("data")
        for num_demos, episode in enumerate(episodes, 1):
            if num_demos == 1:
                data.attrs.update(episode.attributes)
            _write_episode(data.create_group(f"demo_{num_demos - 1}"), episode)
            total += episode.num_steps
        data.attrs[RECORDING] = json.dumps(recording)
        data.attrs["num_demos"] = num_demos
        data.attrs["total"] = total
    partial_file.replace(path)


def _write_episode(group: Any, episode: LiberoEpisode) -> None:
    is_last = np.zeros(episode.num_steps, dtype=np.uint8)
    # rewards and dones as LIBERO's ``create_dataset.py`` writes them
    is_last[-1] = 1
    for name, values in episode.proprio.items():
        group[name] = values
    for name, images in episode.images.items():
        shape = images.shape[1:]
        frames = group.create_dataset(
            name,
            shape=(episode.num_steps, *shape),
            dtype=np.uint8,
            # an image a chunk, as training reads them; a chunk that is never written takes no room
            chunks=(1, *shape),
            compression="gzip",
            compression_opts=COMPRESSION_LEVEL,
        )
        for row, image in zip(np.flatnonzero(episode.rendered), images, strict=True):
            frames[row] = image
    group[DISTURBED] = episode.disturbed.astype(np.uint8)
    group[RENDERED] = episode.rendered.astype(np.uint8)
    group["actions"] = episode.actions
    group["states"] = episode.states
    group["robot_states"] = episode.robot_states
    group["rewards"] = is_last
    group["dones"] = is_last
    group.attrs["num_samples"] = episode.num_steps
    group.attrs["model_file"] = episode.model_file
    group.attrs["init_state"] = episode.states[0]
