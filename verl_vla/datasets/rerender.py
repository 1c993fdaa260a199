"""Rendering of recorded states at another image size.

LIBERO's files hold images of 128 px; published policies were fine-tuned on 256. openvla replays the
recorded actions (``regenerate_libero_dataset.py``). Here every recorded state is set in the
simulator and rendered, so that images do not depend on the accuracy of a replay. The image shows
the state itself; an image rendered while stepping is up to two of robosuite's 25 physics steps
older.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from verl_vla.core.errors import ConfigError
from verl_vla.core.signals import end_with_parent
from verl_vla.core.text import format_seconds
from verl_vla.datasets.libero_reader import JOINTS, Node, demo_file
from verl_vla.datasets.libero_writer import DISTURBED, IMAGES, PARTIAL_SUFFIX
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.env import LiberoEnv
from verl_vla.envs.libero.suite import libero_suite, make_libero_env

logger = getLogger(__name__)

RGB = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerendering:
    """Source, target and cameras of a rerendering."""

    source: Path
    """Folder of LIBERO's files."""
    target: Path
    """Folder of the files with the new images; they hold actions, states, joints and images."""
    env: EnvConfig
    """Environment whose ``cameras`` are rendered, at its ``render_size``."""


def rerender(work: Rerendering, tasks: Sequence[int], *, workers: int) -> None:
    """Render the files of ``tasks`` that do not exist yet, one task per process at a time.

    Raises:
        ConfigError: a file's states do not fit its task.
    """
    chosen = libero_suite(work.env.suite)
    missing = [t for t in tasks if not demo_file(work.target, chosen.task(t).name).is_file()]
    if not missing:
        return
    work.target.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        futures = [pool.submit(rerender_task, work, task) for task in missing]
        for done, (task, future) in enumerate(zip(missing, futures, strict=True), 1):
            num_frames = future.result()
            spent = time.perf_counter() - began
            logger.info(
                "rendered again: %d/%d  %s  %d images  left %s",
                done,
                len(missing),
                chosen.task(task).name,
                num_frames,
                format_seconds(spent / done * (len(missing) - done)),
            )


def rerender_task(work: Rerendering, task_id: int) -> int:
    """Render one file, which gets its name when complete; return its number of frames.

    Raises:
        ConfigError: its states do not fit the task.
    """
    env = make_libero_env(work.env)
    path = demo_file(work.target, env.suite.task(task_id).name)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with (
            h5py.File(work.source / path.name, "r") as source,
            h5py.File(partial, "w") as target,
        ):
            episodes: Node = source["data"]
            data = target.create_group("data")
            data.attrs.update(episodes.attrs)
            num_frames = sum(
                _draw_episode(episodes[name], data.create_group(name), env, task_id)
                for name in episodes
            )
    finally:
        env.close()
    partial.replace(path)
    return num_frames


def _draw_episode(source: Node, target: Node, env: LiberoEnv, task_id: int) -> int:
    states = np.asarray(source["states"], dtype=np.float64)
    width = env.suite.load_init_states(task_id).shape[1]
    if states.ndim != 2 or states.shape[1] != width:
        raise ConfigError(
            f"{source.file.filename}: {source.name} has states {list(states.shape)}, but a state "
            f"of its task has {width} numbers; record it with the installed LIBERO, or set "
            "demos.images=stored"
        )
    target["actions"] = source["actions"][()]
    if DISTURBED in source:
        target[DISTURBED] = source[DISTURBED][()]
    target["states"] = states
    shape = (env.config.render_size, env.config.render_size, RGB)
    # one image a chunk, as training reads them
    frames = {
        camera: target.create_dataset(
            IMAGES[camera], shape=(len(states), *shape), dtype=np.uint8, chunks=(1, *shape)
        )
        for camera in env.config.cameras
    }
    simulator = env.simulator(task_id)
    joints: list[npt.NDArray[np.float64]] = []
    for step, state in enumerate(states):
        # begin() resets the solver's warm start too, so an image depends on its state alone
        simulator.begin(state)
        joints.append(simulator.seen_robot().arm_rad)
        for camera in frames:
            # bottom-up and not mirrored, as LIBERO stores images
            frames[camera][step] = simulator.render(camera)[::-1, ::-1]
    # `_is_after_action` finds by them that these images come before their actions
    target[JOINTS] = np.stack(joints)
    return len(states)
